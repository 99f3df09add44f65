#include "common/levels.h"

#include <atomic>

namespace conddetr {

bool can_run(Level level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == Level::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (level == Level::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return level == Level::plain;
}

namespace {

Level best() {
  if (can_run(Level::avx512)) return Level::avx512;
  return can_run(Level::avx2) ? Level::avx2 : Level::plain;
}

std::atomic<Level> chosen{best()};

}  // namespace

Level level() { return chosen.load(std::memory_order_relaxed); }

bool use_level(Level level) {
  if (!can_run(level)) return false;
  chosen.store(level, std::memory_order_relaxed);
  return true;
}

}  // namespace conddetr
