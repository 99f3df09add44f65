// 3×3 convolution on the CPU: the interface of `cpu.cpp` to the code that is compiled once for each instruction set.
#pragma once

#include <stdint.h>

#include "common/levels.h"
#include "common/stored.h"

namespace conddetr::conv3x3 {

constexpr int kTile = 4;           // outputs of a tile, per dimension
constexpr int kWindow = 6;         // inputs that they need
constexpr int kPoints = 36;        // products of a tile and a pair of channels
constexpr int64_t kChannels = 32;  // both numbers of channels are multiples of it

// One call. x is [batch, height, width, in], contiguous.
//
// The convolution: out is [batch, height, width, out]; the weight of output o, input i and cell (y, x) of the window is
// at o · weight_out + i · weight_in + y · weight_y + x · weight_x. The gradient of the weights: grad is that of
// outputs, [batch, height, width, out], and out is [out, 3, 3, in].
struct Problem {
  const void* x;
  const void* weight;
  const void* bias;  // [out], or null
  const void* grad;
  void* out;
  int64_t batch, height, width, in_channels, out_channels;
  int64_t weight_in, weight_out, weight_y, weight_x;
  bool relu;
  Stored stored;  // float32 or float64

  int64_t tiles_down() const { return (height + kTile - 1) / kTile; }
  int64_t tiles_across() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return batch * tiles_down() * tiles_across(); }
};

// Some consecutive tiles, transformed together; the results are kept until they are multiplied.
struct Block {
  int64_t first, count;
  void* inputs;     // input_bytes(problem, count)
  void* gradients;  // gradient_bytes(problem, count), for the gradient of the weights
};

// Tiles and output channels that the instruction set handles together.
struct Grain {
  int64_t tiles, channels;
};

#define CONDDETR_DECLARE(level)                                                                           \
  namespace level {                                                                                       \
  void grain(const Problem&, Grain&);                                                                     \
  void input_bytes(const Problem&, int64_t tiles, int64_t&);                                              \
  void scratch_bytes(const Problem&, int64_t tiles, int64_t&);                                            \
  /* Inputs of the tiles [begin, end) of a block; begin is a multiple of the grain. */                    \
  void transform_inputs(const Problem&, const Block&, int64_t begin, int64_t end);                        \
  /* Outputs of these tiles, `grain` channels from `channel` on; with scratch_bytes of memory. */         \
  void multiply(const Problem&, const Block&, int64_t begin, int64_t end, int64_t channel, char* memory); \
  /* For the gradient of the weights. */                                                                  \
  void gradient_bytes(const Problem&, int64_t tiles, int64_t&);                                           \
  void weight_scratch_bytes(const Problem&, int64_t&);                                                    \
  /* Inputs and gradients of the tiles [begin, end) of a block. */                                        \
  void transform_both(const Problem&, const Block&, int64_t begin, int64_t end);                          \
  /* Adds a block to the gradient of kChannels output channels and `grain` input channels. */             \
  void multiply_weights(const Problem&, const Block&, int64_t out, int64_t in, char* memory);             \
  }
CONDDETR_FOR_EACH_LEVEL(CONDDETR_DECLARE)
#undef CONDDETR_DECLARE

}  // namespace conddetr::conv3x3
