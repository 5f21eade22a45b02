#include "arguments.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace swin_kernels {
namespace {

using torch::headeronly::ScalarType;

std::string written(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void expect_shape(const char* name, const MaybeTensor& t, const std::vector<int64_t>& shape) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(shape_of(*t) == shape, "swin_kernels: ", name, ": expected shape ",
                  written(shape), ", got ", written(shape_of(*t)));
}

bool on_device_of(const Tensor& t, const Tensor& other) {
  return t.is_cpu() == other.is_cpu() && t.is_cuda() == other.is_cuda() &&
         t.get_device() == other.get_device();
}

void check_tokens(const Arguments& a) {
  const Tensor& q = a.query;
  const int64_t axes = int64_t(a.window_size.size()), extra = a.packed() ? 1 : 0;
  STD_TORCH_CHECK(1 <= axes && axes <= kAxes && q.dim() == axes + 3 + extra,
                  "swin_kernels: expected ", 3 + extra, " axes beside 1 to 3 axes of windows, got ",
                  written(shape_of(q)), " with ", axes, " axes of windows");
  STD_TORCH_CHECK(a.shift_size.size() == size_t(axes) && a.periodic.size() == size_t(axes),
                  "swin_kernels: expected window_size, shift_size and periodic of one length");
  STD_TORCH_CHECK(a.key.has_value() == a.value.has_value(),
                  "swin_kernels: expected both key and value, or neither");
  if (a.packed()) {
    STD_TORCH_CHECK(q.size(axes + 1) == 3, "swin_kernels: qkv: expected (B, *S, 3, H, D), got ",
                    written(shape_of(q)));
    return;
  }
  std::vector<int64_t> shape = shape_of(q);
  expect_shape("key", a.key, shape);
  shape.back() = a.value->dim() > 0 ? a.value->size(a.value->dim() - 1) : 0;
  expect_shape("value", a.value, shape);
  STD_TORCH_CHECK(
      a.key->scalar_type() == q.scalar_type() && a.value->scalar_type() == q.scalar_type(),
      "swin_kernels: expected query, key and value of one dtype");
}

void check_extras(const Arguments& a, const Problem& p) {
  const int64_t n = p.tokens();
  expect_shape("bias", a.bias, {p.heads, n, n});
  expect_shape("bias_index", a.bias_index, {n, n});
  expect_shape("mask", a.mask, {p.windows(), n, n});
  expect_shape("pad_key", a.pad_key, {p.heads, p.head_dim});
  expect_shape("pad_value", a.pad_value, {p.heads, p.value_dim});
  expect_shape("logit_scale", a.logit_scale, {p.heads});
  expect_shape("dropout_seed", a.dropout_seed, {1});
  STD_TORCH_CHECK(!(a.bias.has_value() && a.bias_table.has_value()),
                  "swin_kernels: both bias and bias_table given");
  if (a.bias_table.has_value())
    expect_shape("bias_table", a.bias_table, {a.bias_table->size(0), p.heads});
  if (a.bias_table.has_value() && !a.bias_index.has_value())
    expect_shape("bias_table", a.bias_table, {table_length(p), p.heads});
  for (const MaybeTensor* t :
       {&a.bias, &a.bias_table, &a.mask, &a.pad_key, &a.pad_value, &a.logit_scale})
    if (t->has_value()) element_of(**t);
  if (a.bias_index.has_value())
    STD_TORCH_CHECK(a.bias_index->scalar_type() == ScalarType::Int ||
                        a.bias_index->scalar_type() == ScalarType::Long,
                    "swin_kernels: bias_index: expected int32 or int64");
  STD_TORCH_CHECK(a.dropout_p == 0 || (a.dropout_seed.has_value() &&
                                       a.dropout_seed->scalar_type() == ScalarType::Long),
                  "swin_kernels: expected an int64 dropout_seed with dropout_p > 0");
  for (const MaybeTensor* t : {&a.key, &a.value, &a.bias, &a.bias_table, &a.bias_index, &a.mask,
                               &a.pad_key, &a.pad_value, &a.logit_scale, &a.dropout_seed})
    STD_TORCH_CHECK(!t->has_value() || on_device_of(**t, a.query),
                    "swin_kernels: expected every tensor on the device of query");
}

// Spatial axes of `t` are its axes 1 … ; `part` picks query, key or value out of a packed tensor
// (B, *S, 3, H, D), −1 says that it is not packed.
TokenView part_of(const Tensor& t, void* data, int part) {
  const int64_t packed = part >= 0 ? 1 : 0, axes = t.dim() - 3 - packed;
  TokenView view;
  view.data = data;
  view.batch = t.stride(0);
  for (int64_t i = 0; i < axes; ++i) view.axis[kAxes - axes + i] = t.stride(1 + i);
  view.head = t.stride(t.dim() - 2);
  view.channel = t.stride(t.dim() - 1);
  if (packed)
    view.data = static_cast<char*>(data) + part * t.stride(axes + 1) * int64_t(t.element_size());
  return view;
}

TokenViews parts_of_packed(const Tensor& t, void* data) {
  return {part_of(t, data, 0), part_of(t, data, 1), part_of(t, data, 2)};
}

// Empty where `t` is not there.
Tensor empty_like(const MaybeTensor& t, const Tensor& query) {
  return torch::stable::empty(t.has_value() ? shape_of(*t) : std::vector<int64_t>{0},
                              query.scalar_type(), std::nullopt, query.device());
}

}  // namespace

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

std::vector<int64_t> output_shape(const Arguments& a) {
  if (!a.packed()) return shape_of(*a.value);
  std::vector<int64_t> shape = shape_of(a.query);
  shape.erase(shape.end() - 3);
  return shape;
}

int64_t table_length(const Problem& p) {
  return (2 * p.axis[0].window - 1) * (2 * p.axis[1].window - 1) * (2 * p.axis[2].window - 1);
}

Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "swin_kernels: expected float16, bfloat16, float32 or float64");
  }
}

Problem checked_problem(const Arguments& a) {
  element_of(a.query);
  check_tokens(a);
  const Tensor& q = a.query;
  std::vector<int64_t> size;
  for (size_t i = 0; i < a.window_size.size(); ++i) size.push_back(q.size(1 + int64_t(i)));
  const int64_t head_dim = q.size(q.dim() - 1);
  return checked_problem(a, q.size(0), size, q.size(q.dim() - 2), head_dim,
                         a.packed() ? head_dim : a.value->size(a.value->dim() - 1));
}

Problem checked_problem(const Arguments& a, int64_t batch, const std::vector<int64_t>& size,
                        int64_t heads, int64_t head_dim, int64_t value_dim) {
  const int64_t axes = int64_t(size.size());
  Problem p;
  p.roll_then_pad = a.roll_then_pad;
  p.batch = batch;
  p.heads = heads;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  STD_TORCH_CHECK(p.heads > 0 && p.head_dim > 0 && p.value_dim > 0,
                  "swin_kernels: expected heads and channels");
  STD_TORCH_CHECK(a.window_size.size() == size.size() && a.shift_size.size() == size.size() &&
                      a.periodic.size() == size.size(),
                  "swin_kernels: expected window_size, shift_size and periodic for ", axes,
                  " axes");
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t tokens = size[size_t(i)], window = a.window_size[size_t(i)];
    const int64_t shift = a.shift_size[size_t(i)];
    STD_TORCH_CHECK(window <= kMaxTokens, "swin_kernels: expected at most ", kMaxTokens,
                    " tokens in a window, got ", window, " on one axis");
    STD_TORCH_CHECK(tokens > 0 && window > 0 && shift >= 0 && shift < window,
                    "swin_kernels: expected tokens on each axis and 0 <= shift < window, got ",
                    tokens, " tokens, window ", window, ", shift ", shift);
    p.axis[kAxes - axes + i] = Axis::of(tokens, window, shift, a.periodic[size_t(i)]);
  }
  STD_TORCH_CHECK(p.tokens() <= kMaxTokens, "swin_kernels: expected at most ", kMaxTokens,
                  " tokens in a window, got ", p.tokens());
  check_extras(a, p);
  return p;
}

void check_grad_out(const Tensor& grad_out, const Arguments& a) {
  STD_TORCH_CHECK(shape_of(grad_out) == output_shape(a) &&
                      grad_out.scalar_type() == a.query.scalar_type() &&
                      on_device_of(grad_out, a.query),
                  "swin_kernels: grad_out: expected the shape, dtype and device of the output");
}

TokenView view_of(const Tensor& t) { return part_of(t, t.mutable_data_ptr(), -1); }
TokenView read_only(const Tensor& t) {
  return part_of(t, const_cast<void*>(t.const_data_ptr()), -1);
}

TokenViews views_of(const Arguments& a) {
  if (!a.packed()) return {read_only(a.query), read_only(*a.key), read_only(*a.value)};
  return parts_of_packed(a.query, const_cast<void*>(a.query.const_data_ptr()));
}

TokenGradients::TokenGradients(const Arguments& a)
    : query(empty_like(a.query, a.query)),
      key(empty_like(a.key, a.query)),
      value(empty_like(a.value, a.query)),
      views(a.packed() ? parts_of_packed(query, query.mutable_data_ptr())
                       : TokenViews{view_of(query), view_of(key), view_of(value)}) {}

bool holds_pad_key(const Arguments& a) {
  return a.logit_scale.has_value() && a.pad_key.has_value() &&
         element_of(*a.pad_key) == Element::kHalf;
}

FloatView float_view(const MaybeTensor& t) {
  FloatView view;
  if (!t.has_value()) return view;
  view.data = t->const_data_ptr();
  view.element = element_of(*t);
  for (int64_t i = 0; i < t->dim(); ++i) view.stride[i] = t->stride(i);
  return view;
}

}  // namespace swin_kernels
