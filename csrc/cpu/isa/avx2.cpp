// The kernels for AVX2; chosen at run time, so only this file is compiled for it.
#if defined(__x86_64__)
#define SWIN_ISA avx2
#define SWIN_TARGET "avx2,fma,f16c"
#define SWIN_VECTOR_BYTES 32
#include "cpu/isa/std.h"

#include "cpu/isa/kernels.inc"

namespace swin_kernels::cpu {
constexpr Kernels kAvx2 = avx2::kernels("avx2");
}
#endif
