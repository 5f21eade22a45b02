// Backward of windows of up to 64 tokens: a program takes one head through a run of windows,
// computes their probabilities anew, and sums the gradient of the bias in registers. A warp has 16
// queries, and then 16 keys. The tokens of the next window come while one is computed.
#pragma once

#include "cuda/device/grad.cuh"

namespace swin_kernels::cuda {

template <class P, int Channels>
struct SingleTileBackwardMemory {
  using T = typename P::Element;
  using Sum = typename P::Sum;

  using Tile = T[kTile * TokenTile<T, Channels>::kPitch];

  // Queries and keys are read until the end of a trip: the next window's go beside them where as
  // many programs still share a multiprocessor. Values and gradients are read before, and their
  // tiles are free.
  static constexpr int kHalves = Channels * sizeof(T) > 64 ? 1 : 2;

  alignas(16) Tile query_key[kHalves][2];
  alignas(16) Tile value, grad_out;
  // what dropout keeps of the probabilities, and the gradient of the logits: (queries, keys)
  alignas(16) T weights[2][kTile * WeightTile<P>::kPitch];  // after the last window, sums of warps
  LogitTile<Sum> bias;
  // of this window and the next: in query, key, value, grad_out and the gradients of the first
  // three
  WindowOffsets<7> offsets[2];
  WindowTokens<7> places;
  Sum norms[2][kTile];  // of queries and keys
};

template <class P, int Channels>
SWIN_KERNEL(128, SWIN_LARGE_SHARED && Channels * sizeof(typename P::Element) <= 64 ? 3 : 2)
single_tile_backward(SWIN_PARAMETER Backward call) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  using Memory = SingleTileBackwardMemory<P, Channels>;
  constexpr int kPitch = TokenTile<T, Channels>::kPitch, kChannelTiles = Channels / kColumns;
  constexpr int kWeightPitch = WeightTile<P>::kPitch;
  Memory& memory = *reinterpret_cast<Memory*>(shared_memory());
  const Problem& p = call.in.problem;
  const int lane = thread_index() % kWarp, first_row = thread_index() / kWarp * kRows;
  const int tokens = int(p.tokens()), tiles = (tokens + kColumns - 1) / kColumns;
  const int lines = (tokens + kRows - 1) / kRows * kRows;
  const int head_dim = int(p.head_dim), value_dim = int(p.value_dim);
  const int head_tiles = (head_dim + kColumns - 1) / kColumns;
  const int value_tiles = (value_dim + kColumns - 1) / kColumns;
  const bool cosine = call.in.logit_scale.data != nullptr;
  const WindowRun run(p, block_index(), call.windows_per_program);
  const int64_t head = run.head;

  const TokenView* const views[7] = {
      &call.in.tokens.query, &call.in.tokens.key, &call.in.tokens.value, &call.grad_out,
      &call.grad.query,      &call.grad.key,      &call.grad.value};
  memory.places.note(views, p, head);
  for (int i = thread_index(); i < 2 * kTile * kWeightPitch; i += block_threads())
    memory.weights[0][i] = rounded<T>(Sum(0));  // so that keys beyond the window add nothing
  block_barrier();
  const TilePlace place{0, 0, &memory.places.facts, &memory.places.facts};
  const HeadBias<Sum> bias{call.in.bias, head, table_middle(p), nullptr};
  fill_bias<false>(memory.bias, bias, place, tokens);
  const Sum factor = logit_factor<Sum>(call.in, head);

  const FloatView* const pads[4] = {nullptr, &call.in.pad_key, &call.in.pad_value, nullptr};
  const int dims[4] = {head_dim, head_dim, value_dim, value_dim};
  const auto load = [&](T* tile, int x, int step) {
    load_tile<T, Sum, Channels>(tile, *views[x],
                                TokenOffsets(memory.places, memory.offsets[step % 2], x), 0,
                                dims[x], pads[x], head, call.in.by_16_bytes);
  };
  const auto load_query_key = [&](int step) {
    for (int x = 0; x < 2; ++x) load(memory.query_key[step % Memory::kHalves][x], x, step);
    commit_copies();
  };
  const Operand<T> values{memory.value, kPitch}, grads{memory.grad_out, kPitch},
      own_grads{memory.grad_out + first_row * kPitch, kPitch};
  T* const kept_rows = memory.weights[0] + first_row * kWeightPitch;
  T* const grad_rows = memory.weights[1] + first_row * kWeightPitch;

  Sum bias_sum[kKeyTiles][4];
  WideSum<P> scale_sum = 0;
  clear(bias_sum);
  PaddingSum<P, kChannelTiles> pad_key_sum, pad_value_sum;
  pad_key_sum.clear();
  pad_value_sum.clear();

  int64_t window = run.first;
  WindowPlace at(p, window), ahead = at;
  memory.places.place(memory.offsets[0], p, at);
  block_barrier();
  load_query_key(0);
  load(memory.value, 2, 0);
  load(memory.grad_out, 3, 0);
  commit_copies();
  for (int step = 0; step < run.count; ++step, ++window, at.next(p)) {
    const bool more = step + 1 < run.count;
    const auto offsets = [&](int x) {
      return TokenOffsets(memory.places, memory.offsets[step % 2], x);
    };
    T *query = memory.query_key[step % Memory::kHalves][0],
      *key = memory.query_key[step % Memory::kHalves][1];
    const Operand<T> queries{query, kPitch}, keys{key, kPitch},
        own_queries{query + first_row * kPitch, kPitch}, own_keys{key + first_row * kPitch, kPitch};
    if (Memory::kHalves == 2)
      wait_for_copies<1>();  // for queries and keys
    else
      wait_for_copies<0>();
    block_barrier();  // and the window before was stored
    if (more) {
      ahead.next(p);
      memory.places.place(memory.offsets[(step + 1) % 2], p, ahead);
    }
    if (cosine) {
      l2_normalize<P, Channels>(query, memory.norms[0], first_row, head_dim, lane);
      l2_normalize<P, Channels>(key, memory.norms[1], first_row, head_dim, lane);
      block_barrier();
    }

    Sum s[kKeyTiles][4], ds[kKeyTiles][4];  // (16, 8·tiles)
    clear(s);
    multiply<P, kDepthLast, kDepthLast, Channels>(s, own_queries, keys, head_dim, tiles, lane);
    add_logits(s, memory.bias, factor, first_row, tiles, lane);
    add_shift_mask(s, Sum(call.in.mask_value), place, at.seams(p), first_row, tiles, lane);
    add_mask<false>(s, call.in.mask, at.number(p), place, tokens, first_row, tiles, lane);
    Sum row_sum[2];
    to_exponentials<P>(s, row_sum, tiles);
    divide_rows<P>(s, row_sum, tiles);
    if (Memory::kHalves == 2) {
      wait_for_copies<0>();  // for values and gradients
      block_barrier();
    }
    clear(ds);
    multiply<P, kDepthLast, kDepthLast, Channels>(ds, own_grads, values, value_dim, tiles, lane);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      if (n >= tiles) break;
      Sum kept_weights[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Sum factor_kept = 1;
        if (call.in.dropout_threshold != 0) {
          const Lane own(lane);
          const bool keeps =
              kept(call.in, window, head, first_row + own.row(e), n * kColumns + own.column(e));
          factor_kept = keeps ? Sum(call.in.kept_factor) : Sum(0);
        }
        kept_weights[e] = s[n][e] * factor_kept;
        ds[n][e] *= factor_kept;
      }
      put_fragment(kept_rows, kWeightPitch, kept_weights, n, lane);
    }
    if constexpr (kRelative<P>) relate_to_largest(ds, s, tiles);
    Sum delta[2] = {0, 0};
    for_each_sum(ds, tiles, [&](Sum x, int n, int e) { delta[e / 2] += s[n][e] * x; });
    sum_over_row(delta);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      if (n >= tiles) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        ds[n][e] = s[n][e] * (ds[n][e] - delta[e / 2]);
        bias_sum[n][e] += ds[n][e];
      }
      put_fragment(grad_rows, kWeightPitch, ds[n], n, lane);
    }
    block_barrier();  // weights and gradients of every query are there; values were read
    if (Memory::kHalves == 2 && more) load_query_key(step + 1);

    Sum grad[kChannelTiles][4];  // (16, 8·value_tiles), of the warp's keys
    clear(grad);
    multiply<P, kDepthFirst, kDepthFirst, kTile>(
        grad, Operand<T>{memory.weights[0] + first_row, kWeightPitch}, grads, lines, value_tiles,
        lane);
    if (call.partial_pad_value != nullptr) pad_value_sum.add(grad, offsets(2), first_row, lane);
    store_sums<Channels>(grad, value_tiles, memory.value, call.grad.value, offsets(6), first_row, 0,
                         value_dim, call.in.by_16_bytes, lane);
    warp_barrier();  // the warp's rows were stored
    if (more) load(memory.value, 2, step + 1);

    Sum grad_query[kChannelTiles][4];  // (16, 8·head_tiles), of the warp's queries
    clear(grad_query);
    multiply<P, kDepthLast, kDepthFirst, kTile>(grad_query, Operand<T>{grad_rows, kWeightPitch},
                                                keys, tiles * kColumns, head_tiles, lane);
    clear(grad);  // of its keys
    multiply<P, kDepthFirst, kDepthFirst, kTile>(
        grad, Operand<T>{memory.weights[1] + first_row, kWeightPitch}, queries, lines, head_tiles,
        lane);
    if (cosine) {
      WideSum<P> radial[2];
      radial_of<P>(radial, grad_query, own_queries, head_tiles, lane);
      scale_sum += radial[0] + radial[1];
      l2_normalize_bwd<P>(grad_query, own_queries, memory.norms[0] + first_row, factor, radial,
                          head_tiles, lane);
      radial_of<P>(radial, grad, own_keys, head_tiles, lane);
      l2_normalize_bwd<P>(grad, own_keys, memory.norms[1] + first_row, factor, radial, head_tiles,
                          lane);
    } else {
      scale(grad_query, factor);
      scale(grad, factor);
    }
    if (call.partial_pad_key != nullptr) pad_key_sum.add(grad, offsets(1), first_row, lane);
    block_barrier();  // all were read: the warp's rows of the tiles are free
    if (more) {
      load(memory.grad_out, 3, step + 1);
      commit_copies();
    }
    put(query + first_row * kPitch, kPitch, grad_query, head_tiles, lane);
    put(key + first_row * kPitch, kPitch, grad, head_tiles, lane);
    warp_barrier();
    store_rows<T, Channels>(query, call.grad.query, offsets(4), first_row, 0, head_dim,
                            call.in.by_16_bytes, lane);
    store_rows<T, Channels>(key, call.grad.key, offsets(5), first_row, 0, head_dim,
                            call.in.by_16_bytes, lane);
    if (Memory::kHalves == 1 && more) {
      warp_barrier();  // the warp's rows were stored
      load_query_key(step + 1);
    }
  }
  auto* const sums = reinterpret_cast<WideSum<P>*>(memory.weights);
  static_assert(4 * Channels * sizeof(WideSum<P>) <= sizeof(memory.weights));

  // a program is (run of windows, head), row-major
  const int64_t program = block_index();
  if (call.partial_bias != nullptr)
    write_bias(static_cast<Sum*>(call.partial_bias) + program * tokens * tokens, bias_sum, tokens,
               first_row, 0, lane);
  if (call.partial_pad_key != nullptr)
    pad_key_sum.write(static_cast<WideSum<P>*>(call.partial_pad_key) + program * head_dim, sums,
                      head_dim, lane);
  if (call.partial_pad_value != nullptr)
    pad_value_sum.write(static_cast<WideSum<P>*>(call.partial_pad_value) + program * value_dim,
                        sums, value_dim, lane);
  if (call.partial_logit_scale != nullptr)
    write_row_sum(static_cast<WideSum<P>*>(call.partial_logit_scale) + program, sums, scale_sum,
                  lane);
}

}  // namespace swin_kernels::cuda
