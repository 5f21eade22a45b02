// The kernels for AVX512 with its bfloat16 products; those of other dtypes are AVX512's.
#if defined(__x86_64__)
#define SWIN_ISA avx512_bf16
#define SWIN_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"
#define SWIN_VECTOR_BYTES 64
#define SWIN_BFLOAT16 1
#include "cpu/isa/std.h"

#include "cpu/isa/kernels.inc"

namespace swin_kernels::cpu {
constexpr Kernels kAvx512Bfloat16 = avx512_bf16::bfloat16_kernels("avx512");
}
#endif
