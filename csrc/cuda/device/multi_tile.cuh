// What the kernels of windows of several tiles share: tokens come to shared memory some channels at
// a time, a tile of one tensor beside a tile of another.
#pragma once

#include "cuda/device/softmax.cuh"

namespace swin_kernels::cuda {

constexpr int kColumnBytes = 12 << 10;  // of a head's column of the table: in fp32 of 24×24 tokens

SWIN_DEVICE int tile_count(int tokens) { return (tokens + kTile - 1) / kTile; }

// How many of a tile's groups of `size` tokens, from token `first` on, are in the window.
SWIN_DEVICE int groups_in(int tokens, int first, int size) {
  const int left = tokens - first < kTile ? tokens - first : kTile;
  return (left + size - 1) / size;
}

// The head's column of the table to shared memory, if it fits; null if not, or without a table.
template <class Sum>
SWIN_DEVICE const Sum* stage_column(Sum* column, const Bias& bias, int64_t head) {
  const bool table = bias.kind == BiasKind::kTable || bias.kind == BiasKind::kIndexedTable;
  if (!table || bias.rows * int64_t(sizeof(Sum)) > kColumnBytes) return nullptr;
  for (int row = thread_index(); row < int(bias.rows); row += block_threads())
    column[row] = read<Sum>(bias.numbers, row, head);
  return column;
}

// The clamped norms of kTile tokens, by two threads each.
template <class T, class Sum>
SWIN_DEVICE void norms_of(Sum (&norms)[kTile], const TokenView& view,
                          const int64_t (&offsets)[kTile], int dim, const FloatView* pad,
                          int64_t head) {
  for (int i = thread_index(); i < 2 * kTile; i += block_threads()) {
    const int64_t offset = offsets[i / 2];
    const T* data = static_cast<const T*>(view.data);
    Sum squares = 0;
    for (int c = i % 2; c < dim && offset != kNoToken; c += 2) {
      const Sum x = offset == kPadding ? Sum(to_float(padding<T, Sum>(pad, head, c)))
                                       : Sum(to_float(data[offset + c * view.channel]));
      squares += x * x;
    }
    squares += shuffle_xor(squares, 1);
    if (i % 2 == 0) norms[i / 2] = fmax(sqrt(squares), Sum(kNormClamp));
  }
}

// Tokens of one tensor, as a tile in shared memory that holds `Channels` of their channels.
template <class P, int Channels>
struct Side {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  static constexpr int kPitch = TokenTile<T, Channels>::kPitch;

  T* tile;
  const TokenView& view;
  const int64_t (&offsets)[kTile];
  int dim;
  const FloatView* pad;
  Sum* norms;     // cosine attention: what the tokens are divided by; else null
  int held = -1;  // the first of the channels in the tile, −1 for none

  // Copies that `wait_for_copies` ends.
  SWIN_DEVICE void load(int begin, int64_t head, bool by_16_bytes) {
    load_tile<T, Sum, Channels>(tile, view, offsets, begin, dim, pad, head, by_16_bytes);
    held = begin;
  }

  // Once they have come.
  SWIN_DEVICE void divide() {
    if (norms == nullptr) return;
    for (int i = thread_index(); i < kTile * Channels; i += block_threads()) {
      T& x = tile[i / Channels * kPitch + i % Channels];
      const Sum norm = norms[i / Channels];
      x = rounded<T>(sizeof(T) == 2 ? Sum(to_float(x)) * (Sum(1) / norm) : Sum(to_float(x)) / norm);
    }
  }

  SWIN_DEVICE Operand<T> from(int row) const { return {tile + row * kPitch, kPitch}; }
};

// Brings the channels from `begin` on of a side to its tile, if they are not there.
template <class P, int Channels>
SWIN_DEVICE void bring(Side<P, Channels>& side, int begin, int64_t head, bool by_16_bytes) {
  if (side.held == begin) return;
  block_barrier();  // what the tile holds was read
  side.load(begin, head, by_16_bytes);
  commit_copies();
  wait_for_copies<0>();
  block_barrier();
  side.divide();
  block_barrier();
}

// sums (16, 8·tiles) += rows from `first_row` of one side · those of another, over all channels.
template <class P, int Channels, int Tiles>
SWIN_DEVICE void multiply_sides(typename P::Sum (&sums)[Tiles][4], Side<P, Channels>& left,
                                Side<P, Channels>& right, const Call& call, int64_t head,
                                int first_row, int tiles, int lane) {
  for (int begin = 0; begin < left.dim; begin += Channels) {
    block_barrier();  // what the tiles hold was read
    const bool left_moves = left.held != begin, right_moves = right.held != begin;
    if (left_moves) left.load(begin, head, call.by_16_bytes);
    if (right_moves) right.load(begin, head, call.by_16_bytes);
    commit_copies();
    wait_for_copies<0>();
    block_barrier();
    if (left_moves) left.divide();
    if (right_moves) right.divide();
    if (left.norms != nullptr) block_barrier();
    const int depth = left.dim - begin < Channels ? left.dim - begin : Channels;
    multiply<P, kDepthLast, kDepthLast, Channels>(sums, left.from(first_row), right.from(0), depth,
                                                  tiles, lane);
  }
}

// The running softmax of a lane's two rows (Milakov & Gimelshein, "Online normalizer calculation
// for softmax", 2018).
template <class P>
struct RunningSoftmax {
  using Sum = typename P::Sum;
  Sum row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};

  // Logits become exponentials on the base of the largest so far; what was summed on the base
  // before is to be multiplied by `alpha`.
  SWIN_DEVICE void take(Sum (&s)[kKeyTiles][4], Sum (&alpha)[2], int tiles) {
    Sum higher[2] = {row_max[0], row_max[1]}, sum[2] = {0, 0};
    for_each_sum(s, tiles, [&](Sum x, int, int e) { higher[e / 2] = fmax(higher[e / 2], x); });
    max_over_row(higher);
    Sum base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = higher[r] == Sum(-INFINITY) ? Sum(0) : higher[r];
      alpha[r] = exponential<P>(row_max[r] - base[r]);
      row_max[r] = higher[r];
    }
    for_each_sum(s, tiles, [&](Sum& x, int, int e) {
      x = exponential<P>(x - base[e / 2]);
      sum[e / 2] += x;
    });
    sum_over_row(sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] = row_sum[r] * alpha[r] + sum[r];
  }
};

}  // namespace swin_kernels::cuda
