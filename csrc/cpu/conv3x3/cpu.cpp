// 3×3 convolution on the CPU: operator, checks, memory, threads. The mathematics is in kernels.cpp.

#include "common/cpu.h"

#include <algorithm>
#include <utility>

#include "common/scratch.h"
#include "cpu/conv3x3/kernels.h"

namespace conddetr::conv3x3 {
namespace {

// Bytes of a block's transformed inputs: they stay in the shared cache until they are used.
constexpr int64_t kBlockBytes = 4 << 20;
// Bytes of a block's inputs and gradients together, for the gradient of the weights.
constexpr int64_t kGradientBytes = 64 << 20;
// Most tiles that a task multiplies: its products stay in a core's private cache.
constexpr int64_t kTaskTiles = 96;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_channels_last(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected four dimensions");
  int64_t stride = 1;
  for (const int64_t dimension : {1, 3, 2, 0}) {
    // The stride of a single item has no meaning.
    STD_TORCH_CHECK(tensor.size(dimension) == 1 || tensor.stride(dimension) == stride, name,
                    ": expected channels-last memory");
    stride *= tensor.size(dimension);
  }
}

Problem problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed, bool relu) {
  check_channels_last(x, "x");
  check_channels_last(weight, "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Problem p{};
  p.stored = stored_type(x);
  p.batch = x.size(0), p.height = x.size(2), p.width = x.size(3);
  p.in_channels = transposed ? rows : columns, p.out_channels = transposed ? columns : rows, p.relu = relu;
  STD_TORCH_CHECK(p.stored != Stored::bf16 && weight.scalar_type() == x.scalar_type(),
                  "weight: expected the dtype of x, float32 or float64");
  STD_TORCH_CHECK(x.size(1) == p.in_channels && weight.size(2) == 3 && weight.size(3) == 3 && rows % kChannels == 0 &&
                      columns % kChannels == 0 && rows > 0 && columns > 0,
                  "weight: expected 3×3 cells, and the channels of x, in multiples of 32");
  STD_TORCH_CHECK(
      !bias || (bias->is_contiguous() && bias->numel() == p.out_channels && bias->scalar_type() == x.scalar_type()),
      "bias: expected one contiguous number for each output channel");
  p.x = data(x), p.bias = data_or_null(bias);
  const char* cells = static_cast<const char*>(weight.const_data_ptr());
  p.weight_y = 3 * columns, p.weight_x = columns;
  p.weight_out = 9 * columns, p.weight_in = 1;
  if (transposed) {
    // From the last cell of the window backwards.
    cells += 8 * columns * int64_t(weight.element_size());
    p.weight_y = -p.weight_y, p.weight_x = -p.weight_x;
    std::swap(p.weight_in, p.weight_out);
  }
  p.weight = cells;
  return p;
}

// Tiles that are handled together, in equal parts: as many as fit into `bytes`, if a grain of them takes `size`.
int64_t block_size(int64_t tiles, int64_t grain, int64_t size, int64_t bytes) {
  const int64_t most = std::max<int64_t>(1, bytes / size) * grain,
                blocks = std::max<int64_t>(1, divide_up(tiles, most));
  return divide_up(divide_up(tiles, blocks), grain) * grain;
}

Tensor empty_channels_last(const Tensor& like, int64_t items, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({items, channels, height, width}, like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed,
                   bool relu) {
  Problem p = problem(x, weight, bias, transposed, relu);
  const Tensor out = empty_channels_last(x, p.batch, p.out_channels, p.height, p.width);
  p.out = data(out);
  const int64_t tiles = p.tiles();
  Grain grain{};
  int64_t memory = 0;
  CONDDETR_CALL(grain, p, grain);
  CONDDETR_CALL(input_bytes, p, grain.tiles, memory);
  const int64_t step = block_size(tiles, grain.tiles, memory, kBlockBytes);
  CONDDETR_CALL(input_bytes, p, step, memory);
  const Tensor inputs = torch::stable::new_empty(x, {memory}, ScalarType::Byte);
  const int64_t threads = torch::stable::get_num_threads(), columns = p.out_channels / grain.channels;
  for (int64_t first = 0; first < tiles; first += step) {
    const Block block{first, std::min(step, tiles - first), data(inputs), nullptr};
    const int64_t groups = divide_up(block.count, grain.tiles);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      CONDDETR_CALL(transform_inputs, p, block, begin * grain.tiles, std::min(end * grain.tiles, block.count));
    });
    // At least four tasks for each thread, if there are enough tiles.
    const int64_t wanted = std::max(divide_up(block.count, kTaskTiles), divide_up(4 * threads, columns));
    const int64_t part = divide_up(groups, std::min(wanted, groups)) * grain.tiles;
    const int64_t parts = divide_up(block.count, part);
    int64_t bytes = 0;
    CONDDETR_CALL(scratch_bytes, p, part, bytes);
    for_each_task(parts * columns, [&](int64_t task) {
      const int64_t begin = task % parts * part, end = std::min(begin + part, block.count);
      CONDDETR_CALL(multiply, p, block, begin, end, task / parts * grain.channels, scratch(size_t(bytes)));
    });
  }
  return out;
}

Tensor weight_gradient(const Tensor& x, const Tensor& grad) {
  check_channels_last(x, "x");
  check_channels_last(grad, "grad");
  Problem p{};
  p.stored = stored_type(x);
  p.batch = x.size(0), p.height = x.size(2), p.width = x.size(3);
  p.in_channels = x.size(1), p.out_channels = grad.size(1);
  STD_TORCH_CHECK(p.stored != Stored::bf16 && grad.scalar_type() == x.scalar_type(),
                  "grad: expected the dtype of x, float32 or float64");
  STD_TORCH_CHECK(grad.size(0) == p.batch && grad.size(2) == p.height && grad.size(3) == p.width && x.numel() > 0 &&
                      grad.numel() > 0 && p.in_channels % kChannels == 0 && p.out_channels % kChannels == 0,
                  "grad: expected the size of x, both with multiples of 32 channels");
  const Tensor out = empty_channels_last(x, p.out_channels, p.in_channels, 3, 3);
  p.x = data(x), p.grad = data(grad), p.out = data(out);
  Grain grain{};
  int64_t input_size = 0, gradient_size = 0, bytes = 0;
  CONDDETR_CALL(grain, p, grain);
  CONDDETR_CALL(input_bytes, p, grain.tiles, input_size);
  CONDDETR_CALL(gradient_bytes, p, grain.tiles, gradient_size);
  const int64_t tiles = p.tiles(), step = block_size(tiles, grain.tiles, input_size + gradient_size, kGradientBytes);
  CONDDETR_CALL(input_bytes, p, step, input_size);
  CONDDETR_CALL(gradient_bytes, p, step, gradient_size);
  CONDDETR_CALL(weight_scratch_bytes, p, bytes);
  const Tensor inputs = torch::stable::new_empty(x, {input_size}, ScalarType::Byte);
  const Tensor gradients = torch::stable::new_empty(x, {gradient_size}, ScalarType::Byte);
  const int64_t columns = p.in_channels / grain.channels;
  for (int64_t first = 0; first < tiles; first += step) {
    const Block block{first, std::min(step, tiles - first), data(inputs), data(gradients)};
    torch::stable::parallel_for(0, block.count, grain.tiles, [&](int64_t begin, int64_t end) {
      CONDDETR_CALL(transform_both, p, block, begin, end);
    });
    for_each_task(p.out_channels / kChannels * columns, [&](int64_t task) {
      const int64_t channel = task / columns * kChannels, in = task % columns * grain.channels;
      CONDDETR_CALL(multiply_weights, p, block, channel, in, scratch(size_t(bytes)));
    });
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(conddetr_native, CPU, library) {
  library.impl("convolution_3x3", TORCH_BOX(&convolution));
  library.impl("convolution_3x3_weight", TORCH_BOX(&weight_gradient));
}

}  // namespace
}  // namespace conddetr::conv3x3
