// Backward of windows of several tiles: each row's softmax and Σ p·dp first, then a pass for
// queries, one for keys and values, and one for the bias. Each computes a tile of logits and its
// gradient anew.
#pragma once

#include "cuda/gradients.h"
#include "cuda/tiled.h"

namespace swin_kernels::cuda {

// Of a query: the largest of its logits, what exp(s − largest) is divided by, Σ p·dp.
enum Statistic { kTop, kDivisor, kDelta, kStatistics };

template <class P, int Channels>
struct TiledBackwardMemory {
  using T = typename P::Element;
  using Sum = typename P::Sum;

  // of query, key, value and grad_out
  alignas(16) T tokens[4][kTile * TokenTile<T, Channels>::kPitch];
  LogitTile<Sum> logits;          // then weights, where those go through memory
  int64_t row_offsets[3][kTile];  // in the two tensors of the rows' tokens, and in a gradient's
  int64_t column_offsets[2][kTile];
  int64_t other_offsets[kTile];  // in a second gradient of the rows' tokens
  Sum norms[2][kTile];           // of queries and keys
  Sum statistics[kStatistics][kTile];
  WideSum<P> sums[4 * Channels];  // of warps
  TokenFacts rows, columns;
  alignas(16) char table_column[kColumnBytes];
};

// A gradient's channels, as many at a time as a tile holds. Behind unit vectors of more channels
// every one is computed twice: what x̂·dx̂ takes away is known only after the last.
template <int Channels>
struct Turns {
  int dim, turns, begin = 0;

  SWIN_DEVICE Turns(int dim, bool of_units) : dim(dim), turns(of_units && dim > Channels ? 2 : 1) {}

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
struct Pass {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  using Memory = TiledBackwardMemory<P, Channels>;

  const Backward& call;
  const Problem& p;
  Memory& memory;
  int lane, warp_row, tokens;
  int64_t head;
  Sum factor;
  HeadBias<Sum> bias;
  bool has_statistics;
  TilePlace place{};          // of the tile of logits
  int64_t window_number = 0;  // within its image
  Side<P, Channels> query, key, value, grad_out;

  SWIN_DEVICE Pass(const Backward& call, Memory& memory, int64_t head, bool has_statistics = true)
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
        query{memory.tokens[0],
              call.in.query,
              (Transposed ? memory.column_offsets : memory.row_offsets)[0],
              int(p.head_dim),
              nullptr,
              norms_or_null(0)},
        key{memory.tokens[1],
            call.in.key,
            (Transposed ? memory.row_offsets : memory.column_offsets)[0],
            int(p.head_dim),
            &call.in.pad_key,
            norms_or_null(1)},
        value{memory.tokens[2],
              call.in.value,
              (Transposed ? memory.row_offsets : memory.column_offsets)[1],
              int(p.value_dim),
              &call.in.pad_value,
              nullptr},
        grad_out{memory.tokens[3],
                 call.grad_out,
                 (Transposed ? memory.column_offsets : memory.row_offsets)[1],
                 int(p.value_dim),
                 nullptr,
                 nullptr} {}

  SWIN_DEVICE Sum* norms_or_null(int which) {
    return call.in.logit_scale.data != nullptr ? memory.norms[which] : nullptr;
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

  SWIN_DEVICE void load_statistics(int64_t window, int first_query) {
    const Sum* from =
        static_cast<const Sum*>(call.statistics) + (window * p.heads + head) * kStatistics * tokens;
    for (int i = thread_index(); i < kStatistics * kTile; i += block_threads()) {
      const int which = i / kTile, query = first_query + i % kTile;
      memory.statistics[which][i % kTile] = query < tokens ? from[which * tokens + query] : Sum(0);
    }
  }

  // To tokens [first, first + kTile) of a window, as rows; `grads` are views of their gradients.
  SWIN_DEVICE void go_to_rows(const WindowPlace& at, int64_t window, int first,
                              const TokenView& grad, const TokenView& other) {
    block_barrier();  // the rows before were read
    const TokenView* const views[3] = {&rows(false).view, &rows(true).view, &grad};
    place_tokens(memory.row_offsets, views, p, at, head, first);
    const TokenView* const others[1] = {&other};
    place_tokens(reinterpret_cast<int64_t (&)[1][kTile]>(memory.other_offsets), others, p, at, head,
                 first);
    note_tokens(memory.rows, p, first);
    if (!Transposed && has_statistics) load_statistics(window, first);
    block_barrier();
    rows(false).held = rows(true).held = -1;
    divide_by_norms(rows(false));
  }

  SWIN_DEVICE void go_to_columns(const WindowPlace& at, int64_t window, int first_row, int first) {
    block_barrier();  // the columns before were read
    const TokenView* const views[2] = {&columns(false).view, &columns(true).view};
    place_tokens(memory.column_offsets, views, p, at, head, first);
    note_tokens(memory.columns, p, first);
    if (Transposed) load_statistics(window, first);
    block_barrier();
    place = TilePlace{first_row, first, &memory.rows, &memory.columns};
    window_number = at.number(p);
    fill_bias<Transposed>(memory.logits, bias, place, tokens);
    columns(false).held = columns(true).held = -1;
    divide_by_norms(columns(false));
  }

  SWIN_DEVICE void logits(Sum (&s)[kKeyTiles][4], int seams, int tiles) {
    clear<P>(s);
    multiply_sides(s, rows(false), columns(false), call.in, head, warp_row, tiles, lane);
    add_logits(s, memory.logits, factor, warp_row, tiles, lane);
    add_shift_mask(s, Sum(call.in.mask_value), place, seams, warp_row, tiles, lane);
    add_mask<Transposed>(s, call.in.mask, window_number, memory.logits, place, tokens, warp_row,
                         tiles, lane);
  }

  // The gradient of probabilities; `kept` is what dropout multiplies them by.
  SWIN_DEVICE void probability_gradients(Sum (&dp)[kKeyTiles][4], int tiles) {
    clear<P>(dp);
    multiply_sides(dp, rows(true), columns(true), call.in, head, warp_row, tiles, lane);
  }
  SWIN_DEVICE Sum kept_factor(int64_t window, int first_row, int first_column, int row,
                              int column) {
    if (call.in.dropout_threshold == 0) return 1;
    const int r = first_row + row, c = first_column + column;
    return kept(call.in, window, head, Transposed ? c : r, Transposed ? r : c)
               ? Sum(call.in.kept_factor)
               : Sum(0);
  }

  // What dropout keeps of the probabilities of a tile, and the gradient of its logits.
  SWIN_DEVICE void tile_gradients(Sum (&weights)[kKeyTiles][4], Sum (&ds)[kKeyTiles][4],
                                  int64_t window, int seams, int first_row, int first_column,
                                  int tiles) {
    logits(weights, seams, tiles);
    probability_gradients(ds, tiles);
    const Lane own(lane);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      if (n >= tiles) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + own.row(e), column = n * kColumns + own.column(e);
        const int i = Transposed ? column : row;
        const Sum prob = divided<P>(exponential<P>(weights[n][e] - memory.statistics[kTop][i]),
                                    memory.statistics[kDivisor][i]);
        const Sum kept = kept_factor(window, first_row, first_column, row, column);
        ds[n][e] = prob * (ds[n][e] * kept - memory.statistics[kDelta][i]);
        weights[n][e] = prob * kept;
      }
    }
  }

  // grad (16, channels) += weights (16, 8·tiles) times the tokens of a tile.
  template <int Tiles>
  SWIN_DEVICE void add_weighted(Sum (&grad)[Tiles][4], const Sum (&weights)[kKeyTiles][4],
                                const Side<P, Channels>& side, int tiles, int channel_tiles) {
    multiply_by_weights<P>(grad, weights, reinterpret_cast<T*>(memory.logits.numbers), warp_row,
                           side.from(0), tiles, channel_tiles, lane);
  }

  // From sums of ds times tokens to a gradient of queries or keys; false while x̂·dx̂ is not known.
  template <int Tiles>
  SWIN_DEVICE bool finish(Sum (&grad)[Tiles][4], WideSum<P> (&radial)[2], Side<P, Channels>& side,
                          const Turns<Channels>& turn) {
    if (side.norms == nullptr) {
      scale(grad, factor);
      return true;
    }
    if (turn.begin >= side.dim) return turn.last();  // values may have more channels
    bring(side, turn.begin, head, call.in.by_16_bytes);
    const bool once = turn.dim <= Channels;
    if (once || !turn.last()) {
      WideSum<P> part[2];
      radial_of<P>(part, grad, side.from(warp_row), turn.tiles(), lane);
      radial[0] += part[0];
      radial[1] += part[1];
    }
    if (turn.last())
      through_unit<P>(grad, side.from(warp_row), side.norms + warp_row, factor, radial,
                      turn.tiles(), lane);
    return turn.last();
  }
};

// Rows of the output of a pass over `begin` … of the channels of some tokens: through a tile whose
// rows of this warp nobody reads any more.
template <class P, int Channels, int Tiles>
SWIN_DEVICE void store_grad(typename P::Sum (&grad)[Tiles][4], typename P::Element* tile,
                            const TokenView& view, const int64_t (&offsets)[kTile], int warp_row,
                            int begin, int dim, bool by_16_bytes, int lane) {
  constexpr int kPitch = TokenTile<typename P::Element, Channels>::kPitch;
  put(tile + warp_row * kPitch, kPitch, grad, Tiles, lane);
  warp_barrier();
  store_rows<typename P::Element, Channels>(tile, view, offsets, warp_row, kRows, begin, dim,
                                            by_16_bytes, lane);
}

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

// Before the others: statistics (W, H, 3, N).
template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_statistics(SWIN_PARAMETER Backward call) {
  using Sum = typename P::Sum;
  auto& memory = *reinterpret_cast<TiledBackwardMemory<P, Channels>*>(shared_memory());
  const TileOfProgram own(call.in.problem);
  Pass<P, Channels, false> pass(call, memory, own.head, false);
  const WindowPlace at(pass.p, own.window);
  const int seams = at.seams(pass.p), tokens = pass.tokens, lane = pass.lane;
  pass.go_to_rows(at, own.window, own.first, call.grad_query, call.grad_query);

  Sum top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, delta[2] = {0, 0};
  for (int column = 0; column < tokens; column += kTile) {
    const int tiles = groups_in(tokens, column, kColumns);
    pass.go_to_columns(at, own.window, own.first, column);
    Sum s[kKeyTiles][4], dp[kKeyTiles][4];
    pass.logits(s, seams, tiles);
    pass.probability_gradients(dp, tiles);
    Sum higher[2] = {top[0], top[1]}, sums[2] = {0, 0}, products[2] = {0, 0}, base[2];
    for_each_logit(s, 0, tiles, lane,
                   [&](Sum& x, int, int e, int, int) { higher[e / 2] = fmax(higher[e / 2], x); });
    max_over_row(higher);
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = higher[r] == Sum(-INFINITY) ? Sum(0) : higher[r];
    for_each_logit(s, pass.warp_row, tiles, lane, [&](Sum& x, int n, int e, int i, int j) {
      const Sum weight = exponential<P>(x - base[e / 2]);
      sums[e / 2] += weight;
      products[e / 2] += weight * dp[n][e] * pass.kept_factor(own.window, own.first, column, i, j);
    });
    sum_over_row(sums);
    sum_over_row(products);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Sum shrink = exponential<P>(top[r] - base[r]);
      total[r] = total[r] * shrink + sums[r];
      delta[r] = delta[r] * shrink + products[r];
      top[r] = higher[r];
    }
  }
  Sum* to = static_cast<Sum*>(call.statistics) +
            (own.window * pass.p.heads + own.head) * kStatistics * tokens;
  const Lane place(lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = own.first + pass.warp_row + place.row(2 * r);
    if (place.member != 0 || i >= tokens) continue;
    to[kTop * tokens + i] = total[r] == 0 ? Sum(0) : top[r];
    to[kDivisor * tokens + i] = divisor<P>(total[r]);
    to[kDelta * tokens + i] = divided<P>(delta[r], divisor<P>(total[r]));
  }
}

template <class P, int Channels>
SWIN_KERNEL(128, 2)
tiled_grad_query(SWIN_PARAMETER Backward call) {
  using Sum = typename P::Sum;
  constexpr int kChannelTiles = Channels / kColumns;
  auto& memory = *reinterpret_cast<TiledBackwardMemory<P, Channels>*>(shared_memory());
  const TileOfProgram own(call.in.problem);
  Pass<P, Channels, false> pass(call, memory, own.head);
  const WindowPlace at(pass.p, own.window);
  const int seams = at.seams(pass.p), tokens = pass.tokens, lane = pass.lane;
  const int warp_row = pass.warp_row;
  pass.go_to_rows(at, own.window, own.first, call.grad_query, call.grad_query);

  Turns<Channels> turn(pass.query.dim, pass.query.norms != nullptr);
  WideSum<P> radial[2] = {0, 0};  // q̂·dq̂
  for (; !turn.done(); turn.next()) {
    Sum grad[kChannelTiles][4];
    clear<P>(grad);
    for (int column = 0; column < tokens; column += kTile) {
      const int tiles = groups_in(tokens, column, kColumns);
      pass.go_to_columns(at, own.window, own.first, column);
      Sum weights[kKeyTiles][4], ds[kKeyTiles][4];
      pass.tile_gradients(weights, ds, own.window, seams, own.first, column, tiles);
      bring(pass.key, turn.begin, own.head, call.in.by_16_bytes);
      pass.add_weighted(grad, ds, pass.key, tiles, turn.tiles());
    }
    if (!pass.finish(grad, radial, pass.query, turn)) continue;
    block_barrier();  // the keys were read
    store_grad<P, Channels>(grad, pass.key.tile, call.grad_query, memory.row_offsets[2], warp_row,
                            turn.begin, pass.query.dim, call.in.by_16_bytes, lane);
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
  Pass<P, Channels, true> pass(call, memory, own.head);
  const WindowPlace at(pass.p, own.window);
  const int seams = at.seams(pass.p), tokens = pass.tokens, lane = pass.lane;
  const int warp_row = pass.warp_row, head_dim = pass.key.dim, value_dim = pass.value.dim;
  pass.go_to_rows(at, own.window, own.first, call.grad_key, call.grad_value);

  // padding of this tile alone: a row (windows and tiles) of partial sums
  const int64_t row = own.window * tile_count(tokens) + own.first / kTile;
  const int64_t partial = row * pass.p.heads + own.head;
  Turns<Channels> turn(head_dim > value_dim ? head_dim : value_dim, pass.key.norms != nullptr);
  WideSum<P> radial[2] = {0, 0};  // k̂·dk̂
  for (; !turn.done(); turn.next()) {
    const int begin = turn.begin, tiles_out = turn.tiles();
    Sum grad_key[kChannelTiles][4], grad_value[kChannelTiles][4];
    clear<P>(grad_key);
    clear<P>(grad_value);
    for (int column = 0; column < tokens; column += kTile) {
      const int tiles = groups_in(tokens, column, kColumns);
      pass.go_to_columns(at, own.window, own.first, column);
      Sum weights[kKeyTiles][4], ds[kKeyTiles][4];
      pass.tile_gradients(weights, ds, own.window, seams, own.first, column, tiles);
      if (begin < value_dim) {
        bring(pass.grad_out, begin, own.head, call.in.by_16_bytes);
        pass.add_weighted(grad_value, weights, pass.grad_out, tiles, tiles_out);
      }
      if (begin < head_dim) {
        bring(pass.query, begin, own.head, call.in.by_16_bytes);
        pass.add_weighted(grad_key, ds, pass.query, tiles, tiles_out);
      }
    }
    if (!pass.finish(grad_key, radial, pass.key, turn)) continue;
    PaddingSum<P, kChannelTiles> padding;
    block_barrier();  // queries and gradients of the output were read
    if (begin < head_dim) {
      if (call.partial_pad_key != nullptr) {
        padding.clear();
        padding.add(grad_key, memory.row_offsets[0] + warp_row, lane);
        padding.write(static_cast<WideSum<P>*>(call.partial_pad_key) + partial * head_dim + begin,
                      memory.sums, head_dim - begin, lane);
      }
      store_grad<P, Channels>(grad_key, pass.query.tile, call.grad_key, memory.row_offsets[2],
                              warp_row, begin, head_dim, call.in.by_16_bytes, lane);
    }
    if (begin < value_dim) {
      if (call.partial_pad_value != nullptr) {
        padding.clear();
        padding.add(grad_value, memory.row_offsets[1] + warp_row, lane);
        padding.write(
            static_cast<WideSum<P>*>(call.partial_pad_value) + partial * value_dim + begin,
            memory.sums, value_dim - begin, lane);
      }
      store_grad<P, Channels>(grad_value, pass.grad_out.tile, call.grad_value, memory.other_offsets,
                              warp_row, begin, value_dim, call.in.by_16_bytes, lane);
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
  Pass<P, Channels, false> pass(call, memory, head);
  const int tokens = pass.tokens, lane = pass.lane;
  const int tiles = groups_in(tokens, first_column, kColumns);

  Sum sum[kKeyTiles][4];
  clear<P>(sum);
  const int64_t windows = p.batch * p.windows();
  int64_t window = run * call.windows_per_program;
  const int64_t last =
      window + call.windows_per_program < windows ? window + call.windows_per_program : windows;
  for (WindowPlace at(p, window); window < last; ++window, at.next(p)) {
    pass.go_to_rows(at, window, first_row, call.grad_query, call.grad_query);
    pass.go_to_columns(at, window, first_row, first_column);
    Sum weights[kKeyTiles][4], ds[kKeyTiles][4];
    pass.tile_gradients(weights, ds, window, at.seams(p), first_row, first_column, tiles);
    for_each_logit(ds, 0, tiles, lane, [&](Sum& x, int n, int e, int, int) { sum[n][e] += x; });
  }
  write_bias(static_cast<Sum*>(call.partial_bias) + program * tokens * tokens, sum, tokens,
             first_row + pass.warp_row, first_column, lane);
}

}  // namespace swin_kernels::cuda
