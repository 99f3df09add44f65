// Philox4x32-10 (Salmon et al., SC 2011), and its dropout mask, the same as with Triton's `tl.randint4x`.
#pragma once

#include <stdint.h>

#include "common/portable.h"

namespace conddetr::philox {

constexpr uint32_t kMultiplierA = 0xD2511F53u, kMultiplierB = 0xCD9E8D57u;
constexpr uint32_t kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;
constexpr int kRounds = 10;

struct Four {
  uint32_t lane[4];
};

// The rounds' keys from the seed: the same for every counter.
struct Keys {
  uint32_t a[kRounds], b[kRounds];

  CONDDETR_BOTH explicit Keys(uint64_t seed) {
    a[0] = uint32_t(seed);
    b[0] = uint32_t(seed >> 32);
    for (int round = 1; round < kRounds; ++round) {
      a[round] = a[round - 1] + kWeylA;
      b[round] = b[round - 1] + kWeylB;
    }
  }
};

// Four random numbers for a counter; the upper half of the 128-bit counter is zero.
CONDDETR_BOTH Four randint4x(const Keys& keys, uint64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t(kMultiplierA) * c0, b = uint64_t(kMultiplierB) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ keys.a[round];
    c2 = uint32_t(a >> 32) ^ c3 ^ keys.b[round];
    c1 = uint32_t(b);
    c3 = uint32_t(a);
  }
  return {{c0, c1, c2, c3}};
}

// An element survives dropout if the upper 24 bits of its number, as a fraction of 1, are at least p (a float32, as in
// Triton). Compared as integers: keep if (number >> 8) >= threshold(p). Exact.
CONDDETR_BOTH uint32_t threshold(float p) {
  const double scaled = double(p) * 16777216.0;
  const uint32_t whole = uint32_t(scaled);
  return whole + (double(whole) < scaled);
}

}  // namespace conddetr::philox
