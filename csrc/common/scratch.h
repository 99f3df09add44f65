// Memory for what a task makes on its way.
#pragma once

#include <stddef.h>

namespace conddetr {

// Memory of one thread, which later calls use again: at least `bytes`, aligned to a cache line.
char* scratch(size_t bytes);

}  // namespace conddetr
