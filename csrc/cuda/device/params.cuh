// Parameters of the kernels: plain structs, passed by value.
#pragma once

#include "window_geometry.h"

namespace swin_kernels::cuda {

enum class BiasKind : int { kNone = 0, kDense = 1, kTable = 2, kIndexedTable = 3 };

struct Bias {
  BiasKind kind = BiasKind::kNone;
  FloatView numbers;  // (H, N, N), or a table (T, H)
  int64_t rows = 0;   // T
  const void* index = nullptr;
  bool index_is_64_bits = false;
  int64_t index_stride[2] = {0, 0};  // (N, N)

  SWIN_HOST_DEVICE int64_t row_of(int64_t i, int64_t j) const {
    const int64_t at = i * index_stride[0] + j * index_stride[1];
    return index_is_64_bits ? static_cast<const int64_t*>(index)[at]
                            : static_cast<const int32_t*>(index)[at];
  }
};

struct Call {
  Problem problem;
  TokenViews tokens;
  Bias bias;
  FloatView mask;         // (nW, N, N)
  FloatView pad_key;      // (H, D)
  FloatView pad_value;    // (H, Dv)
  FloatView logit_scale;  // (H,): cosine attention
  const int64_t* dropout_seed = nullptr;
  uint64_t dropout_threshold = 0;  // of 2^32: a probability is dropped below it
  double kept_factor = 1;
  double mask_value = 0, scale = 1;
  bool by_16_bytes =
      false;  // every row of channels begins at such an address and fills such pieces
};

struct Forward {
  Call in;
  TokenView out;
  int64_t windows_per_program = 1;
};

// Sums over windows go to rows of partial sums, one a program, and are added up after in order.
struct Backward {
  Call in;
  TokenView grad_out;
  TokenViews grad;
  int64_t windows_per_program = 1;
  void* statistics = nullptr;           // (W, H, kStatistics, N): of windows in several tiles
  void* partial_bias = nullptr;         // (runs, H, N, N)
  void* partial_pad_key = nullptr;      // (runs, H, D)
  void* partial_pad_value = nullptr;    // (runs, H, Dv)
  void* partial_logit_scale = nullptr;  // (runs, H)
};

}  // namespace swin_kernels::cuda
