// The native ops on CPU tensors: which kernels, which buffers, which threads. The arithmetic is in
// the tiles.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/pack_operands.h"

namespace swin_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;

const Kernels& choose_kernels() {
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");  // torch's own override
  const bool below_512 =
      wish != nullptr && (!std::strcmp(wish, "avx2") || !std::strcmp(wish, "default"));
  const bool below_256 = wish != nullptr && !std::strcmp(wish, "default");
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!below_512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  // every AVX2 processor converts fp16 too; not every compiler can ask for it
  if (!below_256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

// The kernels of tokens of one dtype.
const Kernels& kernels(Element element) {
  static const Kernels& chosen = choose_kernels();
#if defined(__x86_64__)
  static const bool multiplies_bfloat16 =
      &chosen == &kAvx512 && __builtin_cpu_supports("avx512bf16");
  if (element == Element::kBFloat16 && multiplies_bfloat16) return kAvx512Bfloat16;
#endif
  return chosen;
}

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
  call.out = view_of(out);
  const auto run = kernels(element).forward[int(element)];
  torch::stable::parallel_for(0, p.batch * p.windows() * p.heads, 1,
                              [&](int64_t begin, int64_t end) { run(call, begin, end); });
  return out;
}

// Sums over chunks, added up in order: (chunks, n) -> (n).
template <class T>
Numbers<T> summed(const Numbers<T>& partials, int64_t chunks, int64_t n) {
  Numbers<T> total(n);
  torch::stable::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    std::fill(&total[begin], &total[begin] + (end - begin), T(0));
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) total[i] += partials[c * n + i];
  });
  return total;
}

// The gradient of a bias (H, keys, queries rounded up to `width`) summed into its table (rows, H).
template <class T>
std::vector<T> summed_to_table(const Numbers<T>& bias, const std::vector<int32_t>& index,
                               const Problem& p, int64_t width, int64_t rows) {
  const int64_t n = p.tokens();
  std::vector<T> table(size_t(rows * p.heads));
  torch::stable::parallel_for(0, p.heads, heads_at_once(n), [&](int64_t begin, int64_t end) {
    std::vector<T> column(static_cast<size_t>(rows));
    for (int64_t h = begin; h < end; ++h) {
      std::fill(column.begin(), column.end(), T(0));
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < n; ++i)
          column[size_t(index[size_t(j * n + i)])] += bias[(h * n + j) * width + i];
      for (int64_t r = 0; r < rows; ++r) table[size_t(r * p.heads + h)] = column[size_t(r)];
    }
  });
  return table;
}

// A contiguous tensor like `like`, of value(row-major position).
template <class F>
Tensor filled_like(const Tensor& like, const F& value) {
  Tensor t = empty_tensor(shape_of(like), like.scalar_type());
  as_dtype(like.scalar_type(), [&]<class To>(To) {
    To* data = static_cast<To*>(t.mutable_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) data[i] = static_cast<To>(value(i));
  });
  return t;
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
  const auto grad_bias = [&] {
    return filled_like(*a.bias, [&](int64_t i) {  // (H, queries, keys) from (H, keys, queries)
      return bias[(i / (n * n) * n + i % n) * width + i / n % n];
    });
  };
  const auto grad_table = [&] {
    const std::vector<T> table =
        summed_to_table(bias, buffers.bias_index, p, width, a.bias_table->size(0));
    return filled_like(*a.bias_table, [&](int64_t i) { return table[size_t(i)]; });
  };
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
          wants_bias ? grad_bias() : empty_tensor({0}, dtype),
          wants_table ? grad_table() : empty_tensor({0}, dtype),
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
