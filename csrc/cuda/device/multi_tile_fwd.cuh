// Forward of windows of several tiles: a program takes 64 queries of one window and head through
// its keys with a running softmax (Milakov & Gimelshein, "Online normalizer calculation for
// softmax", 2018). Values wider than a tile are taken in several turns.
#pragma once

#include "cuda/device/multi_tile.cuh"

namespace swin_kernels::cuda {

template <class P, int Channels>
struct TiledForwardMemory {
  using T = typename P::Element;

  alignas(16) T tokens[3][kTile * TokenTile<T, Channels>::kPitch];  // of query, key, value
  LogitTile<typename P::Sum> logits;  // then weights, where those go through memory
  int64_t row_offsets[2][kTile];      // in query and output
  int64_t column_offsets[2][kTile];   // in key and value
  typename P::Sum norms[2][kTile];    // of queries and keys
  TokenFacts rows, columns;
  alignas(16) char table_column[kColumnBytes];
};

template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_forward(SWIN_PARAMETER Forward call) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  using Memory = TiledForwardMemory<P, Channels>;
  constexpr int kChannelTiles = Channels / kColumns;
  Memory& memory = *reinterpret_cast<Memory*>(shared_memory());
  const Problem& p = call.in.problem;
  const int lane = thread_index() % kWarp, warp_row = thread_index() / kWarp * kRows;
  const int tokens = int(p.tokens()), value_dim = int(p.value_dim);
  const bool cosine = call.in.logit_scale.data != nullptr;

  const int first_row = int(block_index() % tile_count(tokens)) * kTile;
  const int64_t head = block_index() / tile_count(tokens) % p.heads;
  const int64_t window = block_index() / tile_count(tokens) / p.heads;
  const WindowPlace at(p, window);
  const int seams = at.seams(p);

  const Sum* column = stage_column(reinterpret_cast<Sum*>(memory.table_column), call.in.bias, head);
  const TokenView* const row_views[2] = {&call.in.tokens.query, &call.out};
  const TokenView* const column_views[2] = {&call.in.tokens.key, &call.in.tokens.value};
  note_and_place_tokens(memory.rows, memory.row_offsets, row_views, p, at, head, first_row);
  Side<P, Channels> query{memory.tokens[0],
                          call.in.tokens.query,
                          memory.row_offsets[0],
                          int(p.head_dim),
                          nullptr,
                          cosine ? memory.norms[0] : nullptr};
  Side<P, Channels> key{memory.tokens[1], call.in.tokens.key, memory.column_offsets[0],
                        int(p.head_dim),  &call.in.pad_key,   cosine ? memory.norms[1] : nullptr};
  Side<P, Channels> value{memory.tokens[2], call.in.tokens.value, memory.column_offsets[1],
                          value_dim,        &call.in.pad_value,   nullptr};
  block_barrier();
  if (cosine) norms_of<T>(memory.norms[0], query.view, query.offsets, query.dim, nullptr, head);
  const HeadBias<Sum> bias{call.in.bias, head, table_middle(p), column};
  const Sum factor = logit_factor<Sum>(call.in, head);

  for (int begin = 0; begin < value_dim; begin += Channels) {
    const int left = value_dim - begin < Channels ? value_dim - begin : Channels;
    const int value_tiles = (left + kColumns - 1) / kColumns;
    RunningSoftmax<P> softmax;
    Sum out[kChannelTiles][4];  // (16, 8·value_tiles)
    clear(out);
    for (int first_column = 0; first_column < tokens; first_column += kTile) {
      const int tiles = groups_in(tokens, first_column, kColumns);
      block_barrier();  // the keys before were read
      note_and_place_tokens(memory.columns, memory.column_offsets, column_views, p, at, head,
                            first_column);
      block_barrier();
      const TilePlace place{first_row, first_column, &memory.rows, &memory.columns};
      fill_bias<false>(memory.logits, bias, place, tokens);
      key.held = -1;
      value.load(begin, head, call.in.by_16_bytes);
      if (cosine) norms_of<T>(memory.norms[1], key.view, key.offsets, key.dim, key.pad, head);

      Sum s[kKeyTiles][4], alpha[2];  // (16, 8·tiles)
      clear(s);
      multiply_sides(s, query, key, call.in, head, warp_row, tiles, lane);
      add_logits(s, memory.logits, factor, warp_row, tiles, lane);
      add_shift_mask(s, Sum(call.in.mask_value), place, seams, warp_row, tiles, lane);
      add_mask<false>(s, call.in.mask, at.number(p), place, tokens, warp_row, tiles, lane);
      softmax.take(s, alpha, tiles);
      drop(s, call.in, window, head, first_row + warp_row, first_column, tiles, lane);
      for_each_sum(out, kChannelTiles, [&](Sum& x, int, int e) { x *= alpha[e / 2]; });
      multiply_by_weights<P>(out, s, reinterpret_cast<T*>(memory.logits.numbers), warp_row,
                             value.from(0), tiles, value_tiles, lane);
    }
    divide_rows<P>(out, softmax.row_sum, kChannelTiles, Sum(call.in.kept_factor));
    block_barrier();  // the last values were read: the warp's rows of their tile are free
    store_sums<Channels>(out, value_tiles, value.tile, call.out, memory.row_offsets[1], warp_row,
                         begin, value_dim, call.in.by_16_bytes, lane);
  }
}

}  // namespace swin_kernels::cuda
