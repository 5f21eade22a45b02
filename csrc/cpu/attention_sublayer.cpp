// The attention sublayer on CPU tensors: its checks, buffers and threads. The arithmetic is in the
// tiles.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/partial_sums.h"
#include "cpu/sublayers.h"

namespace swin_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;

struct SublayerArguments {
  const Tensor& x;
  const MaybeTensor &norm_weight, &norm_bias;
  const Tensor& qkv_weight;
  const MaybeTensor& qkv_bias;
  const Tensor& proj_weight;
  const MaybeTensor &proj_bias, &layer_scale, &bias, &bias_table, &logit_scale, &residual_scale,
      &bias_index, &mask, &dropout_seed, &qkv_packed, &proj_packed;
  const std::vector<int64_t>&window_size, &shift_size;
  const std::vector<bool>& periodic;
  bool roll_then_pad;
  double mask_value, scale, dropout_p;
  int64_t num_heads;
  bool norm_last;
  double norm_eps;

  Element compute() const { return element_of(qkv_packed.has_value() ? *qkv_packed : qkv_weight); }
  int64_t channels() const { return x.size(x.dim() - 1); }
};

#define SWIN_SUBLAYER_PARAMETERS                                                                \
  Tensor x, MaybeTensor norm_weight, MaybeTensor norm_bias, Tensor qkv_weight,                  \
      MaybeTensor qkv_bias, Tensor proj_weight, MaybeTensor proj_bias, MaybeTensor layer_scale, \
      MaybeTensor bias, MaybeTensor bias_table, MaybeTensor logit_scale,                        \
      MaybeTensor residual_scale, MaybeTensor bias_index, MaybeTensor mask,                     \
      MaybeTensor dropout_seed, MaybeTensor qkv_packed, MaybeTensor proj_packed,                \
      std::vector<int64_t> window_size, std::vector<int64_t> shift_size,                        \
      std::vector<bool> periodic, bool roll_then_pad, double mask_value, double scale,          \
      double dropout_p, int64_t num_heads, bool norm_last, double norm_eps
#define SWIN_SUBLAYER_ARGUMENTS                                                     \
  {x,          norm_weight, norm_bias,     qkv_weight, qkv_bias,    proj_weight,    \
   proj_bias,  layer_scale, bias,          bias_table, logit_scale, residual_scale, \
   bias_index, mask,        dropout_seed,  qkv_packed, proj_packed, window_size,    \
   shift_size, periodic,    roll_then_pad, mask_value, scale,       dropout_p,      \
   num_heads,  norm_last,   norm_eps}

void expect(const char* name, const MaybeTensor& t, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(!t.has_value() || shape_of(*t) == shape, "swin_kernels: ", name,
                  ": unexpected shape");
}

const MaybeTensor kNone = std::nullopt;

// Its arguments as attention's own, whose query is then any tensor of the tokens' dtype.
Arguments attention_of(const SublayerArguments& a) {
  return {a.x,          kNone,      kNone,           a.bias,        a.bias_table,   a.bias_index,
          a.mask,       kNone,      kNone,           a.logit_scale, a.dropout_seed, a.window_size,
          a.shift_size, a.periodic, a.roll_then_pad, a.mask_value,  a.scale,        a.dropout_p};
}

Problem checked(const SublayerArguments& a) {
  const Tensor& x = a.x;
  STD_TORCH_CHECK(3 <= x.dim() && x.dim() <= 5 && side_by_side(x),
                  "swin_kernels: x: expected (B, *S, C) with 1 to 3 axes S and channels side by "
                  "side");
  const int64_t c = a.channels();
  STD_TORCH_CHECK(c > 0 && a.num_heads > 0 && c % a.num_heads == 0,
                  "swin_kernels: expected num_heads that divide the channels");
  expect("qkv_weight", a.qkv_weight, {3 * c, c});
  expect("qkv_bias", a.qkv_bias, {3 * c});
  expect("proj_weight", a.proj_weight, {c, c});
  for (const MaybeTensor* t : {&a.norm_weight, &a.norm_bias, &a.proj_bias, &a.layer_scale})
    expect("a vector of the channels", *t, {c});
  expect("residual_scale", a.residual_scale, {x.size(0)});
  const MaybeTensor weights[] = {a.qkv_weight, a.proj_weight};
  for (const MaybeTensor* t : {&a.norm_weight, &a.norm_bias, &weights[0], &a.qkv_bias, &weights[1],
                               &a.proj_bias, &a.layer_scale, &a.residual_scale}) {
    if (!t->has_value()) continue;
    element_of(**t);
    STD_TORCH_CHECK((*t)->is_cpu(), "swin_kernels: expected tensors on the CPU");
  }
  const Element compute = a.compute();
  STD_TORCH_CHECK(
      element_of(a.proj_packed.has_value() ? *a.proj_packed : a.proj_weight) == compute &&
          linear_kernels(compute).attention_forward[int(element_of(x))] != nullptr,
      "swin_kernels: expected weights of one dtype, and x of the same or of float32");
  std::vector<int64_t> size;
  for (int64_t i = 1; i + 1 < x.dim(); ++i) size.push_back(x.size(i));
  const int64_t head_dim = c / a.num_heads;
  return checked_problem(attention_of(a), x.size(0), size, a.num_heads, head_dim, head_dim);
}

TokenView tokens_of(const Tensor& t, const void* data) {
  const MapView map = map_of(t, const_cast<void*>(data));
  TokenView view;
  view.data = map.data;
  view.batch = map.batch;
  std::copy(map.axis, map.axis + kAxes, view.axis);
  return view;
}

template <class T>
struct Buffered {
  SublayerBuffers<T> sublayer;
  Buffers<T> attention;
};

template <class T>
AttentionOperands operands_of(const SublayerArguments& a, const Problem& p, const Kernels& run,
                              Buffered<T>& buffers) {
  const LinearKernels& linear = linear_kernels(a.compute());
  const int64_t lanes = run.vector_bytes / int64_t(sizeof(T));
  AttentionOperands in;
  in.attention = operands_of(attention_of(a), p, lanes, buffers.attention);
  in.x = tokens_of(a.x, a.x.const_data_ptr());
  in.channels = a.channels();
  in.norm_last = a.norm_last;
  in.norm_eps = a.norm_eps;
  in.norm_weight = buffers.sublayer.padded(a.norm_weight, lanes);
  in.norm_bias = buffers.sublayer.padded(a.norm_bias, lanes);
  in.qkv_bias = buffers.sublayer.padded(a.qkv_bias, lanes);
  in.proj_bias = buffers.sublayer.padded(a.proj_bias, lanes);
  in.layer_scale = buffers.sublayer.padded(a.layer_scale, lanes);
  in.residual_scale = buffers.sublayer.image_factors(a.residual_scale, a.x.size(0));
  in.live_images = int64_t(buffers.sublayer.live.size());
  in.image = buffers.sublayer.live.data();
  in.qkv = buffers.sublayer.packed(a.qkv_packed, a.qkv_weight, false, linear);
  in.proj = buffers.sublayer.packed(a.proj_packed, a.proj_weight, false, linear);
  // rows enough that weights, read once a block, come out of the third cache in time
  constexpr int64_t kRows = 112;
  in.block_windows = std::max<int64_t>(1, kRows / p.tokens());
  return in;
}

template <class T>
Tensor forward_as(const SublayerArguments& a, const Problem& p) {
  const Kernels& run = kernels(a.compute());
  Tensor out = torch::stable::empty(shape_of(a.x), a.x.scalar_type());
  if (out.numel() == 0) return out;
  Buffered<T> buffers;
  AttentionForward call;
  call.in = operands_of<T>(a, p, run, buffers);
  call.out = tokens_of(out, out.mutable_data_ptr());
  copy_dropped(a.x, out, buffers.sublayer.live);
  const int64_t windows = call.in.windows(), threads = torch::stable::get_num_threads();
  if (windows == 0) return out;
  // results do not depend on it
  call.in.block_windows = std::clamp<int64_t>(windows / threads, 1, call.in.block_windows);
  const auto forward = linear_kernels(a.compute()).attention_forward[int(element_of(a.x))];
  torch::stable::parallel_for(0, parts_of(windows, call.in.block_windows), 1,
                              [&](int64_t begin, int64_t end) { forward(call, begin, end); });
  return out;
}

// Bits of `needs`: gradients in the order in which the backward returns them.
enum Gradient {
  kX,
  kNormWeight,
  kNormBias,
  kQkvWeight,
  kQkvBias,
  kProjWeight,
  kProjBias,
  kLayerScale,
  kBias,
  kBiasTable,
  kLogitScale,
};

using SublayerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                     Tensor, Tensor, Tensor>;

// Groups of windows and chunks of groups: by the problem alone, as sums depend on them.
struct Groups {
  int64_t group_windows, chunk_windows;

  Groups(int64_t windows, int64_t block_windows, int64_t group_bytes, int64_t row_bytes,
         int64_t tokens) {
    constexpr int64_t kGroups = 64, kPartialBytes = 32 << 20, kChunkBytes = 16 << 20;
    const int64_t most =
        std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(group_bytes, 1), 1, kGroups);
    group_windows =
        parts_of(parts_of(std::max<int64_t>(windows, 1), most), block_windows) * block_windows;
    const int64_t groups = parts_of(windows, group_windows);
    const int64_t fit = std::max<int64_t>(16, kChunkBytes / (row_bytes * group_windows * tokens));
    chunk_windows =
        parts_of(std::max<int64_t>(groups, 1), parts_of(std::max<int64_t>(groups, 1), fit)) *
        group_windows;
  }
};

// The heads whose part of a qkv_bias in fp16 gives keys a zero vector, in cosine attention.
std::vector<bool> heads_with_zero_key(const SublayerArguments& a, const Problem& p) {
  std::vector<bool> held(size_t(p.heads), false);
  if (!a.logit_scale.has_value() || !a.qkv_bias.has_value() ||
      element_of(*a.qkv_bias) != Element::kHalf)
    return held;
  const auto* data = static_cast<const torch::headeronly::Half*>(a.qkv_bias->const_data_ptr());
  for (int64_t h = 0; h < p.heads; ++h) {
    bool zero = true;
    for (int64_t c = 0; c < p.head_dim; ++c)
      zero =
          zero && float(data[(a.channels() + h * p.head_dim + c) * a.qkv_bias->stride(0)]) == 0.f;
    held[size_t(h)] = zero;
  }
  return held;
}

template <class T>
SublayerGradients backward_as(const Tensor& grad_out, const SublayerArguments& a, const Problem& p,
                              int64_t needs) {
  const ScalarType dtype = a.x.scalar_type();
  const Kernels& run = kernels(a.compute());
  const LinearKernels& linear = linear_kernels(a.compute());
  const auto backward = linear.attention_backward[int(element_of(a.x))];
  const int64_t lanes = run.vector_bytes / int64_t(sizeof(T)), n = p.tokens();
  const int64_t channels = a.channels(), width = parts_of(n, lanes) * lanes;
  const auto wanted = [&](Gradient g) { return (needs >> g & 1) != 0; };
  const bool wants_bias = wanted(kBias) && a.bias.has_value();
  const bool wants_table = wanted(kBiasTable) && a.bias_table.has_value();
  const bool wants_logit_scale = wanted(kLogitScale) && a.logit_scale.has_value();
  const Tensor grad_x = torch::stable::empty(shape_of(a.x), dtype);

  Buffered<T> buffers;
  AttentionBackward call;
  call.in = operands_of<T>(a, p, run, buffers);
  call.grad_out = tokens_of(grad_out, grad_out.const_data_ptr());
  call.grad_x = tokens_of(grad_x, grad_x.mutable_data_ptr());
  call.sums_layer_scale = wanted(kLayerScale) && a.layer_scale.has_value();
  call.wants_attended = wanted(kProjWeight);
  call.holds_half = a.compute() == Element::kHalf;
  if (a.x.numel() > 0) copy_dropped(grad_out, grad_x, buffers.sublayer.live);
  call.qkv_transposed = buffers.sublayer.packed(std::nullopt, a.qkv_weight, true, linear);
  call.proj_transposed = buffers.sublayer.packed(std::nullopt, a.proj_weight, true, linear);

  const int64_t windows = call.in.windows();
  // pairs of rows lie in one block, but for the last
  if (n % 2 != 0) call.in.block_windows = parts_of<int64_t>(call.in.block_windows, 2) * 2;
  const int64_t bias_size = wants_bias || wants_table ? n * width : 0;
  const Groups cut(
      windows, call.in.block_windows, p.heads * bias_size * int64_t(sizeof(T)),
      (3 * linear.factor_bytes(2, channels) + linear.factor_bytes(2, 3 * channels)) / 2, n);
  call.group_windows = cut.group_windows;
  const int64_t groups = parts_of(windows, cut.group_windows);
  const int64_t chunks = parts_of(windows, cut.chunk_windows);
  const RowSums<T> row_sums(parts_of(windows, call.in.block_windows) * call.sums_of_block(),
                            parts_of(channels, lanes) * lanes);
  call.row_sums = row_sums.sums.data();
  const Numbers<T> biases(groups * p.heads * bias_size);
  call.partial_bias = biases.data();
  const Numbers<double> logit_scales(wants_logit_scale ? groups * p.heads : 0);
  call.partial_logit_scale = logit_scales.data();
  LayerGradient<T> qkv(a.qkv_weight, wanted(kQkvWeight), wanted(kQkvBias), chunks, lanes);
  LayerGradient<T> proj(a.proj_weight, wanted(kProjWeight), false, chunks, lanes);
  const auto factors = [&](bool kept, int64_t columns) {
    return Numbers<char>(kept && windows > 0 ? linear.factor_bytes(cut.chunk_windows * n, columns)
                                             : 0);
  };
  const Numbers<char> normed = factors(wanted(kQkvWeight), channels);
  const Numbers<char> grad_qkv = factors(wanted(kQkvWeight) || wanted(kQkvBias), 3 * channels);
  const Numbers<char> attended = factors(wanted(kProjWeight), channels);
  const Numbers<char> grad_branch = factors(wanted(kProjWeight), channels);
  call.normed = normed.data();
  call.grad_qkv = grad_qkv.data();
  call.attended = attended.data();
  call.grad_branch = grad_branch.data();
  for (; call.first_window < windows; call.first_window += cut.chunk_windows) {
    call.windows = std::min(cut.chunk_windows, windows - call.first_window);
    torch::stable::parallel_for(0, parts_of(call.windows, cut.group_windows), 1,
                                [&](int64_t begin, int64_t end) { backward(call, begin, end); });
    const bool first = call.first_window == 0;
    const bool last = call.first_window + cut.chunk_windows >= windows;
    qkv.add(linear, call.grad_qkv, call.normed, call.windows * n, first, last);
    proj.add(linear, call.grad_branch, call.attended, call.windows * n, first, last);
  }

  const Numbers<T> bias = summed(biases, groups, p.heads * bias_size);
  const Numbers<double> logit_scale = summed(logit_scales, groups, wants_logit_scale ? p.heads : 0);
  const auto of_rows = [&](Gradient g, const MaybeTensor& like, RowSum sum) {
    return row_sums.gradient(wanted(g), like, sum, dtype);
  };
  // a key that is a zero vector, as padding then has, is held in fp16 as tokens are
  const std::vector<bool> held = heads_with_zero_key(a, p);
  const auto grad_qkv_bias = [&](int64_t i) {
    const double x = qkv.bias[size_t(i)];
    const int64_t head = (i - channels) / p.head_dim;
    const bool of_key = channels <= i && i < 2 * channels;
    return of_key && held[size_t(head)] ? std::clamp(x, -65504.0, 65504.0) : x;
  };
  const auto nothing = [&] { return torch::stable::empty({0}, dtype); };
  return {grad_x,
          of_rows(kNormWeight, a.norm_weight, kSumNormWeight),
          of_rows(kNormBias, a.norm_bias, kSumNormBias),
          qkv.weight,
          vector_of(wanted(kQkvBias), a.qkv_bias, dtype, grad_qkv_bias),
          proj.weight,
          of_rows(kProjBias, a.proj_bias, kSumLastBias),
          of_rows(kLayerScale, a.layer_scale, kSumLayerScale),
          wants_bias ? bias_gradient(*a.bias, bias, n, width) : nothing(),
          wants_table ? table_gradient(*a.bias_table, bias, buffers.attention.bias_index, p, width)
                      : nothing(),
          vector_of(wants_logit_scale, a.logit_scale, dtype,
                    [&](int64_t i) { return logit_scale[i]; })};
}

Tensor window_attention_sublayer_forward(SWIN_SUBLAYER_PARAMETERS) {
  const SublayerArguments a SWIN_SUBLAYER_ARGUMENTS;
  const Problem p = checked(a);
  return element_of(x) == Element::kDouble ? forward_as<double>(a, p) : forward_as<float>(a, p);
}

SublayerGradients window_attention_sublayer_backward(Tensor grad_out, SWIN_SUBLAYER_PARAMETERS,
                                                     int64_t needs) {
  const SublayerArguments a SWIN_SUBLAYER_ARGUMENTS;
  const Problem p = checked(a);
  STD_TORCH_CHECK(shape_of(grad_out) == shape_of(x) && grad_out.scalar_type() == x.scalar_type() &&
                      grad_out.is_cpu(),
                  "swin_kernels: grad_out: expected the shape, dtype and device of x");
  const Tensor grad = side_by_side(grad_out) ? grad_out : torch::stable::contiguous(grad_out);
  return element_of(x) == Element::kDouble ? backward_as<double>(grad, a, p, needs)
                                           : backward_as<float>(grad, a, p, needs);
}

}  // namespace
}  // namespace swin_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(swin_kernels, CPU, m) {
  m.impl("window_attention_sublayer_forward",
         TORCH_BOX(&swin_kernels::cpu::window_attention_sublayer_forward));
  m.impl("window_attention_sublayer_backward",
         TORCH_BOX(&swin_kernels::cpu::window_attention_sublayer_backward));
}
