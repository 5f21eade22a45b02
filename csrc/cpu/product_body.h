// Products of small matrices whose result stays in registers over the depth. Included once per
// instruction set.

constexpr int kMaxRows = 6;
constexpr int kMaxColumns = SWIN_COLUMN_VECTORS;

// Two neighbours along the depth of a product, for the instructions that multiply both at once.
struct Pair {
  BFloat16 low, high;
};

// What the products of one kernel multiply: numbers one by one,
template <class T>
struct Singles {
  using Sum = T;
  using Element = T;  // of tokens' rows
  using Factor = T;   // of one step along the depth
  static constexpr int64_t kPer = 1;
};
// or bf16 numbers two by two, with sums in float.
struct Pairs {
  using Sum = float;
  using Element = BFloat16;
  using Factor = Pair;
  static constexpr int64_t kPer = 2;
};

// A factor in every lane.
template <class A>
SWIN_INLINE Vec<typename A::Sum> broadcast(const typename A::Factor* x) {
  if constexpr (A::kPer == 1) {
    return splat(*x);
#if defined(SWIN_BFLOAT16)
  } else {
    float bits;
    std::memcpy(&bits, x, sizeof bits);
    return (Vec<float>)_mm512_maskz_broadcastss_ps(0xFFFF, _mm_set_ss(bits));
#endif
  }
}

// sum += x·panel, lane by lane
template <class A, class V>
SWIN_INLINE void multiply_add(V& sum, V x, V panel) {
  if constexpr (A::kPer == 1) {
    sum += x * panel;
#if defined(SWIN_BFLOAT16)
  } else if constexpr (sizeof(V) == 64) {
    sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)panel);
  } else {
    sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)panel);
#endif
  }
}

template <class T, size_t... I>
SWIN_INLINE HalfVec<T> low_half(Vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I)...);
}

// The left factor, read a number (or pair) at a time: (row, step) at rows[row][step], or, without
// rows, at data[row·row_stride + step·step_stride], so that a transposed one costs nothing.
template <class F>
struct Left {
  const F* const* rows = nullptr;
  const F* data = nullptr;
  int64_t row_stride = 0, step_stride = 1;

  const F* row(int64_t r) const { return rows != nullptr ? rows[r] : data + r * row_stride; }
};

// The right factor, read a vector at a time: step k begins at rows[k] + column.
template <class F>
struct Right {
  const F* const* rows;
  int64_t column = 0;
};

// A matrix read and written a vector at a time; rows start `stride` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  operator Rows<const T>() const { return {data, stride}; }
};

// result(rows, columns) = start + factor·left·right, from zero where start has no data; `columns`
// is a multiple of the lanes. Row r of the result begins at result[r].
template <class A>
struct Product {
  using T = typename A::Sum;
  using F = typename A::Factor;
  Left<F> left;
  Right<F> right;
  int64_t depth;
  T* const* result;
  int64_t rows, columns;
  T factor = 1;
  const T* row_factors = nullptr;  // a further factor for each row
  Rows<const T> start = {};
  bool adds = false;  // the start is the result itself
};

// Columns and steps of a product that one run of tiles covers; `rows` of it from `row` on, R at a
// time.
template <class A>
struct Panel {
  int64_t column, first_step, depth, row, rows;
  bool adds;
};

// R rows and C vectors, and half a one with kTail, in registers over the depth; asks for one of the
// lines each step.
template <class A, int R, int C, bool kTail, bool kAsks>
SWIN_INLINE void product_tile(const Product<A>& p, const Panel<A>& panel_of, int64_t row,
                              Lines lines) {
  using T = typename A::Sum;
  using F = typename A::Factor;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t left_step = p.left.step_stride, column = panel_of.column, depth = panel_of.depth;
  const F* left[R];
  for (int r = 0; r < R; ++r) left[r] = p.left.row(row + r) + panel_of.first_step * left_step;
  const F* const* right = p.right.rows + panel_of.first_step;
  const int64_t right_column = p.right.column + column;
  Vec<T> sum[R][C];
  HalfVec<T> tail[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) sum[r][v] = Vec<T>{};
    tail[r] = HalfVec<T>{};
  }
  for (int64_t k = 0, step = 0; k < depth; ++k, step += left_step) {
    if (kAsks) lines.ask(k);
    const F* from = right[k] + right_column;
    Vec<T> panel[C];
    HalfVec<T> panel_tail;
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) panel[v] = load_vector<Vec<T>>(from + v * kCount);
    if constexpr (kTail) panel_tail = load_vector<HalfVec<T>>(from + C * kCount);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast<A>(left[r] + step);
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) multiply_add<A>(sum[r][v], x, panel[v]);
      if constexpr (kTail)
        multiply_add<A>(tail[r], low_half<T>(x, std::make_index_sequence<kCount / 2>()),
                        panel_tail);
    }
  }
  const auto finish_all = [&](auto starts) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T* result = p.result[row + r] + column;
      const T* start = panel_of.adds ? result : p.start.data + (row + r) * p.start.stride + column;
      const T factor = p.row_factors == nullptr ? p.factor : p.factor * p.row_factors[row + r];
      const auto finish = [&](auto sum, int64_t place) {
        using V = decltype(sum);
        sum *= factor;
        if constexpr (starts) sum += load_vector<V>(start + place);
        store_vector(result + place, sum);
      };
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) finish(sum[r][v], v * kCount);
      if constexpr (kTail) finish(tail[r], C * kCount);
    }
  };
  if (panel_of.adds || p.start.data != nullptr) {
    finish_all(std::true_type());
  } else {
    finish_all(std::false_type());
  }
}

template <class A, int R, int C, bool kTail>
void product_tiles(const Product<A>& p, const Panel<A>& panel, Ahead& ahead) {
  for (int64_t row = panel.row; row < panel.row + panel.rows; row += R) {
    const Lines lines = ahead.take(panel.depth);
    if (lines.base != nullptr) {
      product_tile<A, R, C, kTail, true>(p, panel, row, lines);
    } else {
      product_tile<A, R, C, kTail, false>(p, panel, row, lines);
    }
  }
}

// One with half a vector has fewer whole ones, for want of registers.
template <class A, bool kTail, size_t... I>
void run_tiles(const Product<A>& p, const Panel<A>& panel, int64_t height, int64_t vectors,
               Ahead& ahead, std::index_sequence<I...>) {
  constexpr int kMost = kMaxColumns - kTail;
  constexpr void (*kTable[])(const Product<A>&, const Panel<A>&, Ahead&) = {
      &product_tiles<A, int(I) / kMost + 1, int(I) % kMost + 1, kTail>...};
  if (panel.rows > 0) kTable[(height - 1) * kMost + vectors - 1](p, panel, ahead);
}

// Steps that are summed in a register before they are added to the result: a chain of 576 roundings
// errs three times as much as nine of 64.
constexpr int64_t kMaxDepth = 64;

// Tiles are of even size: 49 rows are 4 tiles of 6 and 5 of 5, not 8 and a lone row.
template <class A>
void multiply(const Product<A>& p, Ahead& ahead) {
  constexpr int64_t kCount = Lanes<typename A::Sum>::kCount;
  const int64_t whole = p.columns / kCount, vectors = (p.columns + kCount - 1) / kCount;
  const int64_t row_tiles = (p.rows + kMaxRows - 1) / kMaxRows;
  const int64_t height = row_tiles > 0 ? (p.rows + row_tiles - 1) / row_tiles : 1;
  const int64_t tall = p.rows - row_tiles * (height - 1);  // tiles of that height; others are less
  const int64_t column_tiles = (vectors + kMaxColumns - 1) / kMaxColumns;
  const int64_t depth_tiles = (p.depth + kMaxDepth - 1) / kMaxDepth;
  for (int64_t ct = 0; ct < column_tiles; ++ct) {
    const int64_t v0 = vectors * ct / column_tiles, v1 = vectors * (ct + 1) / column_tiles;
    for (int64_t dt = 0; dt < depth_tiles; ++dt) {
      const int64_t k0 = p.depth * dt / depth_tiles, k1 = p.depth * (dt + 1) / depth_tiles;
      const auto run = [&](int64_t row, int64_t rows, int64_t height) {
        const Panel<A> panel = {v0 * kCount, k0, k1 - k0, row, rows, p.adds || dt > 0};
        if constexpr (kHalves) {
          constexpr auto kTiles = std::make_index_sequence<kMaxRows*(kMaxColumns - 1)>();
          if (v1 > whole) return run_tiles<A, true>(p, panel, height, v1 - v0 - 1, ahead, kTiles);
        }
        constexpr auto kTiles = std::make_index_sequence<kMaxRows * kMaxColumns>();
        run_tiles<A, false>(p, panel, height, v1 - v0, ahead, kTiles);
      };
      run(0, tall * height, height);
      run(tall * height, p.rows - tall * height, height - 1);
    }
  }
}
