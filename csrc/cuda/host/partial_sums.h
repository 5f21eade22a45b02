// Sums over windows: the tensors that the kernels write rows of, and the second passes over them.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/host/launch_params.h"
#include "cuda/host/run.h"

namespace swin_kernels::cuda {

template <class Sum>
Tensor sums_like(const Tensor& like, std::vector<int64_t> shape) {
  using torch::headeronly::ScalarType;
  return torch::stable::new_empty(like, shape,
                                  sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float);
}

// The sum of (rows, numbers) over its rows, to `to`.
template <class Sum>
void add_up(const Device& device, Tensor partial, const Tensor& to, RowSum call) {
  constexpr int kThreads = 128;
  const int64_t columns = parts_of<int64_t>(call.numbers, kThreads);
  while (true) {
    const int64_t groups = std::max<int64_t>(1, parts_of<int64_t>(call.rows, kRowsAtOnce));
    const Tensor next = groups > 1 ? sums_like<Sum>(to, {groups, call.numbers}) : to;
    call.partial = partial.const_data_ptr();
    RowSum pass = call;
    pass.to = next.mutable_data_ptr();
    pass.element = element_of(next);
    if (groups > 1) pass.pad = FloatView();
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
  MaybeTensor bias, pad_key, pad_value, logit_scale;

  // `rows` of the bias's, `other_rows` of all others.
  Partials(const Arguments& a, const Problem& p, int64_t needs, int64_t rows, int64_t other_rows)
      : a(a), p(p) {
    const int64_t n = p.tokens();
    if (needed(needs, kNeedsBias, a.bias) || needed(needs, kNeedsTable, a.bias_table))
      bias = sums_like<Sum>(a.query, {rows, p.heads, n, n});
    if (needed(needs, kNeedsPadKey, a.pad_key))
      pad_key = sums_like<Wide>(a.query, {other_rows, p.heads, p.head_dim});
    if (needed(needs, kNeedsPadValue, a.pad_value))
      pad_value = sums_like<Wide>(a.query, {other_rows, p.heads, p.value_dim});
    if (needed(needs, kNeedsLogitScale, a.logit_scale))
      logit_scale = sums_like<Wide>(a.query, {other_rows, p.heads});
  }

  static void* data(MaybeTensor& x) { return x.has_value() ? x->mutable_data_ptr() : nullptr; }

  void hand_to(Backward& call) {
    call.partial_bias = data(bias);
    call.partial_pad_key = data(pad_key);
    call.partial_pad_value = data(pad_value);
    call.partial_logit_scale = data(logit_scale);
  }

  // Empty where either is not there.
  template <class S>
  Tensor summed(const Device& device, const MaybeTensor& partial, const MaybeTensor& like,
                FloatView pad = FloatView()) const {
    if (!partial.has_value() || !like.has_value()) return torch::stable::new_empty(a.query, {0});
    Tensor to = torch::stable::new_empty(*like, shape_of(*like));
    RowSum call;
    call.rows = partial->size(0);
    call.numbers = to.numel();
    call.pad = pad;
    call.pad_dim = p.head_dim;
    add_up<S>(device, *partial, to, call);
    return to;
  }

  Tensor of_bias(const Device& device) const { return summed<Sum>(device, bias, a.bias); }

  Tensor of_table(const Device& device, const Bias& description) const {
    if (!a.bias_table.has_value() || !bias.has_value())
      return torch::stable::new_empty(a.query, {0});
    const int64_t n = p.tokens();
    const MaybeTensor like = sums_like<Sum>(a.query, {p.heads, n, n});
    const Tensor dense = summed<Sum>(device, bias, like);
    Tensor to = torch::stable::new_empty(*a.bias_table, shape_of(*a.bias_table));
    TableGather call;
    call.dense = dense.const_data_ptr();
    call.to = to.mutable_data_ptr();
    call.element = element_of(to);
    call.bias = description;
    call.problem = p;
    constexpr int kWarps = 4;
    const int64_t blocks = parts_of<int64_t>(description.rows * p.heads, kWarps);
    device.launch(gather_table<Sum>, call, checked_blocks(blocks), kWarps * kWarp, 0);
    return to;
  }
};

}  // namespace swin_kernels::cuda
