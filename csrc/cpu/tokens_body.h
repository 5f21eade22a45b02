// Tokens of one window: which they are, and their rows between the caller's memory and packed tiles
// of Sum. Included once per instruction set.

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

// Memory of one thread for the length of a call, in pieces that start on cache lines.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() {
    for (int i = 0; i < used_; ++i) std::free(pieces_[i]);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t n) {
    const size_t bytes = (size_t(n) * sizeof(T) + 63) / 64 * 64;
    void* piece = used_ < kMost ? std::aligned_alloc(64, bytes) : nullptr;
    if (piece == nullptr) throw std::bad_alloc();
    pieces_[used_++] = piece;
    return static_cast<T*>(piece);
  }

 private:
  static constexpr int kMost = 128;  // pieces that one thread takes
  void* pieces_[kMost];
  int used_ = 0;
};

// What a call reads and writes token by token; kOut is the output or its gradient.
enum MapName { kQuery, kKey, kValue, kOut, kGradQuery, kGradKey, kGradValue };
struct Map {
  const TokenView* view;
  int64_t channels;
};

// The tokens of one window of one image, and where they lie in each of the maps, by MapName.
struct Window {
  int64_t image = -1, index = -1;  // window within the image
  int64_t real = 0;                // tokens that are not padding
  int64_t end = 0;                 // one past the last of them
  int regions = 1;
  int64_t* token;   // (N): the real ones, in order
  int32_t* region;  // (N): 0 … regions − 1

  Window(const Problem& p, const Map* maps, int map_count, Scratch& scratch)
      : token(scratch.take<int64_t>(p.tokens())),
        region(scratch.take<int32_t>(p.tokens())),
        maps_(maps),
        map_count_(map_count),
        tokens_(p.tokens()),
        offset_(scratch.take<int64_t>(map_count * p.tokens())) {
    for (int a = 0; a < kAxes; ++a) {
      source_[a] = scratch.take<int64_t>(p.axis[a].window);
      side_[a] = scratch.take<int32_t>(p.axis[a].window);
    }
  }

  void place(const Problem& p, int64_t image_index, int64_t window_index) {
    const bool same_place = index == window_index;
    image = image_index;
    index = window_index;
    if (same_place) return;
    const int64_t n0 = p.axis[0].window, n1 = p.axis[1].window, n2 = p.axis[2].window;
    const int64_t c1 = p.axis[1].count(), c2 = p.axis[2].count();
    const int64_t place[kAxes] = {index / (c1 * c2), index / c2 % c1, index % c2};
    int sides[kAxes];
    bool whole = true;
    for (int a = 0; a < kAxes; ++a)
      sides[a] = place_axis(a, p.axis[a], place[a], p.roll_then_pad, whole);
    regions = sides[0] * sides[1] * sides[2];
    int64_t t = 0;
    for (int64_t i = 0; i < n0; ++i)
      for (int64_t j = 0; j < n1; ++j, t += n2) {
        const int32_t first = (side_[0][i] * sides[1] + side_[1][j]) * sides[2];
        for (int64_t k = 0; k < n2; ++k) region[t + k] = first + side_[2][k];
        for (int m = 0; m < map_count_; ++m) {
          const int64_t *stride = maps_[m].view->axis, s2 = stride[2];
          const int64_t row = source_[0][i] * stride[0] + source_[1][j] * stride[1];
          int64_t* offset = offset_ + m * tokens_ + t;
          for (int64_t k = 0; k < n2; ++k) offset[k] = row + source_[2][k] * s2;
        }
      }
    if (whole) {
      for (t = 0; t < tokens_; ++t) token[t] = t;
      real = end = tokens_;
    } else {
      mark_padding(n0, n1, n2);
    }
  }

  bool padding(int64_t t) const { return offset_[t] < 0; }
  const Map& map(MapName name) const { return maps_[name]; }
  int map_count() const { return map_count_; }
  int64_t tokens() const { return tokens_; }

  // Where the rows of one head begin; that of token t lies offsets(name)[t] elements on.
  template <class Token>
  Token* rows(MapName name, int64_t head, int64_t scale = 1) const {
    const TokenView& view = *maps_[name].view;
    return static_cast<Token*>(view.data) + (image * view.batch + head * view.head) * scale;
  }
  const int64_t* offsets(MapName name) const { return offset_ + name * tokens_; }

 private:
  // Where the window's tokens of one axis come from, −1 for padding, and on which side of the seam
  // they lie; returns how many sides it meets.
  int place_axis(int a, const Axis& axis, int64_t window, bool roll_then_pad, bool& whole) {
    const int64_t first = window * axis.window;
    const int region = axis.region(first);
    int sides = 1;
    for (int64_t i = 0; i < axis.window; ++i) {
      source_[a][i] = axis.source(first + i, roll_then_pad);
      whole = whole && source_[a][i] >= 0;
      side_[a][i] = axis.region(first + i) != region;  // a window meets at most two
      if (side_[a][i]) sides = 2;
    }
    return sides;
  }

  void mark_padding(int64_t n0, int64_t n1, int64_t n2) {
    real = end = 0;
    int64_t t = 0;
    for (int64_t i = 0; i < n0; ++i)
      for (int64_t j = 0; j < n1; ++j)
        for (int64_t k = 0; k < n2; ++k, ++t) {
          if (source_[0][i] >= 0 && source_[1][j] >= 0 && source_[2][k] >= 0) {
            token[real++] = t;
            end = t + 1;
          } else {
            for (int m = 0; m < map_count_; ++m) offset_[m * tokens_ + t] = -1;
          }
        }
  }

  const Map* maps_;
  int map_count_;
  int64_t tokens_;
  int64_t* offset_;  // (maps, N): −1 for padding
  int64_t* source_[kAxes];
  int32_t* side_[kAxes];
};

// The rows of one map's tokens in a window and head, as numbers E and in whole vectors: in the
// caller's memory where they lie so there, else packed.
template <class E>
class TokenRows {
 public:
  // `rows` of them at most; `copies` asks for rows of one's own that may be written to.
  TokenRows(const Map& map, int64_t rows, bool copies, Scratch& scratch)
      : width_(width_of(map)),
        plain_(!copies && map.view->channel == 1 && map.channels == width_),
        row_(scratch.take<const E*>(rows)),
        packed_(scratch.take<E>(rows * width_)),
        zero_(scratch.take<E>(width_)),
        rows_(rows) {
    std::memset(zero_, 0, size_t(width_) * sizeof(E));
  }

  static int64_t width_of(const Map& map) {
    constexpr int64_t kLanes = SWIN_VECTOR_BYTES / sizeof(E);
    return (map.channels + kLanes - 1) / kLanes * kLanes;
  }

  // The tokens of the window from the first to `end`, zeros behind them. Padding is `pad` (H, D) of
  // Sum, or zeros where that is null.
  template <class Token>
  void read(const Window& w, MapName name, int64_t head, int64_t end, const void* pad) {
    using T = typename SumOf<Token>::type;
    const int64_t channels = w.map(name).channels, stride = w.map(name).view->channel;
    const Token* home = w.rows<const Token>(name, head);
    const int64_t* offsets = w.offsets(name);
    const T* pad_row = pad == nullptr ? nullptr : static_cast<const T*>(pad) + head * channels;
    const bool plain = std::is_same_v<Token, E> && plain_;
    const bool whole = w.real == w.tokens();
    if (plain && whole)
      for (int64_t t = 0; t < end; ++t) row_[t] = reinterpret_cast<const E*>(home + offsets[t]);
    for (int64_t t = plain && whole ? end : 0; t < end; ++t) {
      E* packed = packed_ + t * width_;
      row_[t] = packed;
      if (!w.padding(t)) {
        if (plain) {
          row_[t] = reinterpret_cast<const E*>(home + offsets[t]);
        } else {
          load_row(home + offsets[t], stride, channels, packed, width_);
        }
      } else if (pad_row != nullptr) {
        load_row(pad_row, 1, channels, packed, width_);
      } else {
        row_[t] = zero_;
      }
    }
    for (int64_t t = end; t < rows_; ++t) row_[t] = zero_;
  }

  const E* const* rows() const { return row_; }
  E* packed(int64_t t) { return packed_ + t * width_; }
  int64_t width() const { return width_; }

 private:
  int64_t width_;
  bool plain_;
  const E** row_;
  E *packed_, *zero_;
  int64_t rows_;
};

// The rows that a kernel writes for tokens of one map, a window and a head: in the caller's memory
// where Sum in whole vectors lies there, else packed until `store`.
template <class T>
class ResultRows {
 public:
  // `copies` asks for rows of one's own, whatever the map.
  ResultRows(const Map& map, int64_t rows, bool copies, Scratch& scratch)
      : width_(round_up<T>(map.channels)),
        plain_(!copies && map.view->channel == 1 && map.channels == width_),
        row_(scratch.take<T*>(rows)),
        packed_(scratch.take<T>(rows * width_)) {}

  // Those of `count` tokens from `first` on.
  template <class Token>
  void aim(const Window& w, MapName name, int64_t head, int64_t first, int64_t count) {
    Token* home = w.rows<Token>(name, head);
    const int64_t* offsets = w.offsets(name) + first;
    const bool plain = std::is_same_v<Token, T> && plain_;
    if (plain && w.real == w.tokens()) {
      for (int64_t t = 0; t < count; ++t) row_[t] = reinterpret_cast<T*>(home + offsets[t]);
      return;
    }
    for (int64_t t = 0; t < count; ++t) {
      const bool direct = plain && !w.padding(first + t);
      row_[t] = direct ? reinterpret_cast<T*>(home + offsets[t]) : packed_ + t * width_;
    }
  }

  template <class Token>
  void store(const Window& w, MapName name, int64_t head, int64_t first, int64_t count) const {
    if (std::is_same_v<Token, T> && plain_) return;
    Token* home = w.rows<Token>(name, head);
    const int64_t *offsets = w.offsets(name) + first, channels = w.map(name).channels;
    for (int64_t t = 0; t < count; ++t)
      if (!w.padding(first + t)) store_row(row_[t], T(1), channels, home + offsets[t]);
  }

  T* const* rows() const { return row_; }
  int64_t width() const { return width_; }

 private:
  int64_t width_;
  bool plain_;
  T** row_;
  T* packed_;
};

// Where the rows of a matrix begin that lie `stride` apart.
template <class T>
T** row_pointers(T* first, int64_t stride, int64_t rows, Scratch& scratch) {
  T** pointers = scratch.take<T*>(rows);
  for (int64_t r = 0; r < rows; ++r) pointers[r] = first + r * stride;
  return pointers;
}

// Cache lines: the l-th lies at base + offset[l].
struct Lines {
  const char* base = nullptr;
  const int64_t* offset = nullptr;

  // Into the second cache, not to drive out what is worked on. Inline by force: GCC takes a
  // function of prefetches for one without effect and drops the call.
  SWIN_INLINE void ask(int64_t l) const { __builtin_prefetch(base + offset[l], 0, 2); }
};

// The cache lines of a (window, head) that comes up next, to be asked for one by one between the
// multiplications of this one: they are too far apart for the processor to foresee, and all at once
// they would hold up the loads of the work itself.
class Ahead {
 public:
  Ahead(const Window& window, int64_t element_bytes, Scratch& scratch)
      : bytes_(element_bytes), map_count_(window.map_count()) {
    for (int m = 0; m < map_count_; ++m) {
      const Map& map = window.map(MapName(m));
      const int before = m - 1;  // query, key and value of a packed tensor lie alike
      const bool alike = m > 0 && same_places(map, window.map(MapName(before)));
      offset_[m] =
          alike ? offset_[before]
                : scratch.take<int64_t>(window.tokens() * (map.channels * bytes_ / kLine + 2));
    }
  }

  void expect(const Window& window, int64_t head) {
    if (placed_ != window.index) place(window);
    for (int m = 0; m < map_count_; ++m)
      base_[m] = window.rows<const char>(MapName(m), head, bytes_);
    map_ = next_ = 0;
  }

  // The next `n` lines of one map; those at its end, where fewer are left, are asked for at once.
  // Null where all were taken.
  Lines take(int64_t n) {
    while (map_ < map_count_) {
      const Lines lines = {base_[map_], offset_[map_] + next_};
      const int64_t left = count_[map_] - next_;
      next_ += n;
      if (left >= n) return lines;
      for (int64_t l = 0; l < left; ++l) lines.ask(l);
      ++map_;
      next_ = 0;
    }
    return {};
  }

 private:
  static constexpr int64_t kLine = 64;

  static bool same_places(const Map& a, const Map& b) {
    bool same = a.channels == b.channels && a.view->channel == b.view->channel;
    for (int x = 0; x < kAxes; ++x) same = same && a.view->axis[x] == b.view->axis[x];
    return same;
  }

  void place(const Window& window) {
    placed_ = window.index;
    for (int m = 0; m < map_count_; ++m) {
      if (m > 0 && offset_[m] == offset_[m - 1]) {
        count_[m] = count_[m - 1];
        continue;
      }
      count_[m] = 0;
      const Map& map = window.map(MapName(m));
      if (map.view->channel != 1) continue;
      const int64_t *offsets = window.offsets(MapName(m)), bytes = map.channels * bytes_;
      int64_t* line = offset_[m];
      for (int64_t i = 0; i < window.real; ++i) {
        const int64_t row = offsets[window.token[i]] * bytes_;
        for (int64_t b = 0; b < bytes; b += kLine) *line++ = row + b;
        if (bytes % kLine != 0) *line++ = row + bytes - 1;
      }
      count_[m] = line - offset_[m];
    }
  }

  static constexpr int kMaps = 7;
  int64_t bytes_;
  int map_count_;
  int64_t placed_ = -1;
  int64_t* offset_[kMaps];
  int64_t count_[kMaps] = {};
  const char* base_[kMaps];
  int map_ = kMaps;  // nothing is expected yet
  int64_t next_ = 0;
};

// Each of the first n rows divided by max(‖row‖, 1e-12), as F.normalize does; 1/that norm goes to
// `inverse`, if not null. A negative inverse marks a row that the clamp holds.
template <class T>
void normalise_rows(TokenRows<T>& rows, int64_t n, T* inverse = nullptr) {
  constexpr T kClamp = T(1e-12);
  const int64_t width = rows.width();
  for (int64_t i = 0; i < n; ++i) {
    T* row = rows.packed(i);
    Vec<T> squares{};
    for (int64_t c = 0; c < width; c += Lanes<T>::kCount) squares += load(row + c) * load(row + c);
    const T norm = std::sqrt(sum_of<T>(squares));
    const bool clamped = norm <= kClamp;
    const T scale = 1 / (clamped ? kClamp : norm);
    for (int64_t c = 0; c < width; c += Lanes<T>::kCount)
      store(row + c, Vec<T>(load(row + c) * scale));
    if (inverse != nullptr) inverse[i] = clamped ? -scale : scale;
  }
}
