// Online softmax in base 2: the running maximum and the log-sum-exp, with their corner cases.
#pragma once

#include <math.h>

#include "common/portable.h"

namespace conddetr {

// The reference of scores: the running maximum, or 0 until a key is visible (-inf - -inf is NaN).
template <typename Real>
CONDDETR_BOTH Real softmax_reference(Real highest) {
  return highest == -Real(INFINITY) ? Real(0) : highest;
}

// log2(Σ 2^score) of all keys, given the maximum and Σ 2^(score - maximum); +inf if no key was visible, so that every
// weight 2^(score - lse) is zero in backward.
template <typename Real>
CONDDETR_BOTH Real log_sum_exp2(Real highest, Real total) {
  return total == Real(0) ? Real(INFINITY) : highest + log2(total);
}

// 1 / Σ, or 0 if no key was visible: the output is then zero.
template <typename Real>
CONDDETR_BOTH Real inverse_total(Real total) {
  return total == Real(0) ? Real(0) : Real(1) / total;
}

}  // namespace conddetr
