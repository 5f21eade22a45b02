#include "cpu/call.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <limits>
#include <string>

namespace swin_kernels::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

void expect_shape(const char* name, const MaybeTensor& t, const std::vector<int64_t>& shape) {
  if (!t.has_value()) return;
  bool same = t->dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t->size(int64_t(i)) == shape[i];
  std::string wanted = "(";
  for (size_t i = 0; i < shape.size(); ++i) wanted += (i ? ", " : "") + std::to_string(shape[i]);
  STD_TORCH_CHECK(same, "swin_kernels: ", name, ": expected shape ", wanted, "), got ",
                  shape_of(*t));
}

// f(index, value) over every element of a tensor of at most three axes, whatever its strides.
template <class From, class F>
void visit_as(const Tensor& t, int64_t first, int64_t last, const F& f) {
  const int64_t n1 = t.dim() > 1 ? t.size(1) : 1, n2 = t.dim() > 2 ? t.size(2) : 1;
  const int64_t s0 = t.dim() > 0 ? t.stride(0) : 0, s1 = t.dim() > 1 ? t.stride(1) : 0;
  const int64_t s2 = t.dim() > 2 ? t.stride(2) : 0;
  const From* data = static_cast<const From*>(t.const_data_ptr());
  for (int64_t i = first; i < last; ++i)
    for (int64_t j = 0; j < n1; ++j)
      for (int64_t k = 0; k < n2; ++k) f(i, j, k, data[i * s0 + j * s1 + k * s2]);
}

// The slices [first, last) of axis 0.
template <class F>
void visit(const Tensor& t, int64_t first, int64_t last, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return visit_as<float>(t, first, last, f);
    case ScalarType::Double:
      return visit_as<double>(t, first, last, f);
    case ScalarType::Half:
      return visit_as<Half>(t, first, last, f);
    case ScalarType::BFloat16:
      return visit_as<BFloat16>(t, first, last, f);
    case ScalarType::Int:
      return visit_as<int32_t>(t, first, last, f);
    case ScalarType::Long:
      return visit_as<int64_t>(t, first, last, f);
    default:
      STD_TORCH_CHECK(false, "swin_kernels: unexpected dtype");
  }
}

// What padding holds is a token like any other, so it is rounded to their dtype.
template <class T>
T rounded_to(Element element, T x) {
  if (element == Element::kHalf) return T(float(Half(float(x))));
  if (element == Element::kBFloat16) return T(float(BFloat16(float(x))));
  return element == Element::kFloat ? T(float(x)) : x;
}

template <class T>
std::vector<T> copy_of(const MaybeTensor& t, std::optional<Element> rounding = std::nullopt) {
  if (!t.has_value()) return {};
  std::vector<T> copy(size_t(t->numel()));
  const int64_t columns = t->dim() > 1 ? t->size(1) : 1;
  visit(*t, 0, t->size(0), [&](int64_t i, int64_t j, int64_t, auto x) {
    const T value = static_cast<T>(x);
    copy[size_t(i * columns + j)] = rounding ? rounded_to(*rounding, value) : value;
  });
  return copy;
}

// (keys, queries): the rows of the table, the caller's or the geometric ones.
std::vector<int32_t> bias_index_of(const Arguments& a, const Problem& p) {
  if (!a.bias_table.has_value()) return {};
  const int64_t n = p.tokens(), rows = a.bias_table->size(0);
  std::vector<int32_t> index(size_t(n * n));
  if (a.bias_index.has_value()) {
    int64_t low = 0, high = 0;
    visit(*a.bias_index, 0, n, [&](int64_t i, int64_t j, int64_t, auto x) {
      const int64_t row = static_cast<int64_t>(x);
      low = row < low ? row : low;
      high = row > high ? row : high;
      index[size_t(j * n + i)] = int32_t(row);
    });
    STD_TORCH_CHECK(low >= 0 && high < rows && rows <= std::numeric_limits<int32_t>::max(),
                    "swin_kernels: bias_index: expected rows of the table, 0 to ", rows - 1,
                    ", got ", low, " to ", high);
    return index;
  }
  // that of a query and a key is the difference of two numbers of tokens
  const int64_t stride1 = 2 * p.axis[2].window - 1, stride0 = (2 * p.axis[1].window - 1) * stride1;
  std::vector<int32_t> place;
  for (int64_t i0 = 0; i0 < p.axis[0].window; ++i0)
    for (int64_t i1 = 0; i1 < p.axis[1].window; ++i1)
      for (int64_t i2 = 0; i2 < p.axis[2].window; ++i2)
        place.push_back(int32_t(i0 * stride0 + i1 * stride1 + i2));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < n; ++i)
      index[size_t(j * n + i)] = place[size_t(i)] - place[size_t(j)] + place.back();
  return index;
}

// (H, keys, queries rounded up to lanes): a key a row, as the kernels keep their logits.
template <class T>
Numbers<T> bias_rows(const Arguments& a, const Problem& p, int64_t lanes,
                     const std::vector<int32_t>& index) {
  const int64_t n = p.tokens(), width = (n + lanes - 1) / lanes * lanes;
  if (!a.bias.has_value() && !a.bias_table.has_value()) return {};
  Numbers<T> rows(p.heads * n * width);
  const std::vector<T> table = copy_of<T>(a.bias_table);  // (T, H)
  torch::stable::parallel_for(0, p.heads, heads_at_once(n), [&](int64_t begin, int64_t end) {
    if (a.bias.has_value()) {
      visit(*a.bias, begin, end, [&](int64_t h, int64_t i, int64_t j, auto x) {
        rows[(h * n + j) * width + i] = static_cast<T>(x);
      });
    } else {
      std::vector<T> column(size_t(a.bias_table->size(0)));
      for (int64_t h = begin; h < end; ++h) {
        for (size_t t = 0; t < column.size(); ++t)
          column[t] = table[t * size_t(p.heads) + size_t(h)];
        for (int64_t j = 0; j < n; ++j)
          for (int64_t i = 0; i < n; ++i)
            rows[(h * n + j) * width + i] = column[size_t(index[size_t(j * n + i)])];
      }
    }
    for (int64_t row = begin * n; row < end * n; ++row)
      std::fill(&rows[row * width + n], &rows[row * width] + width, T(0));
  });
  return rows;
}

void check_tokens(const Arguments& a) {
  const Tensor& q = a.query;
  const int64_t axes = int64_t(a.window_size.size()), extra = a.packed() ? 1 : 0;
  STD_TORCH_CHECK(1 <= axes && axes <= kAxes && q.dim() == axes + 3 + extra,
                  "swin_kernels: expected ", 3 + extra, " axes beside 1 to 3 axes of windows, got ",
                  shape_of(q), " with ", axes, " axes of windows");
  STD_TORCH_CHECK(a.shift_size.size() == size_t(axes) && a.periodic.size() == size_t(axes),
                  "swin_kernels: expected window_size, shift_size and periodic of one length");
  STD_TORCH_CHECK(a.key.has_value() == a.value.has_value(),
                  "swin_kernels: expected both key and value, or neither");
  if (a.packed()) {
    STD_TORCH_CHECK(q.size(axes + 1) == 3, "swin_kernels: qkv: expected (B, *S, 3, H, D), got ",
                    shape_of(q));
    return;
  }
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < q.dim(); ++i) shape.push_back(q.size(i));
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
    STD_TORCH_CHECK(!t->has_value() || (*t)->is_cpu(),
                    "swin_kernels: expected every tensor on the CPU");
}

}  // namespace

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
  const int64_t axes = int64_t(a.window_size.size());
  Problem p;
  p.roll_then_pad = a.roll_then_pad;
  p.batch = a.query.size(0);
  p.heads = a.query.size(a.query.dim() - 2);
  p.head_dim = a.query.size(a.query.dim() - 1);
  p.value_dim = a.packed() ? p.head_dim : a.value->size(a.value->dim() - 1);
  STD_TORCH_CHECK(p.heads > 0 && p.head_dim > 0 && p.value_dim > 0,
                  "swin_kernels: expected heads and channels");
  for (int64_t i = 0; i < axes; ++i) {
    Axis& axis = p.axis[kAxes - axes + i];
    axis.size = a.query.size(1 + i);
    axis.window = a.window_size[size_t(i)];
    axis.shift = a.shift_size[size_t(i)];
    axis.wraps = a.periodic[size_t(i)];
    STD_TORCH_CHECK(axis.window <= kMaxTokens, "swin_kernels: expected at most ", kMaxTokens,
                    " tokens in a window, got ", axis.window, " on one axis");
    STD_TORCH_CHECK(axis.size > 0 && axis.window > 0 && axis.shift >= 0 && axis.shift < axis.window,
                    "swin_kernels: expected tokens on each axis and 0 <= shift < window, got ",
                    axis.size, " tokens, window ", axis.window, ", shift ", axis.shift);
  }
  STD_TORCH_CHECK(p.tokens() <= kMaxTokens, "swin_kernels: expected at most ", kMaxTokens,
                  " tokens in a window, got ", p.tokens());
  check_extras(a, p);
  return p;
}

TokenView view_of(const Tensor& t, void* data, int part) {
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

template <class T>
Operands operands_of(const Arguments& a, const Problem& p, int64_t lanes, Buffers<T>& buffers) {
  const Element element = element_of(a.query);
  buffers.bias_index = bias_index_of(a, p);
  buffers.bias = bias_rows<T>(a, p, lanes, buffers.bias_index);
  buffers.pad_key = copy_of<T>(a.pad_key, element);
  buffers.pad_value = copy_of<T>(a.pad_value, element);
  buffers.logit_scale = copy_of<T>(a.logit_scale);
  Operands in;
  in.problem = p;
  const Tensor& key = a.packed() ? a.query : *a.key;
  const Tensor& value = a.packed() ? a.query : *a.value;
  // the tiles only read these
  in.query = view_of(a.query, const_cast<void*>(a.query.const_data_ptr()), a.packed() ? 0 : -1);
  in.key = view_of(key, const_cast<void*>(key.const_data_ptr()), a.packed() ? 1 : -1);
  in.value = view_of(value, const_cast<void*>(value.const_data_ptr()), a.packed() ? 2 : -1);
  in.bias = buffers.bias.data();
  in.pad_key = buffers.pad_key.empty() ? nullptr : buffers.pad_key.data();
  in.pad_value = buffers.pad_value.empty() ? nullptr : buffers.pad_value.data();
  in.logit_scale = buffers.logit_scale.empty() ? nullptr : buffers.logit_scale.data();
  if (a.mask.has_value())
    in.mask = {a.mask->const_data_ptr(), element_of(*a.mask), a.mask->stride(0), a.mask->stride(1),
               a.mask->stride(2)};
  in.mask_value = a.mask_value;
  in.scale = a.scale;
  in.dropout_p = a.dropout_p;
  if (a.dropout_p > 0)
    in.dropout_seed = uint64_t(*static_cast<const int64_t*>(a.dropout_seed->const_data_ptr()));
  return in;
}

template Operands operands_of<float>(const Arguments&, const Problem&, int64_t, Buffers<float>&);
template Operands operands_of<double>(const Arguments&, const Problem&, int64_t, Buffers<double>&);

}  // namespace swin_kernels::cpu
