// Gradients that are sums over windows, from the sums of chunks.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/pack_operands.h"

namespace swin_kernels::cpu {

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
  Tensor t = torch::stable::empty(shape_of(like), like.scalar_type());
  as_dtype(like.scalar_type(), [&]<class To>(To) {
    To* data = static_cast<To*>(t.mutable_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) data[i] = static_cast<To>(value(i));
  });
  return t;
}

// From a bias's gradient (H, keys, queries rounded up to `width`) that of a bias (H, N, N).
template <class T>
Tensor bias_gradient(const Tensor& like, const Numbers<T>& bias, int64_t n, int64_t width) {
  return filled_like(like, [&](int64_t i) {  // (H, queries, keys) from (H, keys, queries)
    return bias[(i / (n * n) * n + i % n) * width + i / n % n];
  });
}

// From the same that of a table (rows, H).
template <class T>
Tensor table_gradient(const Tensor& like, const Numbers<T>& bias, const std::vector<int32_t>& index,
                      const Problem& p, int64_t width) {
  const std::vector<T> table = summed_to_table(bias, index, p, width, like.size(0));
  return filled_like(like, [&](int64_t i) { return table[size_t(i)]; });
}

}  // namespace swin_kernels::cpu
