// Backward of windows of up to 64 tokens: a program takes one head through a run of windows,
// computes their probabilities anew, and sums the gradient of the bias in registers. A warp has 16
// queries, and then 16 keys.
#pragma once

#include "cuda/device/grad.cuh"

namespace swin_kernels::cuda {

template <class P, int Channels>
struct SingleTileBackwardMemory {
  using T = typename P::Element;
  using Sum = typename P::Sum;

  alignas(16) T tokens[4][kTile * TokenTile<T, Channels>::kPitch];  // query, key, value, grad_out
  // what dropout keeps of the probabilities, and the gradient of the logits: (queries, keys)
  alignas(16) T weights[2][kTile * WeightTile<P>::kPitch];
  LogitTile<Sum> logits;          // bias, and an explicit mask
  int64_t offsets[7][kTile];      // in those of `tokens`, then in their gradients
  Sum norms[2][kTile];            // of queries and keys
  WideSum<P> sums[4 * Channels];  // of warps
  TokenFacts facts;
};

template <class P, int Channels>
SWIN_KERNEL(128, 2)
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
  const bool cosine = call.in.logit_scale.data != nullptr, masked = call.in.mask.data != nullptr;
  const WindowRun run(p, block_index(), call.windows_per_program);
  const int64_t head = run.head;

  note_tokens(memory.facts, p, 0);
  for (int i = thread_index(); i < 2 * kTile * kWeightPitch; i += block_threads())
    memory.weights[0][i] = rounded<T>(Sum(0));  // so that keys beyond the window add nothing
  block_barrier();
  const TilePlace place{0, 0, &memory.facts, &memory.facts};
  const HeadBias<Sum> bias{call.in.bias, head, table_middle(p), nullptr};
  if (!masked) fill_bias<false>(memory.logits, bias, place, tokens);
  const Sum factor = logit_factor<Sum>(call.in, head);

  const TokenView* const views[7] = {
      &call.in.tokens.query, &call.in.tokens.key, &call.in.tokens.value, &call.grad_out,
      &call.grad.query,      &call.grad.key,      &call.grad.value};
  const FloatView* const pads[4] = {nullptr, &call.in.pad_key, &call.in.pad_value, nullptr};
  const int dims[4] = {head_dim, head_dim, value_dim, value_dim};
  T *query = memory.tokens[0], *key = memory.tokens[1], *value = memory.tokens[2];
  const T* grad_out = memory.tokens[3];
  const Operand<T> queries{query, kPitch}, keys{key, kPitch}, values{value, kPitch},
      grads{grad_out, kPitch};
  const Operand<T> own_queries{query + first_row * kPitch, kPitch},
      own_keys{key + first_row * kPitch, kPitch}, own_grads{grad_out + first_row * kPitch, kPitch};
  T* const kept_rows = memory.weights[0] + first_row * kWeightPitch;
  T* const grad_rows = memory.weights[1] + first_row * kWeightPitch;

  Sum bias_sum[kKeyTiles][4];
  WideSum<P> scale_sum = 0;
  clear(bias_sum);
  PaddingSum<P, kChannelTiles> pad_key_sum, pad_value_sum;
  pad_key_sum.clear();
  pad_value_sum.clear();

  int64_t window = run.first;
  WindowPlace at(p, window);
  for (int step = 0; step < run.count; ++step, ++window, at.next(p)) {
    block_barrier();  // the window before was read and stored
    place_tokens(memory.offsets, views, p, at, head, 0);
    if (masked) fill_bias<false>(memory.logits, bias, place, tokens);  // the mask takes its place
    block_barrier();
#pragma unroll
    for (int x = 0; x < 4; ++x)
      load_tile<T, Sum, Channels>(memory.tokens[x], *views[x], memory.offsets[x], lines, 0, dims[x],
                                  pads[x], head, call.in.by_16_bytes);
    commit_copies();
    wait_for_copies<0>();
    block_barrier();
    if (cosine) {
      l2_normalize<P, Channels>(query, memory.norms[0], first_row, head_dim, lane);
      l2_normalize<P, Channels>(key, memory.norms[1], first_row, head_dim, lane);
      block_barrier();
    }

    Sum s[kKeyTiles][4], ds[kKeyTiles][4];  // (16, 8·tiles)
    clear(s);
    multiply<P, kDepthLast, kDepthLast>(s, own_queries, keys, head_dim, tiles, lane);
    add_logits(s, memory.logits, factor, first_row, tiles, lane);
    add_shift_mask(s, Sum(call.in.mask_value), place, at.seams(p), first_row, tiles, lane);
    add_mask<false>(s, call.in.mask, at.number(p), memory.logits, place, tokens, first_row, tiles,
                    lane);
    Sum row_sum[2];
    to_exponentials<P>(s, row_sum, tiles);
    divide_rows<P>(s, row_sum, tiles);
    clear(ds);
    multiply<P, kDepthLast, kDepthLast>(ds, own_grads, values, value_dim, tiles, lane);
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

    Sum grad[kChannelTiles][4];  // (16, 8·value_tiles), of the warp's keys
    clear(grad);
    multiply<P, kDepthFirst, kDepthFirst>(grad,
                                          Operand<T>{memory.weights[0] + first_row, kWeightPitch},
                                          grads, lines, value_tiles, lane);
    if (call.partial_pad_value != nullptr)
      pad_value_sum.add(grad, memory.offsets[2] + first_row, lane);
    store_sums<Channels>(grad, value_tiles, value, call.grad.value, memory.offsets[6], first_row, 0,
                         value_dim, call.in.by_16_bytes, lane);

    Sum grad_query[kChannelTiles][4];  // (16, 8·head_tiles), of the warp's queries
    clear(grad_query);
    multiply<P, kDepthLast, kDepthFirst>(grad_query, Operand<T>{grad_rows, kWeightPitch}, keys,
                                         tiles * kColumns, head_tiles, lane);
    clear(grad);  // of its keys
    multiply<P, kDepthFirst, kDepthFirst>(grad,
                                          Operand<T>{memory.weights[1] + first_row, kWeightPitch},
                                          queries, lines, head_tiles, lane);
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
    if (call.partial_pad_key != nullptr) pad_key_sum.add(grad, memory.offsets[1] + first_row, lane);
    block_barrier();  // queries and keys were read: the warp's rows of their tiles are free
    put(query + first_row * kPitch, kPitch, grad_query, head_tiles, lane);
    put(key + first_row * kPitch, kPitch, grad, head_tiles, lane);
    warp_barrier();
    store_rows<T, Channels>(query, call.grad.query, memory.offsets[4], first_row, 0, head_dim,
                            call.in.by_16_bytes, lane);
    store_rows<T, Channels>(key, call.grad.key, memory.offsets[5], first_row, 0, head_dim,
                            call.in.by_16_bytes, lane);
  }

  // a program is (run of windows, head), row-major
  const int64_t program = block_index();
  if (call.partial_bias != nullptr)
    write_bias(static_cast<Sum*>(call.partial_bias) + program * tokens * tokens, bias_sum, tokens,
               first_row, 0, lane);
  if (call.partial_pad_key != nullptr)
    pad_key_sum.write(static_cast<WideSum<P>*>(call.partial_pad_key) + program * head_dim,
                      memory.sums, head_dim, lane);
  if (call.partial_pad_value != nullptr)
    pad_value_sum.write(static_cast<WideSum<P>*>(call.partial_pad_value) + program * value_dim,
                        memory.sums, value_dim, lane);
  if (call.partial_logit_scale != nullptr)
    write_row_sum(static_cast<WideSum<P>*>(call.partial_logit_scale) + program, memory.sums,
                  scale_sum, lane);
}

}  // namespace swin_kernels::cuda
