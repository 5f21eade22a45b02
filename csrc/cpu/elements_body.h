// Numbers of the tokens' dtypes to and from Sum: one by one, a vector, a row. Included once per
// instruction set.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class Token>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

SWIN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
SWIN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class T>
SWIN_INLINE void convert(const T& from, T& to) {
  to = from;
}
SWIN_INLINE void convert(const float& from, double& to) { to = from; }
SWIN_INLINE void convert(const double& from, float& to) { to = float(from); }
SWIN_INLINE void convert(const BFloat16& from, float& to) {
  to = bits_to_float(uint32_t(from.bits) << 16);
}
SWIN_INLINE void convert(const float& from, BFloat16& to) {
  const uint32_t bits = float_to_bits(from);
  const uint32_t rounded =
      (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t(from != from ? 0x7FC0u : rounded);
}

#if defined(SWIN_F16C)
SWIN_INLINE void convert(const Half& from, float& to) { to = _cvtsh_ss(from.bits); }
SWIN_INLINE void convert(const float& from, Half& to) {
  to.bits = uint16_t(_cvtss_sh(from, _MM_FROUND_TO_NEAREST_INT));
}
#else
SWIN_INLINE void convert(const Half& from, float& to) {
  const uint32_t sign = uint32_t(from.bits & 0x8000u) << 16, rest = from.bits & 0x7FFFu;
  if (rest >= 0x7C00u) {
    to = bits_to_float(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));
  } else if (rest >= 0x400u) {
    to = bits_to_float(sign | ((rest << 13) + (112u << 23)));
  } else {
    const float magnitude = float(rest) * 5.9604644775390625e-8f;  // 2^-24, the unit of subnormals
    to = bits_to_float(sign | float_to_bits(magnitude));
  }
}
SWIN_INLINE void convert(const float& from, Half& to) {
  const uint32_t bits = float_to_bits(from), sign = (bits >> 16) & 0x8000u,
                 rest = bits & 0x7FFFFFFFu;
  uint32_t result;
  if (rest > 0x7F800000u) {
    result = 0x7E00u;
  } else if (rest >= 0x477FF000u) {  // rounds to 65536 or more
    result = 0x7C00u;
  } else if (rest >= 0x38800000u) {
    const uint32_t rebased = rest - (112u << 23);
    result = (rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13;
  } else {
    // adding 0.5 leaves the subnormal's bits, rounded to even, at the bottom of the float
    result = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3F000000u;
  }
  to.bits = uint16_t(sign | result);
}
#endif
SWIN_INLINE void convert(const Half& from, double& to) {
  float x;
  convert(from, x);
  to = x;
}
SWIN_INLINE void convert(const BFloat16& from, double& to) {
  float x;
  convert(from, x);
  to = x;
}

// As many elements as Sum has lanes, side by side, from and to the dtype of the tokens.
typedef uint16_t Narrow __attribute__((vector_size(SWIN_VECTOR_BYTES / 2)));
typedef uint16_t LooseNarrow
    __attribute__((vector_size(SWIN_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Wide __attribute__((vector_size(SWIN_VECTOR_BYTES)));

template <class T, class Token>
SWIN_INLINE Vec<T> load_as(const Token* from) {
  if constexpr (std::is_same_v<Token, T>) {
    return load(from);
  } else if constexpr (std::is_same_v<Token, BFloat16> && std::is_same_v<T, float>) {
    const Narrow bits = *reinterpret_cast<const LooseNarrow*>(from);
    return (Vec<T>)(__builtin_convertvector(bits, Wide) << 16);
#if defined(SWIN_F16C) && SWIN_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<Token, Half> && std::is_same_v<T, float>) {
    return (Vec<T>)_mm512_maskz_cvtph_ps(
        0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(SWIN_F16C)
  } else if constexpr (std::is_same_v<Token, Half> && std::is_same_v<T, float>) {
    return (Vec<T>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  } else {
    Vec<T> v;
    for (int64_t i = 0; i < Lanes<T>::kCount; ++i) {
      T x;
      convert(from[i], x);
      v[i] = x;
    }
    return v;
  }
}

template <class T, class Token>
SWIN_INLINE void store_as(Token* to, Vec<T> v) {
  if constexpr (std::is_same_v<Token, T>) {
    store(to, v);
#if defined(SWIN_BFLOAT16)
  } else if constexpr (std::is_same_v<Token, BFloat16> && std::is_same_v<T, float>) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &narrow, sizeof narrow);
#endif
  } else if constexpr (std::is_same_v<Token, BFloat16> && std::is_same_v<T, float>) {
    const Wide bits = (Wide)v;
    const Wide rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Wide result = v == v ? rounded : Wide{} + 0x7FC0u;
    *reinterpret_cast<LooseNarrow*>(to) = __builtin_convertvector(result, Narrow);
#if defined(SWIN_F16C) && SWIN_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<Token, Half> && std::is_same_v<T, float>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(SWIN_F16C)
  } else if constexpr (std::is_same_v<Token, Half> && std::is_same_v<T, float>) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int64_t i = 0; i < Lanes<T>::kCount; ++i) convert(v[i], to[i]);
  }
}

// n elements, zeros behind them up to `width`.
template <class From, class To>
SWIN_INLINE void load_row(const From* from, int64_t stride, int64_t n, To* to, int64_t width) {
  int64_t i = 0;
  if constexpr (std::is_floating_point_v<To>) {
    constexpr int64_t kCount = Lanes<To>::kCount;
    for (; stride == 1 && i + kCount <= n; i += kCount) store(to + i, load_as<To>(from + i));
  }
  for (; i < n; ++i) convert(from[i * stride], to[i]);
  for (; i < width; ++i) to[i] = To{};
}

// factor·from
template <class Token, class T>
SWIN_INLINE void store_row(const T* from, T factor, int64_t n, Token* to) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) store_as<T>(to + i, Vec<T>(load(from + i) * factor));
  for (; i < n; ++i) convert(T(from[i] * factor), to[i]);
}

template <class T>
inline void load_mask_row(const MaskView& mask, int64_t window, int64_t row, int64_t n, T* to,
                          int64_t width) {
  const int64_t offset = window * mask.window + row * mask.row;
  switch (mask.element) {
    case Element::kFloat:
      return load_row(static_cast<const float*>(mask.data) + offset, mask.column, n, to, width);
    case Element::kDouble:
      return load_row(static_cast<const double*>(mask.data) + offset, mask.column, n, to, width);
    case Element::kHalf:
      return load_row(static_cast<const Half*>(mask.data) + offset, mask.column, n, to, width);
    case Element::kBFloat16:
      return load_row(static_cast<const BFloat16*>(mask.data) + offset, mask.column, n, to, width);
  }
}
