// From products of queries and keys to probabilities: scale, bias, masks, softmax, dropout.
#pragma once

#include <cmath>

#include "cuda/device/load_store.cuh"
#include "cuda/device/mma.cuh"

namespace swin_kernels::cuda {

// Where a tile of logits lies: its rows' and columns' first tokens; rows are queries, or with
// `Transposed` keys.
struct TilePlace {
  int first_row, first_column;
  const TokenFacts *rows, *columns;
};

// What is added to the logits of one head.
template <class Sum>
struct HeadBias {
  const Bias& bias;
  int64_t head;
  int middle;         // of the geometric table
  const Sum* column;  // the head's column of the table, where it was brought to shared memory

  SWIN_DEVICE Sum of_row(int64_t row) const {
    return column != nullptr ? column[row] : read<Sum>(bias.numbers, row, head);
  }

  // For a query i and a key j whose numbers for the table differ by `difference`.
  SWIN_DEVICE Sum at(int i, int j, int difference) const {
    switch (bias.kind) {
      case BiasKind::kNone:
        return 0;
      case BiasKind::kDense:
        return read<Sum>(bias.numbers, head, i, j);
      case BiasKind::kTable:
        return of_row(difference + middle);
      default: {
        const int64_t row = bias.row_of(i, j);
        // only the device sees an index that the table lacks: let the user see it too
        return row >= 0 && row < bias.rows ? of_row(row) : Sum(NAN);
      }
    }
  }
};

// visit(sum, row, column) of a warp's 16 rows from `first_row` of a tile.
template <int Tiles, class Sum, class F>
SWIN_DEVICE void for_each_logit(Sum (&sums)[Tiles][4], int first_row, int tiles, int lane,
                                const F& visit) {
  const Lane own(lane);
  for_each_sum(sums, tiles, [&](Sum& x, int n, int e) {
    visit(x, first_row + own.row(e), n * kColumns + own.column(e));
  });
}

// (kTile, kTile) numbers that are added to logits, in shared memory.
template <class Sum>
struct LogitTile {
  static constexpr int kPitch =
      kTile + 8;  // of a warp half the lanes, 8 bytes each, hit every bank
  Sum numbers[kTile * kPitch];
};

// Fills a tile of the bias, −∞ for keys beyond the window: a block.
template <bool Transposed, class Sum>
SWIN_DEVICE void fill_bias(LogitTile<Sum>& tile, const HeadBias<Sum>& bias, const TilePlace& place,
                           int tokens) {
#pragma unroll 1
  for (int at = thread_index(); at < kTile * kTile; at += block_threads()) {
    const int row = at / kTile, column = at % kTile;
    const int r = place.first_row + row, c = place.first_column + column;
    const int i = Transposed ? c : r, j = Transposed ? r : c;
    const int difference = place.rows->table_number[row] - place.columns->table_number[column];
    Sum x = 0;  // for queries beyond the window
    if (j >= tokens)
      x = -INFINITY;
    else if (i < tokens)
      x = bias.at(i, j, Transposed ? -difference : difference);
    tile.numbers[row * LogitTile<Sum>::kPitch + column] = x;
  }
}

template <int Tiles, class Sum>
SWIN_DEVICE void add_logits(Sum (&sums)[Tiles][4], const LogitTile<Sum>& tile, Sum factor,
                            int first_row, int tiles, int lane) {
  for_each_logit(sums, first_row, tiles, lane, [&](Sum& s, int row, int column) {
    s = s * factor + tile.numbers[row * tile.kPitch + column];
  });
}

// The shift mask between regions.
template <int Tiles, class Sum>
SWIN_DEVICE void add_shift_mask(Sum (&logits)[Tiles][4], Sum mask_value, const TilePlace& place,
                                int seams, int first_row, int tiles, int lane) {
  if (seams == 0) return;
  for_each_logit(logits, first_row, tiles, lane, [&](Sum& s, int row, int column) {
    if ((place.rows->sides[row] ^ place.columns->sides[column]) & seams) s += mask_value;
  });
}

// An explicit mask, read where it is added: a warp asks for whole sectors of it. Last of all, and
// not with the bias, since a sum near −100 is rounded more than the logits before.
template <bool Transposed, int Tiles, class Sum>
SWIN_DEVICE void add_mask(Sum (&logits)[Tiles][4], const FloatView& mask, int64_t window,
                          const TilePlace& place, int tokens, int first_row, int tiles, int lane) {
  if (mask.data == nullptr) return;
  const Lane own(lane);
  const int row = place.first_row + first_row + own.row(0);
  const int column = place.first_column + own.column(0);
  const int64_t down = mask.stride[Transposed ? 2 : 1], right = mask.stride[Transposed ? 1 : 2];
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    if (n >= tiles) break;
    // a branch for each fragment: so no more of it is under way than registers hold
    as_element(mask.element, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(mask.data) + window * mask.stride[0] +
                         row * down + column * right;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int rows = own.row(e) - own.row(0), columns = n * kColumns + e % 2;
        if (row + rows < tokens && column + columns < tokens)
          logits[n][e] += Sum(to_float(from[rows * down + columns * right]));
      }
    });
  }
}

// Of each of a lane's two rows: over its columns, then over the four lanes that share the row.
template <class Sum>
SWIN_DEVICE void max_over_row(Sum (&x)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) x[r] = fmax(x[r], shuffle_xor(x[r], lanes));
}
template <class Sum>
SWIN_DEVICE void sum_over_row(Sum (&x)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) x[r] = sum_over_lanes<1, 4>(x[r]);
}

// exp of a difference of logits, as exactly as what it is summed with.
template <class P>
SWIN_DEVICE typename P::Sum exponential(typename P::Sum difference) {
  if constexpr (P::kUnit == Unit::kHalf)
    return exp2_fast(difference * 1.4426950408889634f);
  else
    return exp(difference);
}

// exp(s − largest) of a warp's rows of a whole window, and its sums; 0 where all keys are at −inf.
template <class P, int Tiles>
SWIN_DEVICE void to_exponentials(typename P::Sum (&s)[Tiles][4], typename P::Sum (&row_sum)[2],
                                 int tiles) {
  using Sum = typename P::Sum;
  Sum row_max[2] = {-INFINITY, -INFINITY};
  row_sum[0] = row_sum[1] = 0;
  for_each_sum(s, tiles, [&](Sum x, int, int e) { row_max[e / 2] = fmax(row_max[e / 2], x); });
  max_over_row(row_max);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row_max[r] == Sum(-INFINITY)) row_max[r] = 0;
  for_each_sum(s, tiles, [&](Sum& x, int, int e) {
    x = exponential<P>(x - row_max[e / 2]);
    row_sum[e / 2] += x;
  });
  sum_over_row(row_sum);
}

// What a row's exponentials are to be divided by: of 2 bytes as what multiplies them, as that
// division is rounded far less than they are then. 0 where no key is left.
template <class P>
SWIN_DEVICE typename P::Sum divisor(typename P::Sum row_sum) {
  return P::kUnit == Unit::kHalf && row_sum != 0 ? 1 / row_sum : row_sum;
}
template <class P>
SWIN_DEVICE typename P::Sum divided(typename P::Sum x, typename P::Sum divisor) {
  if (P::kUnit == Unit::kHalf) return x * divisor;
  return divisor == 0 ? 0 : x / divisor;
}

// A warp's rows of exponentials, or their products with values, over their sums.
template <class P, int Tiles>
SWIN_DEVICE void divide_rows(typename P::Sum (&rows)[Tiles][4], const typename P::Sum (&row_sum)[2],
                             int tiles, typename P::Sum kept_factor = 1) {
  using Sum = typename P::Sum;
  const Sum divisors[2] = {divisor<P>(row_sum[0]), divisor<P>(row_sum[1])};
  for_each_sum(rows, tiles,
               [&](Sum& x, int, int e) { x = divided<P>(x, divisors[e / 2]) * kept_factor; });
}

// Whether dropout keeps the probability of query i and key j: docs/contract.md.
SWIN_DEVICE bool kept(const Call& call, int64_t window, int64_t head, int i, int j) {
  const uint32_t word = philox_first_word(
      uint32_t(i) * uint32_t(call.problem.tokens()) + uint32_t(j), uint32_t(head), uint32_t(window),
      uint32_t(uint64_t(window) >> 32), uint64_t(*call.dropout_seed));
  return word >= call.dropout_threshold;
}

// Dropout of a warp's rows of weights, which are still to be multiplied by `kept_factor`.
template <int Tiles, class Sum>
SWIN_DEVICE void drop(Sum (&weights)[Tiles][4], const Call& call, int64_t window, int64_t head,
                      int first_row, int first_column, int tiles, int lane) {
  if (call.dropout_threshold == 0) return;
  for_each_logit(weights, first_row, tiles, lane, [&](Sum& x, int i, int column) {
    if (!kept(call, window, head, i, first_column + column)) x = 0;
  });
}

// The factor of products of queries and keys.
template <class Sum>
SWIN_DEVICE Sum logit_factor(const Call& call, int64_t head) {
  return call.logit_scale.data == nullptr ? Sum(call.scale) : read<Sum>(call.logit_scale, head);
}

// Cosine attention: each of a warp's 16 rows of a tile over its norm, which is kept.
template <class P, int Channels>
SWIN_DEVICE void l2_normalize(typename P::Element* tile, typename P::Sum* norms, int first_row,
                              int dim, int lane) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  const int row = first_row + lane / 2;
  T* channels = tile + row * TokenTile<T, Channels>::kPitch;
  Sum squares = 0;
  for (int c = lane % 2; c < dim; c += 2) {
    const Sum x = to_float(channels[c]);
    squares += x * x;
  }
  squares += shuffle_xor(squares, 1);
  const Sum norm = fmax(sqrt(squares), Sum(kNormClamp));
  if (lane % 2 == 0) norms[row] = norm;
  for (int c = lane % 2; c < dim; c += 2) {
    const Sum x = to_float(channels[c]);
    // of 2 bytes one division a row will do: it is far below what is rounded then
    channels[c] = rounded<T>(sizeof(T) == 2 ? x * (Sum(1) / norm) : x / norm);
  }
}

}  // namespace swin_kernels::cuda
