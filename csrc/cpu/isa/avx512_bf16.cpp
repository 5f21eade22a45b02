// The kernels for AVX512 with its bfloat16 products; those of other dtypes are AVX512's.
#if defined(__x86_64__)
#define SWIN_ISA avx512_bf16
#define SWIN_VECTOR_BYTES 64
#define SWIN_COLUMN_VECTORS 4
#define SWIN_F16C 1
#define SWIN_BFLOAT16 1
#include "cpu/isa/std.h"

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#endif

#include "cpu/isa/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace swin_kernels::cpu {
constexpr Kernels kAvx512Bfloat16 = avx512_bf16::bfloat16_kernels("avx512");
}
#endif
