// Backward of windows of several tiles: each row's softmax and Σ p·dp first, then a pass for
// queries, one for keys and values, and one for the bias. Each computes a tile of logits and its
// gradient anew.
#pragma once

#include "cuda/device/multi_tile_bwd_pass.cuh"

namespace swin_kernels::cuda {

// Before the others: statistics (W, H, kStatistics, N).
template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_statistics(SWIN_PARAMETER Backward call) {
  using Sum = typename P::Sum;
  auto& memory = *reinterpret_cast<TiledBackwardMemory<P, Channels>*>(shared_memory());
  const TileOfProgram own(call.in.problem);
  BackwardTile<P, Channels, false> pass(call, memory, own.head, false);
  const WindowPlace at(pass.p, own.window);
  const int tokens = pass.tokens, lane = pass.lane;
  pass.load_row_tile(at, own.window, own.first, call.grad.query, call.grad.query);

  RunningSoftmax<P> softmax;
  Sum delta[2] = {0, 0}, reference[2] = {0, 0};
  for (int column = 0; column < tokens; column += kTile) {
    const int tiles = groups_in(tokens, column, kColumns);
    pass.go_to_columns(at, column);
    Sum s[kKeyTiles][4], dp[kKeyTiles][4], alpha[2], products[2] = {0, 0};
    pass.logits(s, tiles);
    pass.probability_gradients(dp, tiles);
    for_each_logit(dp, pass.warp_row, tiles, lane,
                   [&](Sum& x, int i, int j) { x *= pass.kept_factor(i, j); });
    const Sum before[2] = {softmax.row_sum[0], softmax.row_sum[1]};
    softmax.take(s, alpha, tiles);
    if constexpr (kRelative<P>) {
      // where the largest logit so far is in this tile, what was summed is to be relative to its dp
      const Sum ones[2] = {1, 1};
      Sum found[2];
      gradient_at(found, ones, s, dp, tiles);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (found[r] == Sum(-INFINITY)) continue;
        delta[r] += before[r] * (reference[r] - found[r]);
        reference[r] = found[r];
      }
    }
    for_each_sum(s, tiles, [&](Sum x, int n, int e) {
      products[e / 2] += x * (dp[n][e] - reference[e / 2]);
    });
    sum_over_row(products);
#pragma unroll
    for (int r = 0; r < 2; ++r) delta[r] = delta[r] * alpha[r] + products[r];
  }
  Sum* to = static_cast<Sum*>(call.statistics) +
            (own.window * pass.p.heads + own.head) * kStatistics * tokens;
  const Lane place(lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = own.first + pass.warp_row + place.row(2 * r);
    if (place.member != 0 || i >= tokens) continue;
    const Sum row_sum = softmax.row_sum[r], divides = divisor<P>(row_sum);
    to[kRowMax * tokens + i] = row_sum == 0 ? Sum(0) : softmax.row_max[r];
    to[kRowSum * tokens + i] = divides;
    to[kDpAtMax * tokens + i] = reference[r];
    to[kDelta * tokens + i] = divided<P>(delta[r], divides);
  }
}

template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_grad_query(SWIN_PARAMETER Backward call) {
  using Sum = typename P::Sum;
  constexpr int kChannelTiles = Channels / kColumns;
  auto& memory = *reinterpret_cast<TiledBackwardMemory<P, Channels>*>(shared_memory());
  const TileOfProgram own(call.in.problem);
  BackwardTile<P, Channels, false> pass(call, memory, own.head);
  const WindowPlace at(pass.p, own.window);
  const int tokens = pass.tokens, lane = pass.lane;
  const int warp_row = pass.warp_row;
  pass.load_row_tile(at, own.window, own.first, call.grad.query, call.grad.query);

  ChannelChunks<Channels> chunks(pass.query.dim, pass.query.norms != nullptr);
  WideSum<P> radial[2] = {0, 0};  // q̂·dq̂
  for (; !chunks.done(); chunks.next()) {
    Sum grad[kChannelTiles][4];
    clear(grad);
    for (int column = 0; column < tokens; column += kTile) {
      const int tiles = groups_in(tokens, column, kColumns);
      pass.go_to_columns(at, column);
      Sum weights[kKeyTiles][4], ds[kKeyTiles][4];
      pass.tile_gradients(weights, ds, tiles);
      bring(pass.key, chunks.begin, own.head, call.in.by_16_bytes);
      pass.add_weighted(grad, ds, pass.key, tiles, chunks.tiles());
    }
    if (!pass.finish(grad, radial, pass.query, chunks)) continue;
    block_barrier();  // the keys were read
    store_sums<Channels>(grad, kChannelTiles, pass.key.tile, call.grad.query, memory.row_offsets[2],
                         warp_row, chunks.begin, pass.query.dim, call.in.by_16_bytes, lane);
  }
  if (call.partial_logit_scale != nullptr) {  // (windows and tiles, H)
    const int64_t row = own.window * tile_count(tokens) + own.first / kTile;
    write_row_sum(
        static_cast<WideSum<P>*>(call.partial_logit_scale) + row * pass.p.heads + own.head,
        memory.sums, WideSum<P>(radial[0] + radial[1]), lane);
  }
}

template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_grad_key_value(SWIN_PARAMETER Backward call) {
  using Sum = typename P::Sum;
  constexpr int kChannelTiles = Channels / kColumns;
  auto& memory = *reinterpret_cast<TiledBackwardMemory<P, Channels>*>(shared_memory());
  const TileOfProgram own(call.in.problem);
  BackwardTile<P, Channels, true> pass(call, memory, own.head);
  const WindowPlace at(pass.p, own.window);
  const int tokens = pass.tokens, lane = pass.lane;
  const int warp_row = pass.warp_row, head_dim = pass.key.dim, value_dim = pass.value.dim;
  pass.load_row_tile(at, own.window, own.first, call.grad.key, call.grad.value);

  // padding of this tile alone: a row (windows and tiles) of partial sums
  const int64_t row = own.window * tile_count(tokens) + own.first / kTile;
  const int64_t partial = row * pass.p.heads + own.head;
  ChannelChunks<Channels> chunks(head_dim > value_dim ? head_dim : value_dim,
                                 pass.key.norms != nullptr);
  WideSum<P> radial[2] = {0, 0};  // k̂·dk̂
  for (; !chunks.done(); chunks.next()) {
    const int begin = chunks.begin, tiles_out = chunks.tiles();
    Sum grad_key[kChannelTiles][4], grad_value[kChannelTiles][4];
    clear(grad_key);
    clear(grad_value);
    for (int column = 0; column < tokens; column += kTile) {
      const int tiles = groups_in(tokens, column, kColumns);
      pass.go_to_columns(at, column);
      Sum weights[kKeyTiles][4], ds[kKeyTiles][4];
      pass.tile_gradients(weights, ds, tiles);
      if (begin < value_dim) {
        bring(pass.grad_out, begin, own.head, call.in.by_16_bytes);
        pass.add_kept(grad_value, weights, pass.grad_out, tiles, tiles_out);
      }
      if (begin < head_dim) {
        bring(pass.query, begin, own.head, call.in.by_16_bytes);
        pass.add_weighted(grad_key, ds, pass.query, tiles, tiles_out);
      }
    }
    if (!pass.finish(grad_key, radial, pass.key, chunks)) continue;
    PaddingSum<P, kChannelTiles> padding;
    block_barrier();  // queries and gradients of the output were read
    if (begin < head_dim) {
      if (call.partial_pad_key != nullptr) {
        padding.clear();
        padding.add(grad_key, memory.row_offsets[0], warp_row, lane);
        padding.write(static_cast<WideSum<P>*>(call.partial_pad_key) + partial * head_dim + begin,
                      memory.sums, head_dim - begin, lane);
      }
      store_sums<Channels>(grad_key, kChannelTiles, pass.query.tile, call.grad.key,
                           memory.row_offsets[2], warp_row, begin, head_dim, call.in.by_16_bytes,
                           lane);
    }
    if (begin < value_dim) {
      if (call.partial_pad_value != nullptr) {
        padding.clear();
        padding.add(grad_value, memory.row_offsets[1], warp_row, lane);
        padding.write(
            static_cast<WideSum<P>*>(call.partial_pad_value) + partial * value_dim + begin,
            memory.sums, value_dim - begin, lane);
      }
      store_sums<Channels>(grad_value, kChannelTiles, pass.grad_out.tile, call.grad.value,
                           memory.row_offsets[3], warp_row, begin, value_dim, call.in.by_16_bytes,
                           lane);
    }
  }
}

// A program takes one tile of a head's bias through a run of windows, and writes its sum once.
template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_grad_bias(SWIN_PARAMETER Backward call) {
  using Sum = typename P::Sum;
  auto& memory = *reinterpret_cast<TiledBackwardMemory<P, Channels>*>(shared_memory());
  const Problem& p = call.in.problem;
  const int tiles_a_side = tile_count(int(p.tokens()));
  const int first_column = int(block_index() % tiles_a_side) * kTile;
  const int first_row = int(block_index() / tiles_a_side % tiles_a_side) * kTile;
  const int64_t program = block_index() / (tiles_a_side * tiles_a_side);
  const int64_t head = program % p.heads, run = program / p.heads;
  BackwardTile<P, Channels, false> pass(call, memory, head);
  const int tokens = pass.tokens, lane = pass.lane;
  const int tiles = groups_in(tokens, first_column, kColumns);

  Sum sum[kKeyTiles][4];
  clear(sum);
  const int64_t windows = p.batch * p.windows();
  int64_t window = run * call.windows_per_program;
  const int64_t last =
      window + call.windows_per_program < windows ? window + call.windows_per_program : windows;
  bool again = false;
  for (WindowPlace at(p, window); window < last; ++window, at.next(p), again = true) {
    pass.load_row_tile(at, window, first_row, call.grad.query, call.grad.query);
    pass.go_to_columns(at, first_column, again);
    Sum weights[kKeyTiles][4], ds[kKeyTiles][4];
    pass.tile_gradients(weights, ds, tiles);
    for_each_sum(ds, tiles, [&](Sum x, int n, int e) { sum[n][e] += x; });
  }
  write_bias(static_cast<Sum*>(call.partial_bias) + program * tokens * tokens, sum, tokens,
             first_row + pass.warp_row, first_column, lane);
}

}  // namespace swin_kernels::cuda
