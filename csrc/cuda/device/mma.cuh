// Products of a warp: 16 rows of one operand in shared memory (or in registers) with another in
// shared memory, summed in registers as fragments.cuh lays them out.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/ptx.cuh"

namespace swin_kernels::cuda {

enum class Unit { kHalf, kTf32, kPlain };  // matrix units of 2 bytes, of TF32; the arithmetic units

// What tokens are, what sums of them are, and what multiplies.
template <class E, class S, Unit U>
struct Precision {
  using Element = E;
  using Sum = S;
  static constexpr Unit kUnit = U;
};
using Fp16 = Precision<Half, float, Unit::kHalf>;
using Bf16 = Precision<BFloat16, float, Unit::kHalf>;
using Tf32 = Precision<float, float, Unit::kTf32>;
using Fp32 = Precision<float, float, Unit::kPlain>;
using Fp64 = Precision<double, double, Unit::kPlain>;

// How an operand lies in memory: (rows or columns, depth), or (depth, rows or columns).
enum Order { kDepthLast, kDepthFirst };

template <class T>
struct Operand {
  const T* data;  // its first row or column, at depth 0
  int pitch;      // elements from one line to the next

  SWIN_DEVICE const T& at(int line, int place) const { return data[line * pitch + place]; }
};

template <Order O, class T>
SWIN_DEVICE const T& element(const Operand<T>& x, int line, int depth) {
  return O == kDepthLast ? x.at(line, depth) : x.at(depth, line);
}

template <class P, int Tiles>
using Sums = typename P::Sum[Tiles][4];

// visit(sum, n, e) of a lane's sums in the first `tiles` fragments.
template <class S, int Tiles, class F>
SWIN_DEVICE void for_each_sum(S (&sums)[Tiles][4], int tiles, const F& visit) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    if (n >= tiles) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) visit(sums[n][e], n, e);
  }
}

template <class Sum, int Tiles>
SWIN_DEVICE void clear(Sum (&sums)[Tiles][4]) {
  for_each_sum(sums, Tiles, [](Sum& x, int, int) { x = 0; });
}

// 16 of the depth and 16 of the columns, from two registers of each of their halves.
template <class T, int Tiles>
SWIN_DEVICE void multiply_pair(float (&sums)[Tiles][4], const uint32_t (&left)[4],
                               const uint32_t (&right)[4], int n, int tiles) {
  multiply_fragments<T>(sums[n], left, right[0], right[1]);
  if (n + 1 < tiles) multiply_fragments<T>(sums[n + 1], left, right[2], right[3]);
}

template <Order R, class T>
SWIN_DEVICE void load_right(uint32_t (&right)[4], const Operand<T>& x, int depth, int column,
                            int lane) {
  if constexpr (R == kDepthLast) {
    const BlockPlace at = columns_first(lane);
    load_matrices(right, x.data + (column + at.row) * x.pitch + depth + at.column);
  } else {
    const BlockPlace at = rows_first(lane);
    load_matrices_transposed(right, x.data + (depth + at.row) * x.pitch + column + at.column);
  }
}

// sums (16, 8·tiles) += left (16, depth) · right (depth, 8·tiles), by one warp. `depth` is rounded
// up to 16 numbers of 2 bytes, or to 8 of TF32, and tiles to an even number: what is there is
// finite, 0 in the left operand. `tiles` <= Tiles and depth <= MostDepth are the same for the whole
// warp.
template <class P, Order L, Order R, int MostDepth, int Tiles, class T>
SWIN_DEVICE void multiply(typename P::Sum (&sums)[Tiles][4], const Operand<T>& left,
                          const Operand<T>& right, int depth, int tiles, int lane) {
  static_assert(Tiles % 2 == 0);
  if constexpr (P::kUnit == Unit::kHalf) {
#pragma unroll
    for (int k = 0; k < MostDepth; k += 16) {
      if (k >= depth) break;
      uint32_t a[4];
      if constexpr (L == kDepthLast) {
        const BlockPlace at = rows_first(lane);
        load_matrices(a, left.data + at.row * left.pitch + k + at.column);
      } else {
        const BlockPlace at = columns_first(lane);
        load_matrices_transposed(a, left.data + (k + at.row) * left.pitch + at.column);
      }
#pragma unroll
      for (int n = 0; n < Tiles; n += 2) {
        if (n >= tiles) break;
        uint32_t b[4];
        load_right<R>(b, right, k, 8 * n, lane);
        multiply_pair<T>(sums, a, b, n, tiles);
      }
    }
  } else if constexpr (P::kUnit == Unit::kTf32) {
    const Lane own(lane);
    for (int k = 0; k < depth; k += 8) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = to_tf32(element<L>(left, own.left_row(i), k + own.left_depth(i)));
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        if (n >= tiles) break;
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[i] = to_tf32(element<R>(right, 8 * n + own.right_column(), k + own.right_depth(i)));
        multiply_fragments<T>(sums[n], a, b[0], b[1]);
      }
    }
  } else {
    // sums of sums of kBlock: one over hundreds of tokens would be rounded more than fp32 allows;
    // of fp64 a few fragments at a time, for want of registers
    constexpr int kBlock = 16, kAtOnce = sizeof(typename P::Sum) == 8 ? 2 : Tiles;
    const Lane own(lane);
#pragma unroll
    for (int begin = 0; begin < Tiles; begin += kAtOnce) {
      if (begin >= tiles) break;
      for (int first = 0; first < depth; first += kBlock) {
        const int last = first + kBlock < depth ? first + kBlock : depth;
        typename P::Sum part[kAtOnce][4];
        clear(part);
        for (int k = first; k < last; ++k) {
          const T a[2] = {element<L>(left, own.row(0), k), element<L>(left, own.row(2), k)};
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
            if (begin + n >= tiles) break;
            const int column = kColumns * (begin + n);
            const T b[2] = {element<R>(right, column + own.column(0), k),
                            element<R>(right, column + own.column(1), k)};
#pragma unroll
            for (int e = 0; e < 4; ++e) part[n][e] += a[e / 2] * b[e % 2];
          }
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[begin + n][e] += part[n][e];
      }
    }
  }
}

// The same with a left operand of 2 bytes in registers: weights (16, 8·Depth) that are sums of a
// product before. Tiles of weights beyond `depth` tiles are 0.
template <class P, Order R, int Tiles, int Depth, class T>
SWIN_DEVICE void multiply_weights(float (&sums)[Tiles][4], const float (&weights)[Depth][4],
                                  const Operand<T>& right, int depth, int tiles, int lane) {
  static_assert(P::kUnit == Unit::kHalf && Tiles % 2 == 0 && Depth % 2 == 0);
#pragma unroll
  for (int k = 0; k < Depth; k += 2) {
    if (k >= depth) break;
    const uint32_t a[4] = {packed<T>(weights[k][0], weights[k][1]),
                           packed<T>(weights[k][2], weights[k][3]),
                           packed<T>(weights[k + 1][0], weights[k + 1][1]),
                           packed<T>(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
    for (int n = 0; n < Tiles; n += 2) {
      if (n >= tiles) break;
      uint32_t b[4];
      load_right<R>(b, right, 8 * k, 8 * n, lane);
      multiply_pair<T>(sums, a, b, n, tiles);
    }
  }
}

// One fragment of sums into memory, rounded to its elements.
template <class Sum, class T>
SWIN_DEVICE void put_fragment(T* to, int pitch, const Sum (&sums)[4], int n, int lane) {
  const Lane own(lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* at = to + own.row(2 * half) * pitch + kColumns * n + own.column(0);
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(at) = packed<T>(sums[2 * half], sums[2 * half + 1]);
    } else {
      at[0] = sums[2 * half];
      at[1] = sums[2 * half + 1];
    }
  }
}

template <class Sum, class T, int Tiles>
SWIN_DEVICE void put(T* to, int pitch, const Sum (&sums)[Tiles][4], int tiles, int lane) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    if (n >= tiles) break;
    put_fragment(to, pitch, sums[n], n, lane);
  }
}

// Weights (16, 8·depth tiles) of a warp, to multiply from the left: in registers, or through
// memory.
template <class P>
struct WeightTile {
  using T = typename P::Element;
  static constexpr bool kInRegisters = P::kUnit == Unit::kHalf;
  static constexpr int kPitch = kTile + 8;  // that of a LogitTile
  static constexpr int kNumbers = kInRegisters ? 8 : kTile * kPitch;
};

template <class P, int Tiles>
SWIN_DEVICE void multiply_by_weights(typename P::Sum (&sums)[Tiles][4],
                                     const typename P::Sum (&weights)[kKeyTiles][4],
                                     typename P::Element* memory, int first_row,
                                     const Operand<typename P::Element>& right, int depth_tiles,
                                     int tiles, int lane) {
  if constexpr (WeightTile<P>::kInRegisters) {
    multiply_weights<P, kDepthFirst>(sums, weights, right, depth_tiles, tiles, lane);
  } else {
    constexpr int kPitch = WeightTile<P>::kPitch;
    auto* const own = memory + first_row * kPitch;
    warp_barrier();  // the warp read what was there
    put(own, kPitch, weights, depth_tiles, lane);
    warp_barrier();
    multiply<P, kDepthLast, kDepthFirst, kTile>(sums, {own, kPitch}, right, depth_tiles * kColumns,
                                                tiles, lane);
  }
}

}  // namespace swin_kernels::cuda
