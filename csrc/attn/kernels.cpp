// Conditional attention on the CPU. Compiled once for each instruction set.
//
// Keys are those of the valid rectangle (or those that the mask does not hide), packed tile by tile; no score of
// padding is ever computed.

#include "attn/cpu/backward.h"
#include "attn/cpu/finish.h"
#include "attn/cpu/forward.h"

namespace conddetr::attn::CONDDETR_LEVEL {
namespace {

template <typename T>
void run_forward(const Problem& p, const Result& r, const Task& task) {
  if (p.keep == nullptr) {
    Forward<T, false>(p, r, task).run();
  } else {
    Forward<T, true>(p, r, task).run();
  }
}

template <typename T>
void run_backward(const Problem& p, const Upstream& u, const Gradients& g, const Task& task, void* partial) {
  if (p.keep == nullptr) {
    Backward<T, false>(p, u, g, task, partial).run();
  } else {
    Backward<T, true>(p, u, g, task, partial).run();
  }
}

template <typename T>
void run_finish(const Problem& p, const Gradients& g, int64_t image, int64_t head, void* partials, int64_t count) {
  Finish<T>(p, g, image, head).run(static_cast<char*>(partials), count);
}

template <typename T>
void count_partial(const Problem& p, size_t& bytes) {
  Arena counting(nullptr);
  const Partial<Compute<T>> partial(p, Shape<Compute<T>>(p), counting);
  bytes = counting.used();
}

}  // namespace

void forward(const Problem& p, const Result& r, const Task& task) {
  CONDDETR_FOR_STORED(p.stored, run_forward, p, r, task);
}

void partial_bytes(const Problem& p, size_t& bytes) { CONDDETR_FOR_STORED(p.stored, count_partial, p, bytes); }

void backward(const Problem& p, const Upstream& u, const Gradients& g, const Task& task, void* partial) {
  CONDDETR_FOR_STORED(p.stored, run_backward, p, u, g, task, partial);
}

void finish(const Problem& p, const Gradients& g, int64_t image, int64_t head, void* partials, int64_t count) {
  CONDDETR_FOR_STORED(p.stored, run_finish, p, g, image, head, partials, count);
}

}  // namespace conddetr::attn::CONDDETR_LEVEL
