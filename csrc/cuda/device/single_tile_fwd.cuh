// Forward of windows of up to 64 tokens: a program takes one head through a run of windows. The
// next window is on its way to shared memory while one is computed; a warp has 16 queries and every
// key.
#pragma once

#include "cuda/device/softmax.cuh"

namespace swin_kernels::cuda {

template <class P, int Channels>
struct SingleTileForwardMemory {
  using T = typename P::Element;

  alignas(16) T tokens[2][3][kTile * TokenTile<T, Channels>::kPitch];  // of query, key, value
  alignas(16) T weights[WeightTile<P>::kNumbers];
  WindowTokens<4> places;       // in query, key, value and output
  WindowOffsets<4> offsets[3];  // of the window that is stored, computed, on its way
  typename P::Sum norms[2][kTile];
};

template <class P, int Channels>
SWIN_KERNEL(128, Channels * sizeof(typename P::Element) > 64 ? 2 : 3)
single_tile_forward(SWIN_PARAMETER Forward call) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  using Memory = SingleTileForwardMemory<P, Channels>;
  constexpr int kPitch = TokenTile<T, Channels>::kPitch, kChannelTiles = Channels / kColumns;
  Memory& memory = *reinterpret_cast<Memory*>(shared_memory());
  const Problem& p = call.in.problem;
  const int lane = thread_index() % kWarp, first_row = thread_index() / kWarp * kRows;
  const int tokens = int(p.tokens()), tiles = (tokens + kColumns - 1) / kColumns;
  const int head_dim = int(p.head_dim), value_dim = int(p.value_dim);
  const int value_tiles = (value_dim + kColumns - 1) / kColumns;
  const bool cosine = call.in.logit_scale.data != nullptr;
  const WindowRun run(p, block_index(), call.windows_per_program);
  const int64_t head = run.head;

  const TokenView* const views[4] = {&call.in.tokens.query, &call.in.tokens.key,
                                     &call.in.tokens.value, &call.out};
  memory.places.note(views, p, head);
  block_barrier();
  const TilePlace place{0, 0, &memory.places.facts, &memory.places.facts};
  const HeadBias<Sum> head_bias{call.in.bias, head, table_middle(p), nullptr};
  Sum bias[kKeyTiles][4];
  {
    // through what tokens are to fill
    auto& tile = *reinterpret_cast<LogitTile<Sum>*>(memory.tokens);
    static_assert(sizeof(memory.tokens) >= sizeof(tile));
    fill_bias<false>(tile, head_bias, place, tokens);
    block_barrier();
    for_each_logit(bias, first_row, tiles, lane, [&](Sum& x, int row, int column) {
      x = tile.numbers[row * tile.kPitch + column];
    });
    block_barrier();
  }
  const Sum factor = logit_factor<Sum>(call.in, head);

  const FloatView* const pads[3] = {nullptr, &call.in.pad_key, &call.in.pad_value};
  const int dims[3] = {head_dim, head_dim, value_dim};
  const auto load = [&](int step) {
#pragma unroll
    for (int x = 0; x < 3; ++x)
      load_tile<T, Sum, Channels>(memory.tokens[step % 2][x], *views[x],
                                  TokenOffsets(memory.places, memory.offsets[step % 3], x), 0,
                                  dims[x], pads[x], head, call.in.by_16_bytes);
    commit_copies();
  };
  int64_t window = run.first;
  WindowPlace at(p, window), ahead = at;
  memory.places.place(memory.offsets[0], p, at);
  block_barrier();
  load(0);

  for (int step = 0; step < run.count; ++step, ++window, at.next(p)) {
    const bool more = step + 1 < run.count;
    if (more) {
      ahead.next(p);
      memory.places.place(memory.offsets[(step + 1) % 3], p, ahead);
    }
    block_barrier();  // the other half of `tokens` was read, the offsets are there
    if (more) {
      load(step + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    block_barrier();
    T *query = memory.tokens[step % 2][0], *key = memory.tokens[step % 2][1];
    const T* value = memory.tokens[step % 2][2];
    if (cosine) {
      l2_normalize<P, Channels>(query, memory.norms[0], first_row, head_dim, lane);
      l2_normalize<P, Channels>(key, memory.norms[1], first_row, head_dim, lane);
      block_barrier();
    }

    Sum s[kKeyTiles][4];  // (16, 8·tiles)
    clear(s);
    multiply<P, kDepthLast, kDepthLast, Channels>(s, Operand<T>{query + first_row * kPitch, kPitch},
                                                  Operand<T>{key, kPitch}, head_dim, tiles, lane);
    for_each_sum(s, tiles, [&](Sum& x, int n, int e) { x = x * factor + bias[n][e]; });
    add_shift_mask(s, Sum(call.in.mask_value), place, at.seams(p), first_row, tiles, lane);
    add_mask<false>(s, call.in.mask, at.number(p), place, tokens, first_row, tiles, lane);

    Sum row_sum[2];
    to_exponentials<P>(s, row_sum, tiles);
    drop(s, call.in, window, head, first_row, 0, tiles, lane);

    Sum out[kChannelTiles][4];  // (16, 8·value_tiles)
    clear(out);
    multiply_by_weights<P>(out, s, memory.weights, first_row, Operand<T>{value, kPitch}, tiles,
                           value_tiles, lane);
    divide_rows<P>(out, row_sum, kChannelTiles, Sum(call.in.kept_factor));
    warp_barrier();  // the warp's own queries were read
    store_sums<Channels>(out, value_tiles, query, call.out,
                         TokenOffsets(memory.places, memory.offsets[step % 3], 3), first_row, 0,
                         value_dim, call.in.by_16_bytes, lane);
  }
}

}  // namespace swin_kernels::cuda
