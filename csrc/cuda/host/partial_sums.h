// Sums over windows: the tensors that the kernels write rows of, and the second passes over them.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/host/launch_params.h"
#include "cuda/host/run.h"

namespace swin_kernels::cuda {

using torch::headeronly::ScalarType;

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

}  // namespace swin_kernels::cuda
