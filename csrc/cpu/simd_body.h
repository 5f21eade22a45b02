// Vectors of Sum (float or double) as wide as the instruction set, in the compilers' own vector
// types: arithmetic, exp, transposition and a register-tiled product. Included once per instruction
// set.

template <class T>
struct Lanes {
  typedef T Vec __attribute__((vector_size(SWIN_VECTOR_BYTES)));
  typedef T Loose __attribute__((vector_size(SWIN_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int64_t kCount = SWIN_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename Lanes<T>::Vec;

#define SWIN_INLINE inline __attribute__((always_inline))

template <class T>
SWIN_INLINE int64_t round_up(int64_t n) {
  return (n + Lanes<T>::kCount - 1) / Lanes<T>::kCount * Lanes<T>::kCount;
}

template <class T>
SWIN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Loose*>(p);
}

template <class T>
SWIN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Loose*>(p) = v;
}

template <class T>
SWIN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <int kStep, class T, size_t... I>
SWIN_INLINE Vec<T> rotated(Vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, ((int(I) + kStep) % int(sizeof...(I)))...);
}

// Folded in halves: as many steps as the lanes have bits.
template <class T, int kStep = int(Lanes<T>::kCount / 2)>
SWIN_INLINE T sum_of(Vec<T> v) {
  v += rotated<kStep, T>(v, std::make_index_sequence<Lanes<T>::kCount>());
  if constexpr (kStep == 1) {
    return v[0];
  } else {
    return sum_of<T, kStep / 2>(v);
  }
}

template <class T, int kStep = int(Lanes<T>::kCount / 2)>
SWIN_INLINE T max_of(Vec<T> v) {
  const Vec<T> other = rotated<kStep, T>(v, std::make_index_sequence<Lanes<T>::kCount>());
  v = v > other ? v : other;
  if constexpr (kStep == 1) {
    return v[0];
  } else {
    return max_of<T, kStep / 2>(v);
  }
}

// exp(x) for x <= 0, 0 where the result would be near or among the subnormal numbers: −100 of a
// shift mask would otherwise make every product with it several times slower. 2^n·2^r with |r| <=
// 1/2; the polynomial is fitted to the least relative error (2e-9) of 2^r = 1 + r·(…), and errs by
// less than 1.5 units of the last place down to x = −5, where rounding x·log2(e) begins to show.
SWIN_INLINE Vec<float> exp_flushed(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(SWIN_VECTOR_BYTES)));
  constexpr float kLog2E = 1.44269504088896341f, kLowest = -87.f;
  constexpr float kRound =
      12582912.f;  // 1.5·2^23: a sum with it has a whole number in its low bits
  const Vec<float> rounded = x * kLog2E + kRound;
  const Vec<float> r = x * kLog2E - (rounded - kRound);
  Vec<float> p = r * 1.5353362e-4f + 1.3398875e-3f;
  p = p * r + 9.618437e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.931472e-1f;
  p = p * r + 1.0f;
  // kRound leaves nothing above n in the low bits; a NaN stays one through the product
  const Int power = ((Int)rounded << 23) + (127 << 23);
  const Vec<float> result = p * (Vec<float>)power;
  return x < kLowest ? Vec<float>{} : result;
}

SWIN_INLINE Vec<double> exp_flushed(Vec<double> x) {
  constexpr double kLowest = -708.39;
  Vec<double> result;
  for (int64_t i = 0; i < Lanes<double>::kCount; ++i)
    result[i] = x[i] < kLowest ? 0.0 : std::exp(x[i]);
  return result;
}

template <class T, size_t... I>
SWIN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>, bool high) {
  constexpr int kCount = Lanes<T>::kCount;
  return high ? __builtin_shufflevector(a, b, ((I % 2 ? kCount : 0) + kCount / 2 + I / 2)...)
              : __builtin_shufflevector(a, b, ((I % 2 ? kCount : 0) + I / 2)...);
}

// to(columns, rows) = factor·from(rows, columns)ᵀ; both counts multiples of the lanes.
// log2(lanes) perfect shuffles of the rows transpose a square block.
template <class T>
void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t columns, T factor, T* to,
               int64_t ld_to) {
  constexpr int kCount = Lanes<T>::kCount;
  constexpr auto kSequence = std::make_index_sequence<kCount>();
  for (int64_t i0 = 0; i0 < rows; i0 += kCount) {
    for (int64_t j0 = 0; j0 < columns; j0 += kCount) {
      Vec<T> a[kCount], b[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) a[i] = load(from + (i0 + i) * ld_from + j0) * factor;
#pragma GCC unroll 4
      for (int step = 1; step < kCount; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount / 2; ++i) {
          b[2 * i] = interleave<T>(a[i], a[i + kCount / 2], kSequence, false);
          b[2 * i + 1] = interleave<T>(a[i], a[i + kCount / 2], kSequence, true);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) store(to + (j0 + i) * ld_to + i0, a[i]);
    }
  }
}

constexpr int kMaxRows = 6;
constexpr int kMaxColumns = SWIN_COLUMN_VECTORS;

// c(R, C vectors) = a(R, depth)·b(depth, C vectors), or += it: the tile stays in registers over the
// depth.
template <class T, int R, int C, bool kAdd>
void product_tile(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t ldb, int64_t depth,
                  T* c, int64_t ldc) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  Vec<T> sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) sum[r][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> panel[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) panel[v] = load(b + k * ldb + v * kCount);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T x = a[r * a_row + k * a_step];
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] += x * panel[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      T* home = c + r * ldc + v * kCount;
      store(home, kAdd ? Vec<T>(load(home) + sum[r][v]) : sum[r][v]);
    }
}

template <class T>
using ProductTile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, int64_t, T*, int64_t);

template <class T, bool kAdd, size_t... I>
constexpr ProductTile<T> product_tile_of(int rows, int columns, std::index_sequence<I...>) {
  constexpr ProductTile<T> kTable[] = {
      &product_tile<T, int(I) / kMaxColumns + 1, int(I) % kMaxColumns + 1, kAdd>...};
  return kTable[(rows - 1) * kMaxColumns + columns - 1];
}

// Steps that are summed in a register before they are added to c: a chain of 576 roundings errs
// three times as much as nine of 64.
constexpr int64_t kMaxDepth = 64;

// c(rows, columns) = a·b, or c += a·b. a is read at (row·a_row + step·a_step), so that aᵀ costs
// nothing; columns is a multiple of the lanes. Tiles are of even size: 49 rows are 9 tiles of 5 or
// 6, not 8 and a lone row.
template <class T, bool kAdd>
void product(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t ldb, int64_t depth,
             T* c, int64_t ldc, int64_t rows, int64_t columns) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr auto kTiles = std::make_index_sequence<kMaxRows * kMaxColumns>();
  const int64_t vectors = columns / kCount;
  const int64_t row_tiles = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t column_tiles = (vectors + kMaxColumns - 1) / kMaxColumns;
  const int64_t depth_tiles = (depth + kMaxDepth - 1) / kMaxDepth;
  for (int64_t ct = 0; ct < column_tiles; ++ct) {
    const int64_t v0 = vectors * ct / column_tiles, v1 = vectors * (ct + 1) / column_tiles;
    for (int64_t dt = 0; dt < depth_tiles; ++dt) {
      const int64_t k0 = depth * dt / depth_tiles, k1 = depth * (dt + 1) / depth_tiles;
      for (int64_t rt = 0; rt < row_tiles; ++rt) {
        const int64_t r0 = rows * rt / row_tiles, r1 = rows * (rt + 1) / row_tiles;
        const ProductTile<T> tile =
            kAdd || dt > 0 ? product_tile_of<T, true>(int(r1 - r0), int(v1 - v0), kTiles)
                           : product_tile_of<T, false>(int(r1 - r0), int(v1 - v0), kTiles);
        tile(a + r0 * a_row + k0 * a_step, a_row, a_step, b + k0 * ldb + v0 * kCount, ldb, k1 - k0,
             c + r0 * ldc + v0 * kCount, ldc);
      }
    }
  }
}
