// 3×3 convolution on the CPU by Winograd's minimal filtering, F(4×4, 3×3) (Lavin and Gray, CVPR 2016): a quarter of the
// multiplications. Compiled once for each instruction set.
//
//   tile of outputs = Aᵀ [ (G weights Gᵀ) ⊙ (Bᵀ window of inputs B) ] A, the products summed over input channels
//   gradient of weights = Gᵀ [ (A tile of gradients Aᵀ) ⊙ (Bᵀ window of inputs B) ] G, summed over tiles
//
// Each sum is 36 matrix products, of tiles, input channels and output channels.

#include "cpu/conv3x3/kernels.h"

#include "cpu/conv3x3/convolution.h"
#include "cpu/conv3x3/weight_gradient.h"

namespace conddetr::conv3x3::CONDDETR_LEVEL {
namespace {

template <typename Real>
void count_input_bytes(const Problem& p, int64_t tiles, int64_t& bytes) {
  bytes = kPoints * input_plane<Real>(p, tiles) * int64_t(sizeof(Real));
}

template <typename Real>
void count_gradient_bytes(const Problem& p, int64_t tiles, int64_t& bytes) {
  bytes = kPoints * gradient_plane<Real>(p, tiles) * int64_t(sizeof(Real));
}

template <typename Real>
void count_scratch_bytes(const Problem& p, int64_t tiles, int64_t& bytes) {
  bytes = kPoints * (weight_plane<Real>(p) + product_plane<Real>(tiles)) * int64_t(sizeof(Real));
}

template <typename Real>
void count_weight_scratch_bytes(int64_t& bytes) {
  bytes = kPoints * product_plane<Real>(kSumRows) * int64_t(sizeof(Real));
}

template <typename Real>
void count_grain(Grain& grain) {
  grain = {kRows, kPanel<Real>};
}

}  // namespace

// Half precision is too coarse for the transforms.
#define CONDDETR_FOR_REAL(function, ...) \
  do {                                   \
    if (p.stored == Stored::f64) {       \
      function<double>(__VA_ARGS__);     \
    } else {                             \
      function<float>(__VA_ARGS__);      \
    }                                    \
  } while (false)

void grain(const Problem& p, Grain& result) { CONDDETR_FOR_REAL(count_grain, result); }

void input_bytes(const Problem& p, int64_t tiles, int64_t& bytes) {
  CONDDETR_FOR_REAL(count_input_bytes, p, tiles, bytes);
}

void scratch_bytes(const Problem& p, int64_t tiles, int64_t& bytes) {
  CONDDETR_FOR_REAL(count_scratch_bytes, p, tiles, bytes);
}

void transform_inputs(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  CONDDETR_FOR_REAL(transform_inputs_of, p, block, begin, end);
}

void multiply(const Problem& p, const Block& block, int64_t begin, int64_t end, int64_t channel, char* memory) {
  CONDDETR_FOR_REAL(multiply_block, p, block, begin, end, channel, memory);
}

void gradient_bytes(const Problem& p, int64_t tiles, int64_t& bytes) {
  CONDDETR_FOR_REAL(count_gradient_bytes, p, tiles, bytes);
}

void weight_scratch_bytes(const Problem& p, int64_t& bytes) { CONDDETR_FOR_REAL(count_weight_scratch_bytes, bytes); }

void transform_both(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  CONDDETR_FOR_REAL(transform_both_of, p, block, begin, end);
}

void multiply_weights(const Problem& p, const Block& block, int64_t out, int64_t in, char* memory) {
  CONDDETR_FOR_REAL(multiply_weights_of, p, block, out, in, memory);
}

}  // namespace conddetr::conv3x3::CONDDETR_LEVEL
