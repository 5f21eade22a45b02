// The native ops on CPU tensors: which kernels, which buffers, which threads. The arithmetic is in
// the tiles.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/partial_sums.h"

namespace swin_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;

std::string cpu_capability() { return kernels(Element::kFloat).name; }

Tensor empty_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

template <class T>
Tensor forward_as(const Arguments& a, const Problem& p) {
  const Element element = element_of(a.query);
  Tensor out = empty_tensor(output_shape(a), a.query.scalar_type());
  if (p.batch == 0) return out;
  Buffers<T> buffers;
  Forward call;
  call.in = operands_of(a, p, kernels(element).vector_bytes / int64_t(sizeof(T)), buffers);
  call.in.tokens = views_of(a);
  call.out = view_of(out);
  const auto run = kernels(element).forward[int(element)];
  torch::stable::parallel_for(0, p.batch * p.windows() * p.heads, 1,
                              [&](int64_t begin, int64_t end) { run(call, begin, end); });
  return out;
}

// How the backward is cut into tasks: a function of the problem alone, so that the sums do not
// depend on the threads. Enough tasks for many threads, and windows enough in each that clearing
// and adding up the partial sums stays cheap.
void share_out(Backward& call, int64_t bytes_per_chunk) {
  constexpr int64_t kTasks = 64, kWindows = 8, kPartialBytes = 32 << 20;
  const Problem& p = call.in.problem;
  const int64_t windows = p.batch * p.windows();
  const int64_t most = kPartialBytes / std::max<int64_t>(bytes_per_chunk, 1);
  const int64_t chunks =
      std::clamp<int64_t>(std::min(parts_of(windows, kWindows), most), 1, kTasks);
  call.windows_per_chunk = std::max<int64_t>(1, parts_of(windows, chunks));
  call.heads_per_task = parts_of(p.heads, std::min(p.heads, parts_of(kTasks, chunks)));
}

// The heads whose pad_key is a zero vector that `holds_pad_key` is about.
template <class T>
std::vector<bool> rows_held_finite(const Arguments& a, const std::vector<T>& pad_key,
                                   const Problem& p) {
  std::vector<bool> held(size_t(p.heads), false);
  for (int64_t h = 0; holds_pad_key(a) && h < p.heads; ++h) {
    T squares = 0;
    for (int64_t c = 0; c < p.head_dim; ++c)
      squares += pad_key[size_t(h * p.head_dim + c)] * pad_key[size_t(h * p.head_dim + c)];
    held[size_t(h)] = std::sqrt(squares) <= T(kNormClamp);
  }
  return held;
}

template <class T>
Gradients backward_as(const Tensor& grad_out, const Arguments& a, const Problem& p, int64_t needs) {
  const ScalarType dtype = a.query.scalar_type();
  const Element element = element_of(a.query);
  const int64_t lanes = kernels(element).vector_bytes / int64_t(sizeof(T)), n = p.tokens();
  const int64_t width = parts_of(n, lanes) * lanes;
  const bool wants_bias = needed(needs, kNeedsBias, a.bias);
  const bool wants_table = needed(needs, kNeedsTable, a.bias_table);

  Buffers<T> buffers;
  Backward call;
  call.in = operands_of(a, p, lanes, buffers);
  call.in.tokens = views_of(a);
  call.grad_out = read_only(grad_out);
  const TokenGradients grad(a);
  call.grad = grad.views;

  const int64_t windows = p.batch * p.windows();
  const int64_t bias_size = wants_bias || wants_table ? n * width : 0;
  share_out(call, p.heads * bias_size * int64_t(sizeof(T)));
  const int64_t chunks = parts_of(windows, call.windows_per_chunk);
  const auto partial = [&]<class Sum>(Sum, bool wanted, int64_t size, void*& pointer) {
    Numbers<Sum> sums(wanted ? chunks * p.heads * size : 0);
    pointer = sums.data();
    return sums;
  };
  const bool wants_pad_key = needed(needs, kNeedsPadKey, a.pad_key);
  const bool wants_pad_value = needed(needs, kNeedsPadValue, a.pad_value);
  const bool wants_logit_scale = needed(needs, kNeedsLogitScale, a.logit_scale);
  const Numbers<T> biases = partial(T(), bias_size > 0, bias_size, call.partial_bias);
  const Numbers<double> pad_keys =
      partial(double(), wants_pad_key, p.head_dim, call.partial_pad_key);
  const Numbers<double> pad_values =
      partial(double(), wants_pad_value, p.value_dim, call.partial_pad_value);
  const Numbers<double> logit_scales =
      partial(double(), wants_logit_scale, 1, call.partial_logit_scale);

  const auto run = kernels(element).backward[int(element)];
  torch::stable::parallel_for(0, chunks * call.head_groups(), 1,
                              [&](int64_t begin, int64_t end) { run(call, begin, end); });

  const Numbers<T> bias = summed(biases, chunks, p.heads * bias_size);
  const auto finish = [&](bool wanted, const MaybeTensor& like, const auto& partials, int64_t size,
                          const auto& element) {
    if (!wanted) return empty_tensor({0}, dtype);
    const auto total = summed(partials, chunks, p.heads * size);
    return filled_like(*like, [&](int64_t i) { return element(total, i); });
  };
  const auto as_it_is = [](const auto& total, int64_t i) { return total[i]; };
  const std::vector<bool> held = rows_held_finite(a, buffers.pad_key, p);
  return {grad.query,
          grad.key,
          grad.value,
          wants_bias ? bias_gradient(*a.bias, bias, n, width) : empty_tensor({0}, dtype),
          wants_table ? table_gradient(*a.bias_table, bias, buffers.bias_index, p, width)
                      : empty_tensor({0}, dtype),
          finish(wants_pad_key, a.pad_key, pad_keys, p.head_dim,
                 [&](const auto& total, int64_t i) {
                   const double x = total[i];
                   return held[size_t(i / p.head_dim)] ? std::clamp(x, -65504.0, 65504.0) : x;
                 }),
          finish(wants_pad_value, a.pad_value, pad_values, p.value_dim, as_it_is),
          finish(wants_logit_scale, a.logit_scale, logit_scales, 1, as_it_is)};
}

Tensor window_attention_forward(SWIN_PARAMETERS, bool /*allow_tf32*/) {
  const Arguments a SWIN_ARGUMENTS;
  const Problem p = checked_problem(a);
  return element_of(query) == Element::kDouble ? forward_as<double>(a, p) : forward_as<float>(a, p);
}

Gradients window_attention_backward(Tensor grad_out, SWIN_PARAMETERS, bool /*allow_tf32*/,
                                    int64_t needs) {
  const Arguments a SWIN_ARGUMENTS;
  const Problem p = checked_problem(a);
  check_grad_out(grad_out, a);
  return element_of(query) == Element::kDouble ? backward_as<double>(grad_out, a, p, needs)
                                               : backward_as<float>(grad_out, a, p, needs);
}

}  // namespace
}  // namespace swin_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(swin_kernels, CPU, m) {
  m.impl("window_attention_forward", TORCH_BOX(&swin_kernels::cpu::window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&swin_kernels::cpu::window_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&swin_kernels::cpu::cpu_capability));
}
