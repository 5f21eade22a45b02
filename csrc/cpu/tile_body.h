// The kernels of one instruction set, in a namespace of its own: included once by each
// tile_<isa>.cpp, which defines SWIN_ISA, SWIN_VECTOR_BYTES, SWIN_COLUMN_VECTORS and, where the
// processor converts fp16, SWIN_F16C. No include guard: each file includes it once.
namespace swin_kernels::cpu::SWIN_ISA {
namespace {

// in the order in which each uses the one before
#include "cpu/simd_body.h"

#include "cpu/tokens_body.h"

#include "cpu/product_body.h"

#include "cpu/softmax_body.h"

#include "cpu/forward_body.h"

#include "cpu/backward_body.h"

constexpr Kernels kernels(const char* name) {
  return {name,
          SWIN_VECTOR_BYTES,
          {&forward<float>, &forward<double>, &forward<Half>, &forward<BFloat16>},
          {&backward<float>, &backward<double>, &backward<Half>, &backward<BFloat16>}};
}

}  // namespace
}  // namespace swin_kernels::cpu::SWIN_ISA
