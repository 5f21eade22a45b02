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

// Vectors of 64 bytes take two passes of a multiplier on some processors, those of 32 one: the last
// vector of a row of queries may be half as wide, so that 49 of them take 56 lanes and not 64.
constexpr bool kHalves = SWIN_VECTOR_BYTES == 64;
template <class T>
struct HalfLanes {
  typedef T Vec __attribute__((vector_size(SWIN_VECTOR_BYTES / 2)));
};
template <class T>
using HalfVec = typename HalfLanes<T>::Vec;

#define SWIN_INLINE inline __attribute__((always_inline))

SWIN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
SWIN_INLINE int64_t round_up(int64_t n) {
  return (n + Lanes<T>::kCount - 1) / Lanes<T>::kCount * Lanes<T>::kCount;
}

// Lanes for n queries: whole vectors, of which the last may be half.
template <class T>
SWIN_INLINE int64_t round_queries(int64_t n) {
  constexpr int64_t kHalf = Lanes<T>::kCount / (kHalves ? 2 : 1);
  return n <= kHalf ? Lanes<T>::kCount : (n + kHalf - 1) / kHalf * kHalf;
}

// V is a vector of any width.
template <class V, class T>
SWIN_INLINE V load_vector(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
SWIN_INLINE void store_vector(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
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

// x > y ? x : y, lane by lane, which compilers do not take for the instruction that does it.
template <class V>
SWIN_INLINE V larger(V x, V y) {
#if SWIN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)y);
#endif
  return x > y ? x : y;
}

// exp(x) for x <= 0, 0 where the result would be near or among the subnormal numbers: −100 of a
// shift mask would otherwise make every product with it several times slower. 2^n·2^r with |r| <=
// 1/2; the polynomial is fitted to the least relative error (2e-9) of 2^r = 1 + r·(…), and errs by
// less than 1.5 units of the last place down to x = −5, where rounding x·log2(e) begins to show.
template <class V>
SWIN_INLINE V exp_flushed_float(V x) {
  typedef int32_t Int __attribute__((vector_size(sizeof(V))));
  constexpr float kLog2E = 1.44269504088896341f, kLowest = -87.f;
  constexpr float kRound =
      12582912.f;  // 1.5·2^23: a sum with it has a whole number in its low bits
  const V rounded = x * kLog2E + kRound;
  const V r = x * kLog2E - (rounded - kRound);
  V p = r * 1.5353362e-4f + 1.3398875e-3f;
  p = p * r + 9.618437e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.931472e-1f;
  p = p * r + 1.0f;
  // kRound leaves nothing above n in the low bits; a NaN stays one through the product
  const Int power = ((Int)rounded << 23) + (127 << 23);
  const V result = p * (V)power;
  return x < kLowest ? V{} : result;
}

template <class V>
SWIN_INLINE V exp_flushed(V x) {
  using T = std::remove_cvref_t<decltype(x[0])>;
  if constexpr (std::is_same_v<T, float>) {
    return exp_flushed_float(x);
  } else {
    constexpr T kLowest = -708.39;
    V result;
    for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
      result[i] = x[i] < kLowest ? 0.0 : std::exp(x[i]);
    return result;
  }
}

template <class T, size_t... I>
SWIN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>, bool high) {
  constexpr int kCount = Lanes<T>::kCount;
  return high ? __builtin_shufflevector(a, b, ((I % 2 ? kCount : 0) + kCount / 2 + I / 2)...)
              : __builtin_shufflevector(a, b, ((I % 2 ? kCount : 0) + I / 2)...);
}

// to(columns, rows) = fromᵀ, where row i of `from` begins at from[i]; both counts are multiples of
// the lanes, and rows from `used` on are zero. log2(lanes) perfect shuffles of the rows transpose a
// square block.
template <class T>
void transpose(const T* const* from, int64_t used, int64_t rows, int64_t columns, T* to,
               int64_t ld_to) {
  constexpr int kCount = Lanes<T>::kCount;
  constexpr auto kSequence = std::make_index_sequence<kCount>();
  for (int64_t i0 = 0; i0 < rows; i0 += kCount) {
    if (used - i0 <= 1) {  // 49 tokens end so: one row is no work for a square of shuffles
      for (int64_t j = 0; j < columns; ++j) {
        Vec<T> only{};
        if (used > i0) only[0] = from[i0][j];
        store(to + j * ld_to + i0, only);
      }
      continue;
    }
    for (int64_t j0 = 0; j0 < columns; j0 += kCount) {
      Vec<T> a[kCount], b[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) a[i] = load(from[i0 + i] + j0);
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
