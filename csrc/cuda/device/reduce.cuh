// Second passes: rows of partial sums added up in one order always, and a table's gradient gathered
// from that of the bias.
#pragma once

#include "cuda/device/load_store.cuh"

namespace swin_kernels::cuda {

constexpr int kRowsAtOnce = 256;

// (rows, numbers) to (rows / kRowsAtOnce, numbers): a thread a number. The last pass writes what is
// left, one row, in the dtype wanted.
struct RowSum {
  const void* partial = nullptr;
  void* to = nullptr;
  Element element = Element::kFloat;  // of `to`
  int64_t rows = 0, numbers = 0;
  // fp16 under cosine attention: the gradient of a zero vector of padding is held within its range
  FloatView pad;
  int64_t pad_dim = 0;
};

struct TableGather {
  const void* dense = nullptr;  // (H, N, N)
  void* to = nullptr;           // (T, H)
  Element element = Element::kFloat;
  Bias bias;
  Problem problem;
};

template <class Sum>
SWIN_DEVICE void write(void* to, Element element, int64_t at, Sum x) {
  as_element(element, [&](auto type) {
    using T = decltype(type);
    static_cast<T*>(to)[at] = rounded<T>(x);
  });
}

// Whether a head's padding holds a vector that cosine attention clamps the norm of.
template <class Sum>
SWIN_DEVICE bool pad_is_zero(const FloatView& pad, int64_t head, int64_t dim) {
  Sum squares = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const Sum x = read<Sum>(pad, head, c);
    squares += x * x;
  }
  return sqrt(squares) <= Sum(kNormClamp);
}

template <class Sum>
SWIN_KERNEL(128, 8)
sum_rows(SWIN_PARAMETER RowSum call) {
  const int64_t columns = (call.numbers + block_threads() - 1) / block_threads();
  const int64_t number = block_index() % columns * block_threads() + thread_index();
  const int64_t group = block_index() / columns;
  if (number >= call.numbers) return;
  const int64_t first = group * kRowsAtOnce;
  const int64_t last = first + kRowsAtOnce < call.rows ? first + kRowsAtOnce : call.rows;
  const Sum* partial = static_cast<const Sum*>(call.partial);
  Sum total = 0;
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) total += partial[row * call.numbers + number];
  if (call.pad.data != nullptr && pad_is_zero<Sum>(call.pad, number / call.pad_dim, call.pad_dim))
    total = fmin(fmax(total, Sum(-65504)), Sum(65504));
  write(call.to, call.element, group * call.numbers + number, total);
}

// grad[t, h] = Σ dense[h, i, j] over the pairs that meet in row t. A geometric table has at most
// one key for a row and a query, so it runs over queries; with an index every pair is compared. A
// warp a row.
template <class Sum>
SWIN_KERNEL(128, 8)
gather_table(SWIN_PARAMETER TableGather call) {
  const Problem& p = call.problem;
  const int tokens = int(p.tokens()), lane = thread_index() % kWarp;
  const int64_t own = block_index() * (block_threads() / kWarp) + thread_index() / kWarp;
  if (own >= call.bias.rows * p.heads) return;
  const int64_t row = own / p.heads, head = own % p.heads;
  const Sum* dense = static_cast<const Sum*>(call.dense) + head * tokens * tokens;
  Sum total = 0;
  if (call.bias.kind == BiasKind::kTable) {
    // Δ on each axis: place of the query minus place of the key
    int64_t delta[kAxes], rest = row;
    for (int a = kAxes - 1; a >= 0; --a) {
      const int64_t length = 2 * p.axis[a].window - 1;
      delta[a] = rest % length - (p.axis[a].window - 1);
      rest /= length;
    }
    for (int i = lane; i < tokens; i += kWarp) {
      const TokenPlace query(p, i);
      int64_t j = 0;
      bool meets = true;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t place = query.place[a] - delta[a];
        meets = meets && place >= 0 && place < p.axis[a].window;
        j = j * p.axis[a].window + place;
      }
      if (meets) total += dense[int64_t(i) * tokens + j];
    }
  } else {
    for (int64_t pair = lane; pair < int64_t(tokens) * tokens; pair += kWarp)
      if (call.bias.row_of(pair / tokens, pair % tokens) == row) total += dense[pair];
  }
  total = sum_over_lanes<1, kWarp>(total);
  if (lane == 0) write(call.to, call.element, row * p.heads + head, total);
}

}  // namespace swin_kernels::cuda
