// The backward op: which kernels, and the tensors that they sum to.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/op.h"
#include "cuda/sums.h"
#include "cuda/tiled_backward.h"
#include "cuda/whole_backward.h"

namespace swin_kernels::cuda {
namespace {

using torch::headeronly::ScalarType;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kNeedsBias = 1, kNeedsTable = 2, kNeedsPadKey = 4, kNeedsPadValue = 8,
                  kNeedsLogitScale = 16;

template <class Sum>
Tensor sums_like(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape,
                                  sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float);
}

// The sum of (rows, numbers) over its rows, to `to`.
template <class Sum>
void add_up(const Device& device, Tensor partial, const Tensor& to, RowSum call) {
  constexpr int kThreads = 128;
  const int64_t columns = (call.numbers + kThreads - 1) / kThreads;
  while (true) {
    const int64_t groups = std::max<int64_t>(1, (call.rows + kRowsAtOnce - 1) / kRowsAtOnce);
    call.partial = partial.const_data_ptr();
    RowSum pass = call;
    Tensor next = to;
    if (groups > 1) {
      next = sums_like<Sum>(to, {groups, call.numbers});
      pass.element = sizeof(Sum) == 8 ? Element::kDouble : Element::kFloat;
      pass.pad = FloatView();
    } else {
      pass.element = element_of(to);
    }
    pass.to = next.mutable_data_ptr();
    device.launch(sum_rows<Sum>, pass, checked_blocks(columns * groups), kThreads, 0);
    if (groups == 1) return;
    partial = next;
    call.rows = groups;
  }
}

// The tensors that the kernels write beside the gradients of tokens, and the second passes over
// them.
template <class Sum, class Wide>
struct Partials {
  const Arguments& a;
  const Problem& p;
  int64_t rows;  // of the bias's, of all others
  int64_t other_rows;
  MaybeTensor bias, pad_key, pad_value, logit_scale;

  Partials(const Arguments& a, const Problem& p, int64_t needs, int64_t rows, int64_t other_rows)
      : a(a), p(p), rows(rows), other_rows(other_rows) {
    const int64_t n = p.tokens();
    const auto wants = [&](int64_t need, const MaybeTensor& x) {
      return (needs & need) != 0 && x.has_value();
    };
    if (wants(kNeedsBias, a.bias) || wants(kNeedsTable, a.bias_table))
      bias = sums_like<Sum>(a.query, {rows, p.heads, n, n});
    if (wants(kNeedsPadKey, a.pad_key))
      pad_key = sums_like<Wide>(a.query, {other_rows, p.heads, p.head_dim});
    if (wants(kNeedsPadValue, a.pad_value))
      pad_value = sums_like<Wide>(a.query, {other_rows, p.heads, p.value_dim});
    if (wants(kNeedsLogitScale, a.logit_scale))
      logit_scale = sums_like<Wide>(a.query, {other_rows, p.heads});
  }

  static void* data(MaybeTensor& x) { return x.has_value() ? x->mutable_data_ptr() : nullptr; }

  void hand_to(Backward& call) {
    call.partial_bias = data(bias);
    call.partial_pad_key = data(pad_key);
    call.partial_pad_value = data(pad_value);
    call.partial_logit_scale = data(logit_scale);
  }

  template <class S>
  Tensor summed(const Device& device, const MaybeTensor& partial, const MaybeTensor& like,
                int64_t count, int64_t numbers, FloatView pad = FloatView()) const {
    if (!partial.has_value()) return torch::stable::new_empty(a.query, {0});
    Tensor to = torch::stable::new_empty(*like, shape_of(*like));
    RowSum call;
    call.rows = count;
    call.numbers = numbers;
    call.pad = pad;
    call.pad_dim = p.head_dim;
    add_up<S>(device, *partial, to, call);
    return to;
  }

  Tensor of_bias(const Device& device) const {
    if (!a.bias.has_value()) return torch::stable::new_empty(a.query, {0});
    return summed<Sum>(device, bias, a.bias, rows, p.heads * p.tokens() * p.tokens());
  }

  Tensor of_table(const Device& device, const Bias& description) const {
    if (!a.bias_table.has_value() || !bias.has_value())
      return torch::stable::new_empty(a.query, {0});
    const int64_t n = p.tokens();
    const MaybeTensor like = sums_like<Sum>(a.query, {p.heads, n, n});
    const Tensor dense = summed<Sum>(device, bias, like, rows, p.heads * n * n);
    Tensor to = torch::stable::new_empty(*a.bias_table, shape_of(*a.bias_table));
    TableGather call;
    call.dense = dense.const_data_ptr();
    call.to = to.mutable_data_ptr();
    call.element = element_of(to);
    call.bias = description;
    call.problem = p;
    constexpr int64_t kWarps = 4;
    const int64_t blocks = (description.rows * p.heads + kWarps - 1) / kWarps;
    device.launch(gather_table<Sum>, call, checked_blocks(blocks), int(kWarps) * kWarp, 0);
    return to;
  }

  Tensor of_pad_key(const Device& device) const {
    const bool held = a.logit_scale.has_value() && a.pad_key.has_value() &&
                      element_of(*a.pad_key) == Element::kHalf;
    return summed<Wide>(device, pad_key, a.pad_key, other_rows, p.heads * p.head_dim,
                        held ? float_view(a.pad_key) : FloatView());
  }
};

template <class P, int Channels>
void launch_tiled(const Device& device, const Backward& call, bool wants_bias,
                  int64_t bias_programs) {
  const Problem& p = call.in.problem;
  const int64_t tiles = tiles_of(p),
                blocks = checked_blocks(p.batch * p.windows() * p.heads * tiles);
  const int threads = threads_for(kTile);
  constexpr int64_t bytes = sizeof(TiledBackwardMemory<P, Channels>);
  static_assert(bytes <= kSharedBytes);
  device.launch(tiled_statistics<P, Channels>, call, blocks, threads, bytes);
  device.launch(tiled_grad_query<P, Channels>, call, blocks, threads, bytes);
  device.launch(tiled_grad_key_value<P, Channels>, call, blocks, threads, bytes);
  if (wants_bias)
    device.launch(tiled_grad_bias<P, Channels>, call, checked_blocks(bias_programs * tiles * tiles),
                  threads, bytes);
}

Gradients cuda_backward(Tensor grad_out, SWIN_PARAMETERS, bool tf32, int64_t needs) {
  const Arguments a SWIN_ARGUMENTS;
  const Problem p = checked_on_device(a);
  check_grad_out(grad_out, a);
  const Device device(a.query);
  const auto empty_like = [&](const MaybeTensor& t) {
    return torch::stable::new_empty(a.query,
                                    t.has_value() ? shape_of(*t) : std::vector<int64_t>{0});
  };
  Tensor grad_query = empty_like(a.query), grad_key = empty_like(a.key),
         grad_value = empty_like(a.value);
  const bool packed = a.packed();
  Tensor& key_home = packed ? grad_query : grad_key;
  Tensor& value_home = packed ? grad_query : grad_value;

  Gradients found{grad_query, grad_key,   grad_value, grad_query,
                  grad_query, grad_query, grad_query, grad_query};
  const int64_t channels = std::max(p.head_dim, p.value_dim);
  choose(element_of(a.query), tf32, channels, [&](auto kernels) {
    using P = typename decltype(kernels)::Precision;
    using T = typename P::Element;
    using Sum = typename P::Sum;
    using Wide = WideSum<P>;
    constexpr int kChannels = decltype(kernels)::kChannels;
    using Whole = WholeBackwardMemory<P, kChannels>;
    Backward call;
    call.in = call_of<T>(a, p);
    call.grad_out = read_only(grad_out, -1);
    call.grad_query = view_of(grad_query, grad_query.mutable_data_ptr(), packed ? 0 : -1);
    call.grad_key = view_of(key_home, key_home.mutable_data_ptr(), packed ? 1 : -1);
    call.grad_value = view_of(value_home, value_home.mutable_data_ptr(), packed ? 2 : -1);
    call.in.by_16_bytes = call.in.by_16_bytes && by_16_bytes<T>(call.grad_out, p.value_dim) &&
                          by_16_bytes<T>(call.grad_query, p.head_dim) &&
                          by_16_bytes<T>(call.grad_key, p.head_dim) &&
                          by_16_bytes<T>(call.grad_value, p.value_dim);
    call.windows_per_program = windows_per_program(p, device);
    const int64_t runs = runs_of(p, call.windows_per_program);
    bool whole = false;
    if constexpr (sizeof(Whole) <= kSharedBytes)
      whole = p.tokens() <= kTile && channels <= kChannels;
    const int64_t other_rows = whole ? runs : p.batch * p.windows() * tiles_of(p);
    Partials<Sum, Wide> partials(a, p, needs, runs, other_rows);
    partials.hand_to(call);
    MaybeTensor statistics;
    if constexpr (sizeof(Whole) <= kSharedBytes) {
      if (whole)
        device.launch(whole_window_backward<P, kChannels>, call, checked_blocks(runs * p.heads),
                      threads_for(p.tokens()), sizeof(Whole));
    }
    if (!whole) {
      statistics =
          sums_like<Sum>(a.query, {p.batch * p.windows(), p.heads, kStatistics, p.tokens()});
      call.statistics = statistics->mutable_data_ptr();
      launch_tiled<P, kTiledChannels<P>>(device, call, partials.bias.has_value(), runs * p.heads);
    }
    found = {grad_query,
             grad_key,
             grad_value,
             partials.of_bias(device),
             partials.of_table(device, call.in.bias),
             partials.of_pad_key(device),
             partials.template summed<Wide>(device, partials.pad_value, a.pad_value, other_rows,
                                            p.heads * p.value_dim),
             partials.template summed<Wide>(device, partials.logit_scale, a.logit_scale, other_rows,
                                            p.heads)};
  });
  return found;
}

}  // namespace
}  // namespace swin_kernels::cuda

#define SWIN_IMPLEMENT(library, key) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

SWIN_IMPLEMENT(SWIN_LIBRARY, SWIN_DISPATCH_KEY) {
  m.impl("cuda_backward", TORCH_BOX(&swin_kernels::cuda::cuda_backward));
}
