#include "common/cpu.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "peak/kernels.h"

namespace conddetr::peak {

double multiply_adds_per_second() {
  constexpr int64_t kRounds = 200000;
  constexpr int kRepeats = 30;
  const int64_t threads = torch::stable::get_num_threads();
  double best = 0;
  std::atomic<float> kept{0};
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    int64_t operations = 0;
    const auto start = std::chrono::steady_clock::now();
    for_each_task(threads, [&](int64_t task) {
      int64_t done = 0;
      float sink = 0.999f;
      CONDDETR_CALL(multiply_add, kRounds, done, sink);
      kept = sink;
      if (task == 0) operations = done * threads;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(operations) / seconds.count());
  }
  return best;
}

}  // namespace conddetr::peak
