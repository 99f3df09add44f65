// Scratch memory of tasks.
#pragma once

#include <stddef.h>

namespace conddetr {

// Memory of one thread, which later calls reuse: at least `bytes`, aligned to a cache line.
char* scratch(size_t bytes);

}  // namespace conddetr
