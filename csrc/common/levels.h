// The instruction sets that CPU kernels are compiled for, and the one in use.
#pragma once

#if defined(__x86_64__)
#define CONDDETR_FOR_EACH_LEVEL(do_it) do_it(plain) do_it(avx2) do_it(avx512)
#else
#define CONDDETR_FOR_EACH_LEVEL(do_it) do_it(plain)
#endif

namespace conddetr {

enum class Level { plain, avx2, avx512 };

// The level in use: the best that this processor supports, unless `use_level` chose another.
Level level();

// For tests and benchmarks. Returns false, and changes nothing, if this processor cannot run it.
bool use_level(Level level);

bool can_run(Level level);

}  // namespace conddetr

// Calls `function` of the level in use; each level is a namespace inside the caller's.
#if defined(__x86_64__)
#define CONDDETR_CALL(function, ...)                                      \
  do {                                                                    \
    switch (conddetr::level()) {                                          \
      case conddetr::Level::avx512: avx512::function(__VA_ARGS__); break; \
      case conddetr::Level::avx2: avx2::function(__VA_ARGS__); break;     \
      default: plain::function(__VA_ARGS__);                              \
    }                                                                     \
  } while (false)
#else
#define CONDDETR_CALL(function, ...) plain::function(__VA_ARGS__)
#endif
