// The kernels of one instruction set, in a namespace of its own: included once by each
// tile_<isa>.cpp, which defines SWIN_ISA, SWIN_VECTOR_BYTES, SWIN_COLUMN_VECTORS and, where the
// processor converts fp16, SWIN_F16C, and where it multiplies bfloat16, SWIN_BFLOAT16. No include
// guard: each file includes it once.
namespace swin_kernels::cpu::SWIN_ISA {
namespace {

// in the order in which each uses the one before
#include "cpu/simd_body.h"

#include "cpu/elements_body.h"

#include "cpu/window_body.h"

#include "cpu/rows_body.h"

#include "cpu/ahead_body.h"

#include "cpu/product_body.h"

#include "cpu/factors_body.h"

#include "cpu/softmax_body.h"

#include "cpu/forward_body.h"

#include "cpu/backward_body.h"

#if defined(SWIN_BFLOAT16)
// Unit vectors of cosine attention are normalised and multiplied in float.
void forward_pairs(const Forward& call, int64_t begin, int64_t end) {
  if (call.in.logit_scale == nullptr) return forward<BFloat16, Pairs>(call, begin, end);
  forward<BFloat16>(call, begin, end);
}

void backward_pairs(const Backward& call, int64_t begin, int64_t end) {
  if (call.in.logit_scale == nullptr) return backward<BFloat16, Pairs>(call, begin, end);
  backward<BFloat16>(call, begin, end);
}

// Those of bfloat16 alone.
constexpr Kernels bfloat16_kernels(const char* name) {
  return {name,
          SWIN_VECTOR_BYTES,
          {nullptr, nullptr, nullptr, &forward_pairs},
          {nullptr, nullptr, nullptr, &backward_pairs}};
}
#else
constexpr Kernels kernels(const char* name) {
  return {name,
          SWIN_VECTOR_BYTES,
          {&forward<float>, &forward<double>, &forward<Half>, &forward<BFloat16>},
          {&backward<float>, &backward<double>, &backward<Half>, &backward<BFloat16>}};
}
#endif

}  // namespace
}  // namespace swin_kernels::cpu::SWIN_ISA
