// What the passes of the backward of windows of several tiles share: where a program is, and a tile
// of logits with its gradient.
#pragma once

#include "cuda/device/grad.cuh"
#include "cuda/device/multi_tile.cuh"

namespace swin_kernels::cuda {

// Of a query: the largest of its logits, what exp(s − largest) is divided by, what dp is relative
// to, and Σ p·dp of that.
enum Statistic { kRowMax, kRowSum, kDpAtMax, kDelta, kStatistics };

template <class P, int Channels>
struct TiledBackwardMemory {
  using T = typename P::Element;
  using Sum = typename P::Sum;

  // of query, key, value and grad_out
  alignas(16) T tokens[4][kTile * TokenTile<T, Channels>::kPitch];
  LogitTile<Sum> logits;          // then weights, where those go through memory
  int64_t row_offsets[4][kTile];  // in the two tensors of the rows' tokens, and in two gradients'
  int64_t column_offsets[2][kTile];
  Sum norms[2][kTile];  // of queries and keys
  Sum statistics[kStatistics][kTile];
  WideSum<P> sums[4 * Channels];  // of warps
  TokenFacts rows, columns;
  alignas(16) char table_column[kColumnBytes];
};

// A gradient's channels, as many at a time as a tile holds. Behind unit vectors of more channels
// every one is computed twice: what x̂·dx̂ takes away is known only after the last.
template <int Channels>
struct ChannelChunks {
  int dim, turns, begin = 0;

  SWIN_DEVICE ChannelChunks(int dim, bool of_units)
      : dim(dim), turns(of_units && dim > Channels ? 2 : 1) {}

  SWIN_DEVICE bool done() const { return turns == 0; }
  SWIN_DEVICE bool last() const { return turns == 1; }
  SWIN_DEVICE int tiles() const {
    const int left = dim - begin < Channels ? dim - begin : Channels;
    return (left + kColumns - 1) / kColumns;
  }
  SWIN_DEVICE void next() {
    begin += Channels;
    if (begin < dim) return;
    begin = 0;
    --turns;
  }
};

// What all passes know: who they are, and the four tensors as sides of a tile of logits, whose rows
// are queries or, `Transposed`, keys.
template <class P, int Channels, bool Transposed>
struct BackwardTile {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  using Memory = TiledBackwardMemory<P, Channels>;
  // registers do not hold two tiles of fp64 and what is multiplied: the weights are where the
  // warp's rows of the bias were
  static constexpr bool kAside = sizeof(Sum) == 8;

  const Backward& call;
  const Problem& p;
  Memory& memory;
  int lane, warp_row, tokens;
  int64_t head;
  Sum factor;
  HeadBias<Sum> bias;
  bool has_statistics;
  // the tile of logits it is at
  TilePlace place{};
  int64_t window = 0, window_number = 0;  // within the batch, within its image
  int seams = 0;
  Side<P, Channels> query, key, value, grad_out;

  SWIN_DEVICE BackwardTile(const Backward& call, Memory& memory, int64_t head,
                           bool has_statistics = true)
      : call(call),
        p(call.in.problem),
        memory(memory),
        lane(thread_index() % kWarp),
        warp_row(thread_index() / kWarp * kRows),
        tokens(int(p.tokens())),
        head(head),
        factor(logit_factor<Sum>(call.in, head)),
        bias{call.in.bias, head, table_middle(p),
             stage_column(reinterpret_cast<Sum*>(memory.table_column), call.in.bias, head)},
        has_statistics(has_statistics),
        query(side(0, call.in.tokens.query, p.head_dim, nullptr)),
        key(side(1, call.in.tokens.key, p.head_dim, &call.in.pad_key)),
        value(side(2, call.in.tokens.value, p.value_dim, &call.in.pad_value)),
        grad_out(side(3, call.grad_out, p.value_dim, nullptr)) {}

  // The `which`-th tensor of memory.tokens.
  SWIN_DEVICE Side<P, Channels> side(int which, const TokenView& view, int64_t dim,
                                     const FloatView* pad) {
    const bool of_keys = which == 1 || which == 2, of_values = which >= 2;
    const bool of_units = !of_values && call.in.logit_scale.data != nullptr;
    return {memory.tokens[which],
            view,
            (of_keys == Transposed ? memory.row_offsets : memory.column_offsets)[of_values],
            int(dim),
            pad,
            of_units ? memory.norms[which] : nullptr};
  }

  SWIN_DEVICE Side<P, Channels>& rows(bool of_values) {
    return Transposed ? (of_values ? value : key) : (of_values ? grad_out : query);
  }
  SWIN_DEVICE Side<P, Channels>& columns(bool of_values) {
    return Transposed ? (of_values ? grad_out : query) : (of_values ? value : key);
  }

  SWIN_DEVICE void divide_by_norms(Side<P, Channels>& side) {
    if (side.norms != nullptr)
      norms_of<T>(memory.norms[&side == &query ? 0 : 1], side.view, side.offsets, side.dim,
                  side.pad, head);
  }

  SWIN_DEVICE void load_statistics(int first_query) {
    const Sum* from =
        static_cast<const Sum*>(call.statistics) + (window * p.heads + head) * kStatistics * tokens;
    for (int i = thread_index(); i < kStatistics * kTile; i += block_threads()) {
      const int which = i / kTile, query = first_query + i % kTile;
      memory.statistics[which][i % kTile] = query < tokens ? from[which * tokens + query] : Sum(0);
    }
  }

  // To tokens [first, first + kTile) of a window, as rows; also placed in two of their gradients.
  SWIN_DEVICE void load_row_tile(const WindowPlace& at, int64_t number, int first,
                                 const TokenView& grad, const TokenView& other_grad) {
    block_barrier();  // the rows before were read
    window = number;
    window_number = at.number(p);
    seams = at.seams(p);
    place = TilePlace{first, 0, &memory.rows, &memory.columns};
    const TokenView* const views[4] = {&rows(false).view, &rows(true).view, &grad, &other_grad};
    note_and_place_tokens(memory.rows, memory.row_offsets, views, p, at, head, first);
    if (!Transposed && has_statistics) load_statistics(first);
    block_barrier();
    rows(false).held = rows(true).held = -1;
    divide_by_norms(rows(false));
  }

  // To tokens [first, first + kTile) of the same window, as columns; `again`: the bias of its tile
  // is there.
  SWIN_DEVICE void go_to_columns(const WindowPlace& at, int first, bool again = false) {
    block_barrier();  // the columns before were read
    place.first_column = first;
    const TokenView* const views[2] = {&columns(false).view, &columns(true).view};
    note_and_place_tokens(memory.columns, memory.column_offsets, views, p, at, head, first);
    if (Transposed) load_statistics(first);
    block_barrier();
    if (!again || kAside) fill_bias<Transposed>(memory.logits, bias, place, tokens);
    columns(false).held = columns(true).held = -1;
    divide_by_norms(columns(false));
  }

  SWIN_DEVICE void logits(Sum (&s)[kKeyTiles][4], int tiles) {
    clear(s);
    multiply_sides(s, rows(false), columns(false), call.in, head, warp_row, tiles, lane);
    add_logits(s, memory.logits, factor, warp_row, tiles, lane);
    add_shift_mask(s, Sum(call.in.mask_value), place, seams, warp_row, tiles, lane);
    add_mask<Transposed>(s, call.in.mask, window_number, place, tokens, warp_row, tiles, lane);
  }

  // The gradient of what dropout keeps of the probabilities.
  SWIN_DEVICE void probability_gradients(Sum (&dp)[kKeyTiles][4], int tiles) {
    clear(dp);
    multiply_sides(dp, rows(true), columns(true), call.in, head, warp_row, tiles, lane);
  }

  // What dropout multiplies a probability by.
  SWIN_DEVICE Sum kept_factor(int row, int column) {
    if (call.in.dropout_threshold == 0) return 1;
    const int r = place.first_row + row, c = place.first_column + column;
    return kept(call.in, window, head, Transposed ? c : r, Transposed ? r : c)
               ? Sum(call.in.kept_factor)
               : Sum(0);
  }

  // What dropout keeps of the probabilities of a tile (aside where kAside), and the gradient of its
  // logits.
  SWIN_DEVICE void tile_gradients(Sum (&weights)[kKeyTiles][4], Sum (&ds)[kKeyTiles][4],
                                  int tiles) {
    logits(weights, tiles);
    Sum* const aside = memory.logits.numbers + warp_row * memory.logits.kPitch;
    if (kAside) put(aside, memory.logits.kPitch, weights, tiles, lane);
    probability_gradients(ds, tiles);
    const Lane own(lane);
    for_each_sum(weights, tiles, [&](Sum& weight, int n, int e) {
      const int row = warp_row + own.row(e), column = n * kColumns + own.column(e);
      const int i = Transposed ? column : row;
      Sum& x =
          kAside ? aside[own.row(e) * memory.logits.kPitch + n * kColumns + own.column(e)] : weight;
      const Sum prob = divided<P>(exponential<P>(x - memory.statistics[kRowMax][i]),
                                  memory.statistics[kRowSum][i]);
      const Sum kept = kept_factor(row, column);
      Sum dp = ds[n][e] * kept;
      if (kRelative<P>) dp -= memory.statistics[kDpAtMax][i];
      ds[n][e] = prob * (dp - memory.statistics[kDelta][i]);
      x = prob * kept;
    });
  }

  // grad (16, channels) += weights (16, 8·tiles) times the tokens of a tile.
  template <int Tiles>
  SWIN_DEVICE void add_weighted(Sum (&grad)[Tiles][4], const Sum (&weights)[kKeyTiles][4],
                                const Side<P, Channels>& side, int tiles, int channel_tiles) {
    multiply_by_weights<P>(grad, weights, reinterpret_cast<T*>(memory.logits.numbers), warp_row,
                           side.from(0), tiles, channel_tiles, lane);
  }

  // The same with the weights of `tile_gradients`.
  template <int Tiles>
  SWIN_DEVICE void add_kept(Sum (&grad)[Tiles][4], const Sum (&weights)[kKeyTiles][4],
                            const Side<P, Channels>& side, int tiles, int channel_tiles) {
    if constexpr (kAside) {
      warp_barrier();  // the warp's rows are there
      const Operand<T> aside{memory.logits.numbers + warp_row * memory.logits.kPitch,
                             memory.logits.kPitch};
      multiply<P, kDepthLast, kDepthFirst, kTile>(grad, aside, side.from(0), tiles * kColumns,
                                                  channel_tiles, lane);
    } else {
      add_weighted(grad, weights, side, tiles, channel_tiles);
    }
  }

  // From sums of ds times tokens to a gradient of queries or keys; false while x̂·dx̂ is not known.
  template <int Tiles>
  SWIN_DEVICE bool finish(Sum (&grad)[Tiles][4], WideSum<P> (&radial)[2], Side<P, Channels>& side,
                          const ChannelChunks<Channels>& chunks) {
    if (side.norms == nullptr) {
      scale(grad, factor);
      return true;
    }
    if (chunks.begin >= side.dim) return chunks.last();  // values may have more channels
    bring(side, chunks.begin, head, call.in.by_16_bytes);
    const bool once = chunks.dim <= Channels;
    if (once || !chunks.last()) {
      WideSum<P> part[2];
      radial_of<P>(part, grad, side.from(warp_row), chunks.tiles(), lane);
      radial[0] += part[0];
      radial[1] += part[1];
    }
    if (chunks.last())
      l2_normalize_bwd<P>(grad, side.from(warp_row), side.norms + warp_row, factor, radial,
                          chunks.tiles(), lane);
    return chunks.last();
  }
};

// The program's tile of a window, window and head: tiles are neighbours in launch order.
struct TileOfProgram {
  int first;
  int64_t head, window;

  SWIN_DEVICE TileOfProgram(const Problem& p) {
    const int tiles = tile_count(int(p.tokens()));
    first = int(block_index() % tiles) * kTile;
    head = block_index() / tiles % p.heads;
    window = block_index() / tiles / p.heads;
  }
};

}  // namespace swin_kernels::cuda
