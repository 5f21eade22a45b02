// Runs the CUDA kernels on the host: what csrc/cuda/device/ptx.cuh asks of a GPU, for one thread
// block at a time. Each of its threads is a coroutine that runs until it waits for others: at a
// barrier, or in an operation of its whole warp, which is computed when all 32 lanes have come to
// it. Threads that wait for each other in vain, or for different things, end the launch with an
// error.
//
// Shared memory begins as NaN. What is copied asynchronously is NaN until it is waited for. A
// warp runs until it can go no further before the next begins, and odd blocks run theirs in
// reverse, so that what lacks a barrier gives other numbers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>

#define SWIN_KERNEL(threads, blocks) inline void
#define SWIN_PARAMETER const
#define SWIN_DEVICE inline
#define SWIN_EMULATED

namespace swin_kernels::cuda {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

namespace emulator {

// Runs `thread` as each thread of each block; throws std::runtime_error with what went wrong.
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread);

// Leaves the calling lane's `arguments` and waits; compute(every lane's) runs once for the warp.
using Warp = void* [32];
void together(const char* what, void* arguments, void (*compute)(const Warp&));

void wait_for_copies(int groups);
void load_matrices(const char* what, uint32_t (&r)[4], const void* row, bool transposed);

}  // namespace emulator

int thread_index();
int block_threads();
int64_t block_index();
char* shared_memory();
void block_barrier();

void copy_async(void* to, const void* from);
void commit_copies();

// c (16×8) += a (16×depth) · b (depth×8), elements of each by their PTX layouts.
template <class T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

inline void warp_barrier() {
  emulator::together("warp_barrier", nullptr, [](const emulator::Warp&) {});
}

template <class T>
T shuffle_xor(T x, int lanes) {
  struct Arguments {
    T x, received;
    int lanes;
  } own{x, x, lanes};
  emulator::together("shuffle_xor", &own, [](const emulator::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Arguments*>(warp[lane]);
      to->received = static_cast<Arguments*>(warp[lane ^ to->lanes])->x;
    }
  });
  return own.received;
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(Half x) { return float(x); }
inline float to_float(BFloat16 x) { return float(x); }

template <class T, class Sum>
T rounded(Sum x) {
  return T(x);
}

template <class T>
uint32_t packed(float first, float second) {
  const T low = first, high = second;
  return uint32_t(low.x) | uint32_t(high.x) << 16;
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? (bits + 0x1000u) & ~0x1FFFu : bits;  // to nearest, ties away from zero
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices("load_matrices", r, row, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices("load_matrices_transposed", r, row, true);
}

template <int Groups>
void wait_for_copies() {
  emulator::wait_for_copies(Groups);
}

}  // namespace swin_kernels::cuda
