// A call of the native ops as the dispatcher hands it over, and its checks: for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "window_geometry.h"

namespace swin_kernels {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The arguments of both ops, in the order of their schemas.
struct Arguments {
  const Tensor& query;
  const MaybeTensor &key, &value, &bias, &bias_table, &bias_index, &mask, &pad_key, &pad_value,
      &logit_scale, &dropout_seed;
  const std::vector<int64_t>&window_size, &shift_size;
  const std::vector<bool>& periodic;
  bool roll_then_pad;
  double mask_value, scale, dropout_p;

  bool packed() const { return !key.has_value(); }
};

// The parameters of the forward op, and of the backward op after grad_out; what makes Arguments of
// them.
#define SWIN_PARAMETERS                                                                       \
  Tensor query, MaybeTensor key, MaybeTensor value, MaybeTensor bias, MaybeTensor bias_table, \
      MaybeTensor bias_index, MaybeTensor mask, MaybeTensor pad_key, MaybeTensor pad_value,   \
      MaybeTensor logit_scale, MaybeTensor dropout_seed, std::vector<int64_t> window_size,    \
      std::vector<int64_t> shift_size, std::vector<bool> periodic, bool roll_then_pad,        \
      double mask_value, double scale, double dropout_p
#define SWIN_ARGUMENTS                                                          \
  {query,      key,      value,         bias,        bias_table,   bias_index,  \
   mask,       pad_key,  pad_value,     logit_scale, dropout_seed, window_size, \
   shift_size, periodic, roll_then_pad, mask_value,  scale,        dropout_p}

// What the backward op returns, in the order of its schema.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bits of `needs`, as swin_kernels.problem.NEEDS: the gradients that cost extra work.
constexpr int64_t kNeedsBias = 1, kNeedsTable = 2, kNeedsPadKey = 4, kNeedsPadValue = 8,
                  kNeedsLogitScale = 16;

inline bool needed(int64_t needs, int64_t bit, const MaybeTensor& t) {
  return (needs & bit) != 0 && t.has_value();
}

// Throws, with what came and what was expected, before anything is computed.
Problem checked_problem(const Arguments& a);

// The same for tokens of so many heads and channels in maps of `size`, whatever tensor holds them.
Problem checked_problem(const Arguments& a, int64_t batch, const std::vector<int64_t>& size,
                        int64_t heads, int64_t head_dim, int64_t value_dim);

void check_grad_out(const Tensor& grad_out, const Arguments& a);

Element element_of(const Tensor& t);

// A tensor (B, *S, H, D); kernels only read what is given as const.
TokenView view_of(const Tensor& t);
TokenView read_only(const Tensor& t);

TokenViews views_of(const Arguments& a);

// The tensors that the gradients of the tokens are written to, those of key and value empty for a
// packed query, and where each lies in them.
struct TokenGradients {
  Tensor query, key, value;
  TokenViews views;

  explicit TokenGradients(const Arguments& a);
};

// Whether the gradient of a pad_key that is a zero vector may be more than its dtype holds: inf
// would turn into NaN against the zero token behind it. For fp16 in cosine attention.
bool holds_pad_key(const Arguments& a);

FloatView float_view(const MaybeTensor& t);

// Rows of a table of all relative positions in a window.
int64_t table_length(const Problem& p);

std::vector<int64_t> shape_of(const Tensor& t);

// (B, *S, H, Dv)
std::vector<int64_t> output_shape(const Arguments& a);

}  // namespace swin_kernels
