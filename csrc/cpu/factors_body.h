// The factors of an attention's products as `Singles` and `Pairs` read them: tokens along the
// channels and along the tokens, weights along the keys and along the queries. Included once per
// instruction set.

// Steps along a depth of n.
template <class A>
constexpr int64_t steps(int64_t n) {
  return (n + A::kPer - 1) / A::kPer;
}

// The rows of tokens as factors whose steps are channels.
template <class A>
const typename A::Factor* const* over_channels(const TokenRows<typename A::Element>& tokens) {
  return reinterpret_cast<const typename A::Factor* const*>(tokens.rows());
}

// The transposed rows of tokens: a step along the channels a row, a token a lane.
template <class A>
class Transposed {
 public:
  using T = typename A::Sum;

  Transposed(int64_t width, int64_t channels, Scratch& scratch)
      : width_(width),
        depth_(round_up<T>(steps<A>(channels))),
        data_(scratch.take<T>(depth_ * width)),
        rows_(row_pointers(data_, width, depth_, scratch)) {}

  // `count` tokens, zeros behind them.
  void fill(const TokenRows<typename A::Element>& tokens, int64_t count) {
    static_assert(sizeof(typename A::Factor) == sizeof(T), "a factor takes the place of a number");
    transpose<T>(reinterpret_cast<const T* const*>(tokens.rows()), count, round_up<T>(count),
                 depth_, data_, width_);
  }

  const typename A::Factor* const* rows() const {
    return reinterpret_cast<const typename A::Factor* const*>(rows_);
  }

 private:
  int64_t width_, depth_;
  T* data_;
  T* const* rows_;
};

// The rows of tokens as factors whose steps are tokens: as they are, but for pairs.
template <class A>
class OverTokens {
 public:
  using Factor = typename A::Factor;
  OverTokens(const Map&, int64_t, Scratch&) {}
  const Factor* const* fill(const TokenRows<Factor>& tokens, int64_t first, int64_t) {
    return tokens.rows() + first;
  }
};

// Weights or their gradients, sums (keys, queries), as left factors: as they are, but for
// pairs.
template <class A>
class WeightFactors {
 public:
  using T = typename A::Sum;
  WeightFactors(int64_t, int64_t, Scratch&) {}

  // Row i a query; steps are keys.
  Left<T> over_keys(Rows<const T> x, int64_t /*keys*/, int64_t /*columns*/) {
    return {.data = x.data, .row_stride = 1, .step_stride = x.stride};
  }
  // Row j a key; steps are queries.
  Left<T> over_queries(Rows<const T> x, int64_t /*keys*/, int64_t /*queries*/) {
    return {.data = x.data, .row_stride = x.stride};
  }
};

#if defined(SWIN_BFLOAT16)
// (low₀, high₀, low₁, high₁, …) of the two halves (low, high).
SWIN_INLINE __m512i interleaved(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_maskz_permutexvar_epi16(~__mmask32(0), order, halves);
}

// Each channel beside the next token's.
template <>
class OverTokens<Pairs> {
 public:
  OverTokens(const Map& map, int64_t tokens, Scratch& scratch)
      : width_(TokenRows<BFloat16>::width_of(map)),
        data_(scratch.take<Pair>(steps<Pairs>(tokens) * width_)),
        rows_(row_pointers(data_, width_, steps<Pairs>(tokens), scratch)) {}

  // Those from `first` on; every row behind the last token is zeros.
  const Pair* const* fill(const TokenRows<BFloat16>& tokens, int64_t first, int64_t count) {
    const BFloat16* const* row = tokens.rows() + first;
    for (int64_t t = 0; t < count; t += 2)
      for (int64_t c = 0; c < width_; c += Lanes<float>::kCount) {
        const __m256i low = load_vector<__m256i>(row[t] + c);
        const __m256i high =
            t + 1 < count ? load_vector<__m256i>(row[t + 1] + c) : _mm256_setzero_si256();
        store_vector(rows_[t / 2] + c, interleaved(_mm512_maskz_inserti64x4(
                                           ~__mmask8(0), _mm512_castsi256_si512(low), high, 1)));
      }
    return rows_;
  }

 private:
  int64_t width_;
  Pair* data_;
  Pair* const* rows_;
};

// Rounded, each weight beside its neighbour.
template <>
class WeightFactors<Pairs> {
 public:
  WeightFactors(int64_t keys, int64_t queries, Scratch& scratch)
      : queries_(queries),
        over_keys_(scratch.take<Pair>(steps<Pairs>(keys) * queries)),
        over_queries_(scratch.take<BFloat16>(keys * queries)) {}

  Left<Pair> over_keys(Rows<const float> x, int64_t keys, int64_t columns) {
    constexpr int64_t kCount = Lanes<float>::kCount;
    for (int64_t j = 0; j < keys; j += 2)
      for (int64_t c = 0; c < columns; c += kCount) {
        const Vec<float> low = load(x.data + j * x.stride + c);
        const Vec<float> high = j + 1 < keys ? load(x.data + (j + 1) * x.stride + c) : Vec<float>{};
        const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        store_vector(over_keys_ + j / 2 * queries_ + c, interleaved((__m512i)halves));
      }
    return {.data = over_keys_, .row_stride = 1, .step_stride = queries_};
  }

  Left<Pair> over_queries(Rows<const float> x, int64_t keys, int64_t queries) {
    constexpr int64_t kCount = Lanes<float>::kCount;
    for (int64_t j = 0; j < keys; ++j) {
      BFloat16* row = over_queries_ + j * queries_;
      for (int64_t c = 0; c < queries; c += kCount)
        store_as<float>(row + c, load(x.data + j * x.stride + c));
      if (queries % 2 != 0) row[queries] = BFloat16{};  // what lies there may be NaN, times zero
    }
    return {.data = reinterpret_cast<const Pair*>(over_queries_), .row_stride = queries_ / 2};
  }

 private:
  int64_t queries_;
  Pair* over_keys_;
  BFloat16* over_queries_;
};
#endif
