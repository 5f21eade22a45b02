// What the kernels ask of a GPU beside plain C++, as PTX. Compiled for the host, the same names
// come from tests/support/cuda/emulator.h, which runs a block's threads one after another.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A kernel of at most so many threads, so many blocks of which share a multiprocessor.
#define SWIN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Where a multiprocessor has 228 KB of shared memory; elsewhere it has 164, or 100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define SWIN_LARGE_SHARED true
#else
#define SWIN_LARGE_SHARED false
#endif
#define SWIN_PARAMETER const __grid_constant__
#define SWIN_DEVICE __device__ __forceinline__

namespace swin_kernels::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

SWIN_DEVICE int thread_index() { return int(threadIdx.x); }
SWIN_DEVICE int block_threads() { return int(blockDim.x); }
SWIN_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }

SWIN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

SWIN_DEVICE void block_barrier() { __syncthreads(); }
SWIN_DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
SWIN_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
}

SWIN_DEVICE float to_float(float x) { return x; }
SWIN_DEVICE double to_float(double x) { return x; }
SWIN_DEVICE float to_float(Half x) { return __half2float(x); }
SWIN_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }

template <class T, class Sum>
SWIN_DEVICE T rounded(Sum x) {
  if constexpr (std::is_same_v<T, Half>)
    return __float2half_rn(float(x));
  else if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(float(x));
  else
    return T(x);
}

// Two neighbours in one register, the first in its low half.
template <class T>
SWIN_DEVICE uint32_t packed(float first, float second) {
  const auto pair = [&] {
    if constexpr (std::is_same_v<T, Half>)
      return __floats2half2_rn(first, second);
    else
      return __floats2bfloat162_rn(first, second);
  }();
  return reinterpret_cast<const uint32_t&>(pair);
}

SWIN_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

SWIN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SWIN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8×8 matrices of 2 bytes: lane l names row l % 8 of matrix l / 8, 16 bytes in shared memory,
// and gets its elements (l / 4, 2·(l % 4)) and the next of each.
SWIN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
SWIN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#define SWIN_MMA(variant)                                                \
  asm("mma.sync.aligned." variant                                        \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c (16×8) += a · b of numbers T: a (16×16), b (16×8), or of float, rounded to TF32, a (16×8), b
// (8×8); who holds which element is in fragments.cuh.
template <class T>
SWIN_DEVICE void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>)
    SWIN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else if constexpr (std::is_same_v<T, BFloat16>)
    SWIN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    SWIN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

// 16 bytes on their way to shared memory; there after `wait_for_copies` and a barrier.
SWIN_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// Ends a group of copies.
SWIN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Groups` of the thread's own groups are under way.
template <int Groups>
SWIN_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

}  // namespace swin_kernels::cuda

#else
#include "emulator.h"
#endif
