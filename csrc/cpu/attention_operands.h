// What the tiles of attention read.
#pragma once

#include <cstdint>

#include "window_geometry.h"

namespace swin_kernels::cpu {

// Everything a tile reads. Sums are in double for double tokens, else in float: `Sum` below.
// Pointers to void hold Sum; they are null where the call has no such operand.
struct Operands {
  Problem problem;
  TokenViews tokens;
  const void* bias = nullptr;         // (H, keys, queries rounded up to lanes)
  FloatView mask;                     // (nW, N, N)
  const void* pad_key = nullptr;      // (H, D)
  const void* pad_value = nullptr;    // (H, Dv)
  const void* logit_scale = nullptr;  // (H,): cosine attention
  double mask_value = 0, scale = 1;
  double dropout_p = 0;
  uint64_t dropout_seed = 0;
};

}  // namespace swin_kernels::cpu
