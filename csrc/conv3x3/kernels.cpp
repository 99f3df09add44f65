// 3×3 convolution on the CPU by Winograd's minimal filtering, F(4×4, 3×3) (Lavin and Gray, CVPR 2016): a quarter of the
// multiplications. Compiled once for each instruction set.
//
//   tile of outputs = Aᵀ [ (G weights Gᵀ) ⊙ (Bᵀ window of inputs B) ] A, the products summed over input channels
//   gradient of weights = Gᵀ [ (A tile of gradients Aᵀ) ⊙ (Bᵀ window of inputs B) ] G, summed over tiles
//
// Each sum is 36 matrix products, of tiles, input channels and output channels. The polynomials are evaluated at 0, ±√½, ±√2
// and infinity: half the rounding error of 0, ±1, ±2 and infinity.

#include "conv3x3/kernels.h"

#include "common/simd.h"

namespace conddetr::conv3x3::CONDDETR_LEVEL {
namespace {

// Input channels that lie side by side in a packed factor.
constexpr int kDepth = int(kChannels);

template <typename Real>
using Six = Vector<Real>[kWindow];

// Bᵀ times a column.
template <typename Real>
CONDDETR_INLINE void transform_input(const Six<Real>& d, Six<Real>& to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> even_a = d[4] - Real(2) * d[2], odd_a = d[3] - Real(2) * d[1];
  const Vector<Real> even_b = d[4] - Real(0.5) * d[2], odd_b = d[3] - Real(0.5) * d[1];
  to[0] = d[0] + (d[4] - Real(2.5) * d[2]);
  to[1] = even_a + a * odd_a;
  to[2] = even_a - a * odd_a;
  to[3] = even_b + b * odd_b;
  to[4] = even_b - b * odd_b;
  to[5] = d[1] + (d[5] - Real(2.5) * d[3]);
}

// G times a column of three.
template <typename Real>
CONDDETR_INLINE void transform_weight(const Vector<Real>* g, Six<Real>& to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> even_a = g[0] + Real(0.5) * g[2], even_b = g[0] + Real(2) * g[2];
  to[0] = g[0];
  to[1] = Real(-2.0 / 3) * (even_a + a * g[1]);
  to[2] = Real(-2.0 / 3) * (even_a - a * g[1]);
  to[3] = Real(1.0 / 6) * (even_b + b * g[1]);
  to[4] = Real(1.0 / 6) * (even_b - b * g[1]);
  to[5] = g[2];
}

// Aᵀ times a column.
template <typename Real>
CONDDETR_INLINE void transform_output(const Six<Real>& m, Vector<Real>* to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vector<Real> sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  to[0] = m[0] + (sum_a + sum_b);
  to[1] = a * difference_a + b * difference_b;
  to[2] = Real(0.5) * sum_a + Real(2) * sum_b;
  to[3] = m[5] + (Real(0.5) * a * difference_a + Real(2) * b * difference_b);
}

// A times a column of four.
template <typename Real>
CONDDETR_INLINE void transform_gradient(const Vector<Real>* y, Six<Real>& to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> even_a = y[0] + Real(0.5) * y[2], odd_a = y[1] + Real(0.5) * y[3];
  const Vector<Real> even_b = y[0] + Real(2) * y[2], odd_b = y[1] + Real(2) * y[3];
  to[0] = y[0];
  to[1] = even_a + a * odd_a;
  to[2] = even_a - a * odd_a;
  to[3] = even_b + b * odd_b;
  to[4] = even_b - b * odd_b;
  to[5] = y[3];
}

// Gᵀ times a column.
template <typename Real>
CONDDETR_INLINE void transform_sum(const Six<Real>& m, Vector<Real>* to) {
  constexpr Real a = Real(0.70710678118654752), b = Real(1.41421356237309505);
  const Vector<Real> sum_a = Real(-2.0 / 3) * (m[1] + m[2]), sum_b = Real(1.0 / 6) * (m[3] + m[4]);
  to[0] = m[0] + (sum_a + sum_b);
  to[1] = Real(-2.0 / 3) * a * (m[1] - m[2]) + Real(1.0 / 6) * b * (m[3] - m[4]);
  to[2] = m[5] + (Real(0.5) * sum_a + Real(2) * sum_b);
}

// Where a tile lies.
struct Place {
  int64_t image, y, x;
};

Place place(const Problem& p, int64_t tile) {
  const int64_t across = p.tiles_across(), down = p.tiles_down();
  return {tile / (down * across), tile / across % down * kTile, tile % across * kTile};
}

// Numbers of a cache line between the 36 factors: they would share its sets otherwise.
template <typename Real>
constexpr int64_t kGap = 64 / int64_t(sizeof(Real));

int64_t whole_rows(int64_t tiles) { return (tiles + kRows - 1) / kRows * kRows; }

// The 36 factors of a tile's window, each at target(channel), `plane` numbers from one to the next.
template <typename Real, typename Target>
CONDDETR_INLINE void transform_window(const Problem& p, int64_t tile, const Target& target, int64_t plane) {
  constexpr int L = kLanes<Real>;
  const Place at = place(p, tile);
  const Real* image = static_cast<const Real*>(p.x) + at.image * p.height * p.width * p.in_channels;
  // Of cells outside the image: null.
  const Real* cells[kWindow][kWindow];
  for (int i = 0; i < kWindow; ++i) {
    for (int j = 0; j < kWindow; ++j) {
      const int64_t y = at.y + i - 1, x = at.x + j - 1;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      cells[i][j] = inside ? image + (y * p.width + x) * p.in_channels : nullptr;
    }
  }
  for (int64_t channel = 0; channel < p.in_channels; channel += L) {
    Six<Real> half[kWindow];
    for (int j = 0; j < kWindow; ++j) {
      Six<Real> column, done;
      for (int i = 0; i < kWindow; ++i) {
        column[i] = cells[i][j] ? load_vector(cells[i][j] + channel) : Vector<Real>{};
      }
      transform_input<Real>(column, done);
      for (int i = 0; i < kWindow; ++i) half[i][j] = done[i];
    }
    Real* to = target(channel);
    for (int i = 0; i < kWindow; ++i) {
      Six<Real> done;
      transform_input<Real>(half[i], done);
      for (int j = 0; j < kWindow; ++j) store_vector(to + (i * kWindow + j) * plane, done[j]);
    }
  }
}

// The same of its gradients.
template <typename Real, typename Target>
CONDDETR_INLINE void transform_gradients(const Problem& p, int64_t tile, const Target& target, int64_t plane) {
  constexpr int L = kLanes<Real>;
  const Place at = place(p, tile);
  const Real* image = static_cast<const Real*>(p.grad) + at.image * p.height * p.width * p.out_channels;
  for (int64_t channel = 0; channel < p.out_channels; channel += L) {
    Six<Real> half[kTile];
    for (int i = 0; i < kTile; ++i) {
      Vector<Real> row[kTile] = {};
      for (int j = 0; j < kTile && at.y + i < p.height && at.x + j < p.width; ++j) {
        row[j] = load_vector(image + ((at.y + i) * p.width + at.x + j) * p.out_channels + channel);
      }
      transform_gradient<Real>(row, half[i]);
    }
    Real* to = target(channel);
    for (int j = 0; j < kWindow; ++j) {
      const Vector<Real> column[] = {half[0][j], half[1][j], half[2][j], half[3][j]};
      Six<Real> done;
      transform_gradient<Real>(column, done);
      for (int i = 0; i < kWindow; ++i) store_vector(to + (i * kWindow + j) * plane, done[i]);
    }
  }
}

// Weights of `kPanel` output channels from `channel` on as `product` takes its right factor, [in][kPanel] for each of
// the 36; `plane` numbers from one to the next.
template <typename Real>
void transform_weights(const Problem& p, int64_t channel, Real* to, int64_t plane) {
  constexpr int L = kLanes<Real>;
  const Real* weight = static_cast<const Real*>(p.weight) + channel * p.weight_out;
  // Whichever of both kinds of channels lies side by side is read in vectors: the other way round they are transposed.
  const bool is_transposed = p.weight_in == 1;
  for (int64_t in = 0; in < p.in_channels; in += L) {
    for (int64_t out = 0; out < kPanel<Real>; out += L) {
      Vector<Real> cells[9][L];
      for (int cell = 0; cell < 9; ++cell) {
        const Real* source = weight + cell / 3 * p.weight_y + cell % 3 * p.weight_x + in * p.weight_in +
                             out * p.weight_out;
        for (int i = 0; i < L; ++i) {
          cells[cell][i] = load_vector(source + i * (is_transposed ? p.weight_out : p.weight_in));
        }
        if (is_transposed) transpose<Real>(cells[cell]);
      }
      for (int i = 0; i < L; ++i) {
        Vector<Real> half[kWindow][3];
        for (int x = 0; x < 3; ++x) {
          const Vector<Real> column[] = {cells[x][i], cells[3 + x][i], cells[6 + x][i]};
          Six<Real> done;
          transform_weight<Real>(column, done);
          for (int y = 0; y < kWindow; ++y) half[y][x] = done[y];
        }
        Real* target = to + (in + i) * kPanel<Real> + out;
        for (int y = 0; y < kWindow; ++y) {
          Six<Real> done;
          transform_weight<Real>(half[y], done);
          for (int x = 0; x < kWindow; ++x) store_vector(target + (y * kWindow + x) * plane, done[x]);
        }
      }
    }
  }
}

// One vector of output channels of a tile, of the 36 products `plane` numbers apart, to out.
template <typename Real>
void write_tile(const Problem& p, int64_t tile, int64_t channel, const Real* products, int64_t plane) {
  const Place at = place(p, tile);
  Vector<Real> half[kTile][kWindow], bias = {};
  for (int j = 0; j < kWindow; ++j) {
    Six<Real> column;
    for (int i = 0; i < kWindow; ++i) column[i] = load_vector(products + (i * kWindow + j) * plane);
    Vector<Real> done[kTile];
    transform_output<Real>(column, done);
    for (int i = 0; i < kTile; ++i) half[i][j] = done[i];
  }
  if (p.bias != nullptr) bias = load_vector(static_cast<const Real*>(p.bias) + channel);
  Real* image = static_cast<Real*>(p.out) + at.image * p.height * p.width * p.out_channels + channel;
  for (int i = 0; i < kTile && at.y + i < p.height; ++i) {
    Vector<Real> done[kTile];
    transform_output<Real>(half[i], done);
    for (int j = 0; j < kTile && at.x + j < p.width; ++j) {
      Vector<Real> value = done[j] + bias;
      // A NaN stays one.
      if (p.relu) value = value <= Vector<Real>{} ? Vector<Real>{} : value;
      store_vector(image + ((at.y + i) * p.width + at.x + j) * p.out_channels, value);
    }
  }
}

// Sizes of what a block's tiles become.
template <typename Real>
int64_t input_plane(const Problem& p, int64_t tiles) {
  return whole_rows(tiles) * p.in_channels + kGap<Real>;
}

// A row of `product` past the last channel reads a little further than the last tile.
template <typename Real>
int64_t gradient_plane(const Problem& p, int64_t tiles) {
  return tiles * p.out_channels + kRows + kGap<Real>;
}

template <typename Real>
int64_t weight_plane(const Problem& p) {
  return p.in_channels * kPanel<Real> + kGap<Real>;
}

template <typename Real>
int64_t product_plane(int64_t tiles) {
  return whole_rows(tiles) * kPanel<Real> + kGap<Real>;
}

// As `product` takes its left factor: [tiles / kRows][in / kDepth][kRows][kDepth].
template <typename Real>
void transform_inputs_of(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  const int64_t plane = input_plane<Real>(p, block.count);
  for (int64_t tile = begin; tile < end; ++tile) {
    Real* to = static_cast<Real*>(block.inputs) + tile / kRows * kRows * p.in_channels + tile % kRows * kDepth;
    const auto target = [to](int64_t channel) { return to + channel / kDepth * kDepth * kRows + channel % kDepth; };
    transform_window<Real>(p, block.first + tile, target, plane);
  }
}

template <typename Real>
void multiply_block(const Problem& p, const Block& block, int64_t begin, int64_t end, int64_t channel, char* memory) {
  constexpr int L = kLanes<Real>;
  const int64_t inputs = input_plane<Real>(p, block.count), plane = product_plane<Real>(end - begin);
  const int64_t weights = weight_plane<Real>(p);
  Real* right = reinterpret_cast<Real*>(memory);
  Real* products = right + kPoints * weights;
  transform_weights(p, channel, right, weights);
  for (int point = 0; point < kPoints; ++point) {
    const Real* left = static_cast<const Real*>(block.inputs) + point * inputs + begin * p.in_channels;
    for (int64_t row = 0; row < end - begin; row += kRows) {
      Real* sums = products + point * plane + row * kPanel<Real>;
      const Real* factor = right + point * weights;
      product<kDepth, 1, false>(kDepth, left, factor, sums, kPanel<Real>);
      for (int64_t in = kDepth; in < p.in_channels; in += kDepth) {
        product<kDepth, 1>(kDepth, left + in * kRows, factor + in * kPanel<Real>, sums, kPanel<Real>);
      }
      left += kRows * p.in_channels;
    }
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t out = 0; out < kPanel<Real>; out += L) {
      const Real* of_tile = products + (tile - begin) * kPanel<Real> + out;
      write_tile(p, block.first + tile, channel + out, of_tile, plane);
    }
  }
}

// Inputs as `product` takes its right factor, [in / kPanel][tiles][kPanel]; gradients as it takes its left one, turned:
// [out / kDepth][tiles][kDepth].
template <typename Real>
void transform_both_of(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    Real* input = static_cast<Real*>(block.inputs) + tile * kPanel<Real>;
    Real* gradient = static_cast<Real*>(block.gradients) + tile * kDepth;
    const int64_t count = block.count;
    const auto of_input = [=](int64_t channel) {
      return input + channel / kPanel<Real> * count * kPanel<Real> + channel % kPanel<Real>;
    };
    const auto of_gradient = [=](int64_t channel) {
      return gradient + channel / kDepth * count * kDepth + channel % kDepth;
    };
    transform_window<Real>(p, block.first + tile, of_input, input_plane<Real>(p, count));
    transform_gradients<Real>(p, block.first + tile, of_gradient, gradient_plane<Real>(p, count));
  }
}

// One vector of input channels of one output channel, of the 36 sums `plane` numbers apart, added to the gradient.
template <typename Real>
void write_weights(const Problem& p, int64_t out, int64_t in, const Real* sums, int64_t plane, bool is_first) {
  Vector<Real> half[3][kWindow];
  for (int j = 0; j < kWindow; ++j) {
    Six<Real> column;
    for (int i = 0; i < kWindow; ++i) column[i] = load_vector(sums + (i * kWindow + j) * plane);
    Vector<Real> done[3];
    transform_sum<Real>(column, done);
    for (int i = 0; i < 3; ++i) half[i][j] = done[i];
  }
  Real* weight = static_cast<Real*>(p.out) + out * 9 * p.in_channels + in;
  for (int i = 0; i < 3; ++i) {
    Vector<Real> done[3];
    transform_sum<Real>(half[i], done);
    for (int j = 0; j < 3; ++j) {
      Real* cell = weight + (3 * i + j) * p.in_channels;
      store_vector(cell, is_first ? done[j] : load_vector(cell) + done[j]);
    }
  }
}

// The last rows that `product` makes are not of this task's channels: they are left aside.
constexpr int kSumRows = (kDepth + kRows - 1) / kRows * kRows;
// Tiles of both factors that the first-level cache holds.
constexpr int64_t kTilesAtOnce = 96;

template <typename Real>
void multiply_weights_of(const Problem& p, const Block& block, int64_t out, int64_t in, char* memory) {
  Real* sums = reinterpret_cast<Real*>(memory);
  const int64_t count = block.count, plane = product_plane<Real>(kSumRows);
  const Real* gradients = static_cast<const Real*>(block.gradients) + out * count;
  const Real* inputs = static_cast<const Real*>(block.inputs) + in * count;
  for (int point = 0; point < kPoints; ++point) {
    const Real *left = gradients + point * gradient_plane<Real>(p, count),
               *right = inputs + point * input_plane<Real>(p, count);
    for (int64_t tile = 0; tile < count; tile += kTilesAtOnce) {
      const int64_t depth = count - tile < kTilesAtOnce ? count - tile : kTilesAtOnce;
      for (int row = 0; row < kSumRows; row += kRows) {
        const Real *a = left + tile * kDepth + row, *b = right + tile * kPanel<Real>;
        Real* c = sums + point * plane + row * kPanel<Real>;
        if (tile == 0) {
          product<1, kDepth, false>(depth, a, b, c, kPanel<Real>);
        } else {
          product<1, kDepth>(depth, a, b, c, kPanel<Real>);
        }
      }
    }
  }
  for (int row = 0; row < kDepth; ++row) {
    for (int64_t lane = 0; lane < kPanel<Real>; lane += kLanes<Real>) {
      write_weights(p, out + row, in + lane, sums + row * kPanel<Real> + lane, plane, block.first == 0);
    }
  }
}

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

// Half precision would lose what the transforms need.
#define CONDDETR_FOR_REAL(function, ...)                          \
  do {                                                            \
    if (p.stored == Stored::f64) {                                \
      function<double>(__VA_ARGS__);                              \
    } else {                                                      \
      function<float>(__VA_ARGS__);                               \
    }                                                             \
  } while (false)

void grain(const Problem& p, Grain& found) { CONDDETR_FOR_REAL(count_grain, found); }

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
