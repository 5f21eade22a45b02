// The kernels for AVX512; chosen at run time, so only this file is compiled for it.
#if defined(__x86_64__)
#define SWIN_ISA avx512
#define SWIN_VECTOR_BYTES 64
#define SWIN_COLUMN_VECTORS 4
#define SWIN_F16C 1
#include "cpu/isa/std.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

#include "cpu/isa/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace swin_kernels::cpu {
constexpr Kernels kAvx512 = avx512::kernels("avx512");
}
#endif
