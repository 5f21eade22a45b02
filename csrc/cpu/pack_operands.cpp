#include "cpu/pack_operands.h"

#include <limits>
#include <string>

namespace swin_kernels::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// f(index, value) over the slices [first, last) of axis 0 of a tensor of at most three axes,
// whatever its strides.
template <class F>
void visit(const Tensor& t, int64_t first, int64_t last, const F& f) {
  const int64_t n1 = t.dim() > 1 ? t.size(1) : 1, n2 = t.dim() > 2 ? t.size(2) : 1;
  const int64_t s0 = t.dim() > 0 ? t.stride(0) : 0, s1 = t.dim() > 1 ? t.stride(1) : 0;
  const int64_t s2 = t.dim() > 2 ? t.stride(2) : 0;
  as_dtype(t.scalar_type(), [&]<class From>(From) {
    const From* data = static_cast<const From*>(t.const_data_ptr());
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < n1; ++j)
        for (int64_t k = 0; k < n2; ++k) f(i, j, k, data[i * s0 + j * s1 + k * s2]);
  });
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
  const int64_t n = p.tokens(), width = parts_of(n, lanes) * lanes;
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

}  // namespace

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
  in.bias = buffers.bias.data();
  in.pad_key = buffers.pad_key.empty() ? nullptr : buffers.pad_key.data();
  in.pad_value = buffers.pad_value.empty() ? nullptr : buffers.pad_value.data();
  in.logit_scale = buffers.logit_scale.empty() ? nullptr : buffers.logit_scale.data();
  in.mask = float_view(a.mask);
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
