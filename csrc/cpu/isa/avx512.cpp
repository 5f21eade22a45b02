// The kernels for AVX512; chosen at run time, so only this file is compiled for it.
#if defined(__x86_64__)
#define SWIN_ISA avx512
#define SWIN_TARGET "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"
#define SWIN_VECTOR_BYTES 64
#include "cpu/isa/std.h"

#include "cpu/isa/kernels.inc"

namespace swin_kernels::cpu {
constexpr Kernels kAvx512 = avx512::kernels("avx512");
}
#endif
