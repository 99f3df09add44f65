// Sine of an angle counted in turns: range reduction is then exact, one subtraction of a whole number.
#pragma once

#include <math.h>

#include "common/portable.h"

namespace conddetr {

// sin(2π · turns), without a branch: folded to a quarter turn, then the series to degree 13.
// Absolute error below 4e-7 for up to one turn; beyond it the error of `turns` itself, 2π · |turns| · 2^-24, is added.
CONDDETR_BOTH float sin_turns(float turns) {
  turns -= floorf(turns + 0.5f);
  turns = turns > 0.25f ? 0.5f - turns : (turns < -0.25f ? -0.5f - turns : turns);
  const float x = turns * 6.283185307179586f;
  const float z = x * x;
  float series = 1.6059043836821613e-10f;
  series = series * z - 2.505210838544172e-08f;
  series = series * z + 2.7557319223985893e-06f;
  series = series * z - 0.0001984126984126984f;
  series = series * z + 0.008333333333333333f;
  series = series * z - 0.16666666666666666f;
  return x + x * (z * series);
}

// In float64, only for tests: the library's sine, after the same reduction.
CONDDETR_BOTH double sin_turns(double turns) { return sin((turns - floor(turns + 0.5)) * 6.283185307179586); }

}  // namespace conddetr
