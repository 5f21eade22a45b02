// What the backward kernels share: gradients behind unit vectors, and sums that a program writes
// once.
#pragma once

#include <type_traits>

#include "cuda/device/softmax.cuh"

namespace swin_kernels::cuda {

// Of sums over every token of a map, and of what mostly cancels: fp32 would be rounded too often.
template <class P>
using WideSum = std::conditional_t<P::kUnit == Unit::kHalf, typename P::Sum, double>;

// Whether gradients of probabilities are taken relative to that of a row's largest: p·(dp − Σ p·dp)
// cancels less then where one probability is close to 1 (docs/math.md). What products on the matrix
// units round is far more.
template <class P>
constexpr bool kRelative = P::kUnit == Unit::kPlain;

// The gradient of each row's largest weight, −∞ where `largest` is none of them.
template <int Tiles, class Sum>
SWIN_DEVICE void gradient_at(Sum (&found)[2], const Sum (&largest)[2], Sum (&weights)[Tiles][4],
                             const Sum (&grad)[Tiles][4], int tiles) {
  found[0] = found[1] = -INFINITY;
  for_each_sum(weights, tiles, [&](Sum x, int n, int e) {
    if (x == largest[e / 2]) found[e / 2] = fmax(found[e / 2], grad[n][e]);
  });
  max_over_row(found);
}

// dp − that of the largest p of its row.
template <int Tiles, class Sum>
SWIN_DEVICE void relate_to_largest(Sum (&dp)[Tiles][4], Sum (&p)[Tiles][4], int tiles) {
  Sum largest[2] = {0, 0}, reference[2];
  for_each_sum(p, tiles, [&](Sum x, int, int e) { largest[e / 2] = fmax(largest[e / 2], x); });
  max_over_row(largest);
  gradient_at(reference, largest, p, dp, tiles);
  for_each_sum(dp, tiles, [&](Sum& x, int, int e) { x -= reference[e / 2]; });
}

// The gradient behind `l2_normalize` of a warp's sums (16, 8·tiles), a gradient of unit vectors
// still to be scaled by `factor`: dx = (dx̂ − x̂·(x̂·dx̂))/‖x‖, and dx̂/ε where the clamp holds. fp16
// cannot hold that: it saturates. `radial` is x̂·dx̂ of a lane's two rows, `unit` and `norms` those
// of the warp's first.
template <class P, int Tiles>
SWIN_DEVICE void l2_normalize_bwd(typename P::Sum (&grad)[Tiles][4],
                                  const Operand<typename P::Element>& unit,
                                  const typename P::Sum* norms, typename P::Sum factor,
                                  const WideSum<P> (&radial)[2], int tiles, int lane) {
  using Sum = typename P::Sum;
  using Wide = WideSum<P>;
  const Lane own(lane);
  for_each_sum(grad, tiles, [&](Sum& g, int n, int e) {
    const Sum norm = norms[own.row(e)];
    const bool clamped = norm <= Sum(kNormClamp);
    const Wide x = Wide(to_float(unit.at(own.row(e), n * kColumns + own.column(e))));
    g = Sum(g - (clamped ? Wide(0) : x * radial[e / 2])) * (factor / norm);
    if (std::is_same_v<typename P::Element, Half> && clamped)
      g = fmin(fmax(g, Sum(-65504)), Sum(65504));
  });
}

// x̂·dx̂ of a lane's two rows, over all channels of one tile.
template <class P, int Tiles>
SWIN_DEVICE void radial_of(WideSum<P> (&radial)[2], const typename P::Sum (&grad)[Tiles][4],
                           const Operand<typename P::Element>& unit, int tiles, int lane) {
  using Wide = WideSum<P>;
  const Lane own(lane);
  radial[0] = radial[1] = 0;
  for_each_sum(grad, tiles, [&](auto g, int n, int e) {
    const auto x = to_float(unit.at(own.row(e), n * kColumns + own.column(e)));
    radial[e / 2] += Wide(g) * Wide(x);
  });
  sum_over_row(radial);
}

template <class Sum, int Tiles>
SWIN_DEVICE void scale(Sum (&sums)[Tiles][4], Sum factor) {
  for_each_sum(sums, Tiles, [&](Sum& x, int, int) { x *= factor; });
}

// A lane's sums over the padded ones of the tokens that are its warp's rows, by column.
template <class P, int Tiles>
struct PaddingSum {
  using Sum = typename P::Sum;
  using Wide = WideSum<P>;
  Wide columns[Tiles][2];

  SWIN_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < Tiles; ++n) columns[n][0] = columns[n][1] = 0;
  }

  template <class Offsets>
  SWIN_DEVICE void add(const Sum (&grad)[Tiles][4], const Offsets& offsets, int first_row,
                       int lane) {
    const Lane own(lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (offsets[first_row + own.row(2 * r)] != kPadding) continue;
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) columns[n][c] += grad[n][2 * r + c];
    }
  }

  // The block's sum to `to`, through memory for (4, 8·Tiles) numbers; in one order always.
  SWIN_DEVICE void write(Wide* to, Wide* memory, int dim, int lane) {
    const Lane own(lane);
    const int warp = thread_index() / kWarp, warps = block_threads() / kWarp;
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Wide x = sum_over_lanes<4, kWarp>(columns[n][c]);
        if (own.group == 0) memory[(warp * Tiles + n) * kColumns + own.column(c)] = x;
      }
    block_barrier();
    for (int c = thread_index(); c < dim && c < Tiles * kColumns; c += block_threads()) {
      Wide total = 0;
      for (int w = 0; w < warps; ++w) total += memory[w * Tiles * kColumns + c];
      to[c] = total;
    }
    block_barrier();
  }
};

// The block's sum of a number of each row, which the four lanes of a row share: to `to`.
template <class Sum>
SWIN_DEVICE void write_row_sum(Sum* to, Sum* memory, Sum of_rows, int lane) {
  Sum x = of_rows;
#pragma unroll
  for (int lanes = 4; lanes < kWarp; lanes *= 2) x += shuffle_xor(x, lanes);
  if (lane == 0) memory[thread_index() / kWarp] = x;
  block_barrier();
  if (thread_index() == 0) {
    Sum total = 0;
    for (int w = 0; w < block_threads() / kWarp; ++w) total += memory[w];
    *to = total;
  }
  block_barrier();
}

// A warp's rows of the gradient of a bias (N, N).
template <class Sum>
SWIN_DEVICE void write_bias(Sum* to, Sum (&sums)[kKeyTiles][4], int tokens, int first_row,
                            int first_column, int lane) {
  for_each_logit(sums, first_row, kKeyTiles, lane, [&](Sum x, int i, int j) {
    if (i < tokens && first_column + j < tokens) to[i * tokens + first_column + j] = x;
  });
}

}  // namespace swin_kernels::cuda
