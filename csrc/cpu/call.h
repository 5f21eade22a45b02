// A call of the native ops as the dispatcher hands it over, checked and turned into what the tiles
// read.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/tile.h"

namespace swin_kernels::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The arguments of both ops, in the order of their schemas (registration.cpp).
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

// Numbers in memory that torch's allocator knows of, so that its record of what a call holds is
// whole. They begin with whatever lies there.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(int64_t count) {
    if (count == 0) return;
    memory_ =
        torch::stable::empty({count * int64_t(sizeof(T))}, torch::headeronly::ScalarType::Byte);
    data_ = static_cast<T*>(memory_->mutable_data_ptr());
  }

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  MaybeTensor memory_;
  T* data_ = nullptr;
};

// What a call's operands point into.
template <class T>
struct Buffers {
  Numbers<T> bias;
  std::vector<T> pad_key, pad_value, logit_scale;
  std::vector<int32_t> bias_index;
};

// Heads whose (N, N) biases are little enough work for one thread: waking another takes longer.
inline int64_t heads_at_once(int64_t tokens) {
  constexpr int64_t kNumbers = 1 << 15;
  return tokens * tokens < kNumbers ? kNumbers / (tokens * tokens) : 1;
}

// Throws, with what came and what was expected, before anything is computed.
Problem checked_problem(const Arguments& a);

Element element_of(const Tensor& t);

// Spatial axes of `t` are its axes 1 … ; `part` picks query, key or value out of a packed tensor
// (B, *S, 3, H, D), −1 says that it is not packed.
TokenView view_of(const Tensor& t, void* data, int part);

template <class T>
Operands operands_of(const Arguments& a, const Problem& p, int64_t lanes, Buffers<T>& buffers);

extern template Operands operands_of<float>(const Arguments&, const Problem&, int64_t,
                                            Buffers<float>&);
extern template Operands operands_of<double>(const Arguments&, const Problem&, int64_t,
                                             Buffers<double>&);

// Rows of a table of all relative positions in a window.
int64_t table_length(const Problem& p);

}  // namespace swin_kernels::cpu
