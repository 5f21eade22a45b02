// The MLP sublayer on CPU tensors: its checks, buffers and threads. The arithmetic is in the tiles.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/sublayers.h"

namespace swin_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;

struct MlpArguments {
  const Tensor& x;
  const MaybeTensor &norm_weight, &norm_bias;
  const Tensor& fc1_weight;
  const MaybeTensor& fc1_bias;
  const Tensor& fc2_weight;
  const MaybeTensor &fc2_bias, &layer_scale, &residual_scale, &fc1_packed, &fc2_packed;
  int64_t activation;
  bool norm_last;
  double norm_eps;

  // of the weights: where packed ones are given, theirs
  Element compute() const { return element_of(fc1_packed.has_value() ? *fc1_packed : fc1_weight); }
  int64_t channels() const { return x.size(x.dim() - 1); }
  int64_t hidden() const { return fc1_weight.size(0); }
};

#define SWIN_MLP_PARAMETERS                                                                   \
  Tensor x, MaybeTensor norm_weight, MaybeTensor norm_bias, Tensor fc1_weight,                \
      MaybeTensor fc1_bias, Tensor fc2_weight, MaybeTensor fc2_bias, MaybeTensor layer_scale, \
      MaybeTensor residual_scale, MaybeTensor fc1_packed, MaybeTensor fc2_packed,             \
      int64_t activation, bool norm_last, double norm_eps
#define SWIN_MLP_ARGUMENTS                                                                \
  {x,           norm_weight,    norm_bias,  fc1_weight, fc1_bias,   fc2_weight, fc2_bias, \
   layer_scale, residual_scale, fc1_packed, fc2_packed, activation, norm_last,  norm_eps}

void expect(const char* name, const MaybeTensor& t, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(!t.has_value() || shape_of(*t) == shape, "swin_kernels: ", name,
                  ": unexpected shape");
}

void check(const MlpArguments& a) {
  STD_TORCH_CHECK(3 <= a.x.dim() && a.x.dim() <= 5 && side_by_side(a.x),
                  "swin_kernels: x: expected (B, *S, C) with 1 to 3 axes S and channels side by "
                  "side");
  STD_TORCH_CHECK(a.fc1_weight.dim() == 2 && a.fc2_weight.dim() == 2,
                  "swin_kernels: fc1_weight, fc2_weight: expected matrices");
  const int64_t c = a.channels(), k = a.hidden();
  STD_TORCH_CHECK(c > 0 && k > 0, "swin_kernels: expected channels");
  STD_TORCH_CHECK(0 <= a.activation && a.activation <= int64_t(Activation::kSilu),
                  "swin_kernels: unknown activation ", a.activation);
  expect("fc1_weight", a.fc1_weight, {k, c});
  expect("fc2_weight", a.fc2_weight, {c, k});
  expect("fc1_bias", a.fc1_bias, {k});
  for (const MaybeTensor* t : {&a.norm_weight, &a.norm_bias, &a.fc2_bias, &a.layer_scale})
    expect("a vector of the channels", *t, {c});
  expect("residual_scale", a.residual_scale, {a.x.size(0)});
  const MaybeTensor x = a.x, fc1 = a.fc1_weight, fc2 = a.fc2_weight;
  for (const MaybeTensor* t : {&x, &a.norm_weight, &a.norm_bias, &fc1, &a.fc1_bias, &fc2,
                               &a.fc2_bias, &a.layer_scale, &a.residual_scale}) {
    if (!t->has_value()) continue;
    element_of(**t);
    STD_TORCH_CHECK((*t)->is_cpu(), "swin_kernels: expected tensors on the CPU");
  }
  const Element compute = a.compute();
  STD_TORCH_CHECK(element_of(a.fc2_packed.has_value() ? *a.fc2_packed : a.fc2_weight) == compute &&
                      linear_kernels(compute).mlp_forward[int(element_of(a.x))] != nullptr,
                  "swin_kernels: expected weights of one dtype, and x of the same or of float32");
}

template <class T>
MlpOperands operands_of(const MlpArguments& a, const Kernels& run, SublayerBuffers<T>& buffers) {
  const LinearKernels& linear = linear_kernels(a.compute());
  const int64_t lanes = run.vector_bytes / int64_t(sizeof(T)), axes = a.x.dim() - 2;
  MlpOperands in;
  for (int64_t i = 0; i < axes; ++i) in.rows.size[kAxes - axes + i] = a.x.size(1 + i);
  in.x = read_only_map(a.x);
  in.channels = a.channels();
  in.hidden = a.hidden();
  in.activation = Activation(a.activation);
  in.norm_last = a.norm_last;
  in.norm_eps = a.norm_eps;
  in.norm_weight = buffers.padded(a.norm_weight, lanes);
  in.norm_bias = buffers.padded(a.norm_bias, lanes);
  in.fc1_bias = buffers.padded(a.fc1_bias, lanes);
  in.fc2_bias = buffers.padded(a.fc2_bias, lanes);
  in.layer_scale = buffers.padded(a.layer_scale, lanes);
  in.residual_scale = buffers.image_factors(a.residual_scale, a.x.size(0));
  in.rows.live_images = int64_t(buffers.live.size());
  in.rows.image = buffers.live.data();
  in.fc1 = buffers.packed(a.fc1_packed, a.fc1_weight, false, linear);
  in.fc2 = buffers.packed(a.fc2_packed, a.fc2_weight, false, linear);
  return in;
}

// Blocks of even size, as many for each thread: large enough that weights, read once a block, come
// out of the third cache in time, small enough for the second.
int64_t blocks_of(const RowBlocks& cut) {
  constexpr int64_t kMostRows = 96;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t least = parts_of(cut.rows, kMostRows);
  return std::min(cut.groups(), parts_of(least, threads) * threads);
}

template <class T>
Tensor forward_as(const MlpArguments& a) {
  const Kernels& run = kernels(a.compute());
  Tensor out = torch::stable::empty(shape_of(a.x), a.x.scalar_type());
  if (out.numel() == 0) return out;
  SublayerBuffers<T> buffers;
  MlpForward call;
  call.in = operands_of<T>(a, run, buffers);
  call.out = map_of(out, out.mutable_data_ptr());
  copy_dropped(a.x, out, buffers.live);
  if (call.in.rows.count() == 0) return out;
  constexpr int64_t kGroup = 6;  // rows of a tile of products
  call.cut = {call.in.rows.count(), kGroup, 1};
  call.cut.blocks = blocks_of(call.cut);
  const auto forward = linear_kernels(a.compute()).mlp_forward[int(element_of(a.x))];
  torch::stable::parallel_for(0, call.cut.blocks, 1,
                              [&](int64_t begin, int64_t end) { forward(call, begin, end); });
  return out;
}

Tensor mlp_sublayer_forward(SWIN_MLP_PARAMETERS) {
  const MlpArguments a SWIN_MLP_ARGUMENTS;
  check(a);
  return element_of(x) == Element::kDouble ? forward_as<double>(a) : forward_as<float>(a);
}

// Bits of `needs`: gradients in the order in which the backward returns them.
enum Gradient {
  kX,
  kNormWeight,
  kNormBias,
  kFc1Weight,
  kFc1Bias,
  kFc2Weight,
  kFc2Bias,
  kLayerScale,
};

// Chunks of rows, of so many bytes each, in whole groups: by the problem alone, as sums depend on
// them.
RowBlocks chunk_of(int64_t rows, int64_t bytes_per_row) {
  constexpr int64_t kGroups = 32, kMostInGroup = 48, kLeastInGroup = 6, kChunkBytes = 16 << 20;
  // pairs of rows lie in one group
  const int64_t even = parts_of(rows, 2 * kGroups) * 2;
  RowBlocks chunk;
  chunk.group_rows = std::clamp(even, kLeastInGroup, kMostInGroup);
  const int64_t groups = std::max<int64_t>(1, parts_of(rows, chunk.group_rows));
  const int64_t fit = std::max(kGroups, kChunkBytes / (bytes_per_row * chunk.group_rows));
  chunk.rows = parts_of(groups, parts_of(groups, fit)) * chunk.group_rows;
  return chunk;
}

using MlpGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
MlpGradients backward_as(const Tensor& grad_out, const MlpArguments& a, int64_t needs) {
  const ScalarType dtype = a.x.scalar_type();
  const Kernels& run = kernels(a.compute());
  const LinearKernels& linear = linear_kernels(a.compute());
  const auto backward = linear.mlp_backward[int(element_of(a.x))];
  const int64_t lanes = run.vector_bytes / int64_t(sizeof(T));
  const int64_t channels = a.channels(), hidden = a.hidden();
  const auto wanted = [&](Gradient g) { return (needs >> g & 1) != 0; };
  const Tensor grad_x = torch::stable::empty(shape_of(a.x), dtype);

  SublayerBuffers<T> buffers;
  MlpBackward call;
  call.in = operands_of<T>(a, run, buffers);
  call.grad_out = read_only_map(grad_out);
  call.grad_x = map_of(grad_x, grad_x.mutable_data_ptr());
  call.sums_layer_scale = wanted(kLayerScale) && a.layer_scale.has_value();
  if (a.x.numel() > 0) copy_dropped(grad_out, grad_x, buffers.live);
  call.fc1_transposed = buffers.packed(std::nullopt, a.fc1_weight, true, linear);
  call.fc2_transposed = buffers.packed(std::nullopt, a.fc2_weight, true, linear);

  const int64_t rows = call.in.rows.count();
  const RowBlocks chunk =
      chunk_of(rows, linear.factor_bytes(2, hidden) + linear.factor_bytes(2, channels));
  const int64_t chunks = parts_of(rows, chunk.rows);
  const RowSums<T> row_sums(parts_of(rows, chunk.group_rows), parts_of(channels, lanes) * lanes);
  call.row_sums = row_sums.sums.data();
  LayerGradient<T> fc1(a.fc1_weight, wanted(kFc1Weight), wanted(kFc1Bias), chunks, lanes);
  LayerGradient<T> fc2(a.fc2_weight, wanted(kFc2Weight), false, chunks, lanes);
  const auto factors = [&](bool kept, int64_t columns) {
    return Numbers<char>(kept && rows > 0 ? linear.factor_bytes(chunk.rows, columns) : 0);
  };
  const Numbers<char> normed = factors(wanted(kFc1Weight), channels);
  const Numbers<char> grad_hidden = factors(wanted(kFc1Weight) || wanted(kFc1Bias), hidden);
  const Numbers<char> grad_branch = factors(wanted(kFc2Weight), channels);
  const Numbers<char> activated = factors(wanted(kFc2Weight), hidden);
  call.normed = normed.data();
  call.grad_hidden = grad_hidden.data();
  call.grad_branch = grad_branch.data();
  call.hidden = activated.data();
  for (; call.first_row < rows; call.first_row += chunk.rows) {
    call.cut = {std::min(chunk.rows, rows - call.first_row), chunk.group_rows, 1};
    call.cut.blocks = blocks_of(call.cut);
    torch::stable::parallel_for(0, call.cut.blocks, 1,
                                [&](int64_t begin, int64_t end) { backward(call, begin, end); });
    const bool first = call.first_row == 0, last = call.first_row + chunk.rows >= rows;
    fc1.add(linear, call.grad_hidden, call.normed, call.cut.rows, first, last);
    fc2.add(linear, call.grad_branch, call.hidden, call.cut.rows, first, last);
  }
  const auto of_rows = [&](Gradient g, const MaybeTensor& like, RowSum sum) {
    return row_sums.gradient(wanted(g), like, sum, dtype);
  };
  return {grad_x,
          of_rows(kNormWeight, a.norm_weight, kSumNormWeight),
          of_rows(kNormBias, a.norm_bias, kSumNormBias),
          fc1.weight,
          vector_of(wanted(kFc1Bias), a.fc1_bias, dtype,
                    [&](int64_t i) { return fc1.bias[size_t(i)]; }),
          fc2.weight,
          of_rows(kFc2Bias, a.fc2_bias, kSumLastBias),
          of_rows(kLayerScale, a.layer_scale, kSumLayerScale)};
}

MlpGradients mlp_sublayer_backward(Tensor grad_out, SWIN_MLP_PARAMETERS, int64_t needs) {
  const MlpArguments a SWIN_MLP_ARGUMENTS;
  check(a);
  STD_TORCH_CHECK(shape_of(grad_out) == shape_of(x) && grad_out.scalar_type() == x.scalar_type() &&
                      grad_out.is_cpu(),
                  "swin_kernels: grad_out: expected the shape, dtype and device of x");
  const Tensor grad = side_by_side(grad_out) ? grad_out : torch::stable::contiguous(grad_out);
  return element_of(x) == Element::kDouble ? backward_as<double>(grad, a, needs)
                                           : backward_as<float>(grad, a, needs);
}

}  // namespace
}  // namespace swin_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(swin_kernels, CPU, m) {
  m.impl("mlp_sublayer_forward", TORCH_BOX(&swin_kernels::cpu::mlp_sublayer_forward));
  m.impl("mlp_sublayer_backward", TORCH_BOX(&swin_kernels::cpu::mlp_sublayer_backward));
}
