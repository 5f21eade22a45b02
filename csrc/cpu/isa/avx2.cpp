// The kernels for AVX2; chosen at run time, so only this file is compiled for it.
#if defined(__x86_64__)
#define SWIN_ISA avx2
#define SWIN_VECTOR_BYTES 32
#define SWIN_COLUMN_VECTORS 2
#define SWIN_F16C 1
#include "cpu/isa/std.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/isa/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace swin_kernels::cpu {
constexpr Kernels kAvx2 = avx2::kernels("avx2");
}
#endif
