// A checked call turned into what the tiles read.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace swin_kernels::cpu {

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

// f(a number of the dtype).
template <class F>
void as_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16());
    case ScalarType::Int:
      return f(int32_t());
    case ScalarType::Long:
      return f(int64_t());
    default:
      STD_TORCH_CHECK(false, "swin_kernels: unexpected dtype");
  }
}

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

template <class T>
Operands operands_of(const Arguments& a, const Problem& p, int64_t lanes, Buffers<T>& buffers);

extern template Operands operands_of<float>(const Arguments&, const Problem&, int64_t,
                                            Buffers<float>&);
extern template Operands operands_of<double>(const Arguments&, const Problem&, int64_t,
                                             Buffers<double>&);

}  // namespace swin_kernels::cpu
