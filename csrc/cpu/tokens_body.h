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

SWIN_INLINE void convert(const float& from, float& to) { to = from; }
SWIN_INLINE void convert(const double& from, double& to) { to = from; }
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

// As many elements as Sum has lanes, side by side.
template <class T, class Token>
SWIN_INLINE Vec<T> load_as(const Token* from) {
  if constexpr (std::is_same_v<Token, T>) {
    return load(from);
  } else if constexpr (std::is_same_v<Token, BFloat16> && std::is_same_v<T, float>) {
    typedef uint16_t Narrow
        __attribute__((vector_size(SWIN_VECTOR_BYTES / 2), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(SWIN_VECTOR_BYTES)));
    const Narrow bits = *reinterpret_cast<const Narrow*>(from);
    return (Vec<T>)(__builtin_convertvector(bits, Wide) << 16);
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

// n elements into Sum, zeros up to `width`.
template <class Token, class T>
SWIN_INLINE void load_row(const Token* from, int64_t stride, int64_t n, T* to, int64_t width) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kCount <= n; i += kCount) store(to + i, load_as<T>(from + i));
    for (; i < n; ++i) convert(from[i], to[i]);
  } else {
    for (; i < n; ++i) convert(from[i * stride], to[i]);
  }
  for (; i < width; ++i) to[i] = 0;
}

template <class Token, class T>
SWIN_INLINE void store_row(const T* from, int64_t n, Token* to) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount)
    for (int64_t k = 0; k < kCount; ++k) convert(from[i + k], to[i + k]);
  for (; i < n; ++i) convert(from[i], to[i]);
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
  static constexpr int kMost = 32;  // pieces that one thread takes
  void* pieces_[kMost];
  int used_ = 0;
};

// What a call reads and writes token by token; kOut is the output or its gradient.
enum MapName { kQuery, kKey, kValue, kOut, kGradQuery, kGradKey, kGradValue };
struct Map {
  const TokenView* view;
  int64_t channels;
  bool written;
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
        offset_(scratch.take<int64_t>(map_count * p.tokens())) {}

  void place(const Problem& p, int64_t image_index, int64_t window_index) {
    const bool same_place = index == window_index;
    image = image_index;
    index = window_index;
    if (same_place) return;
    const int64_t counts[kAxes] = {p.axis[0].count(), p.axis[1].count(), p.axis[2].count()};
    const int64_t first[kAxes] = {window_index / (counts[1] * counts[2]) * p.axis[0].window,
                                  window_index / counts[2] % counts[1] * p.axis[1].window,
                                  window_index % counts[2] * p.axis[2].window};
    int codes[8];  // a window meets at most two regions on an axis
    int64_t t = 0;
    real = end = 0;
    regions = 0;
    for (int64_t i = 0; i < p.axis[0].window; ++i) {
      const int64_t s0 = p.axis[0].source(first[0] + i, p.roll_then_pad);
      const int r0 = p.axis[0].region(first[0] + i);
      for (int64_t j = 0; j < p.axis[1].window; ++j) {
        const int64_t s1 = p.axis[1].source(first[1] + j, p.roll_then_pad);
        const int r1 = r0 * 3 + p.axis[1].region(first[1] + j);
        for (int64_t k = 0; k < p.axis[2].window; ++k, ++t) {
          const int64_t s2 = p.axis[2].source(first[2] + k, p.roll_then_pad);
          const int code = r1 * 3 + p.axis[2].region(first[2] + k);
          int known = 0;
          while (known < regions && codes[known] != code) ++known;
          if (known == regions) codes[regions++] = code;
          region[t] = known;
          const bool is_real = s0 >= 0 && s1 >= 0 && s2 >= 0;
          for (int m = 0; m < map_count_; ++m) {
            const int64_t* axis = maps_[m].view->axis;
            offset_[m * tokens_ + t] = is_real ? s0 * axis[0] + s1 * axis[1] + s2 * axis[2] : -1;
          }
          if (!is_real) continue;
          token[real++] = t;
          end = t + 1;
        }
      }
    }
  }

  bool padding(int64_t t) const { return offset_[t] < 0; }
  const Map& map(MapName name) const { return maps_[name]; }
  int map_count() const { return map_count_; }

  // Where the rows of one head begin; that of token t lies offsets(name)[t] elements on.
  template <class Token>
  Token* rows(MapName name, int64_t head, int64_t scale = 1) const {
    const TokenView& view = *maps_[name].view;
    return static_cast<Token*>(view.data) + (image * view.batch + head * view.head) * scale;
  }
  const int64_t* offsets(MapName name) const { return offset_ + name * tokens_; }

 private:
  const Map* maps_;
  int map_count_;
  int64_t tokens_;
  int64_t* offset_;  // (maps, N): −1 for padding
};

// The tokens [begin, end) of a window, packed to (end − begin, width). Padding is `pad` (H, D), or
// zeros where that is null.
template <class Token, class T>
void pack(const Window& w, MapName name, int64_t head, int64_t begin, int64_t end, const void* pad,
          T* to, int64_t width) {
  const Token* rows = w.rows<const Token>(name, head);
  const int64_t *offsets = w.offsets(name), stride = w.map(name).view->channel;
  const int64_t channels = w.map(name).channels;
  for (int64_t t = begin; t < end; ++t, to += width) {
    if (!w.padding(t)) {
      load_row(rows + offsets[t], stride, channels, to, width);
    } else if (pad != nullptr) {
      load_row(static_cast<const T*>(pad) + head * channels, 1, channels, to, width);
    } else {
      std::memset(to, 0, size_t(width) * sizeof(T));
    }
  }
}

// Asks for the rows of a (window, head) that comes up next, a few tokens at a time between pieces
// of work: all at once they would hold up the loads of the work itself. The rows are too far apart
// for the processor to foresee.
class Ahead {
 public:
  Ahead() = default;  // nothing comes
  Ahead(const Window& window, int64_t head, int64_t element_bytes, int64_t pieces)
      : window_(&window),
        head_(head),
        bytes_(element_bytes),
        share_((window.real + pieces - 1) / pieces) {}

  // The next tokens. Inline by force: GCC takes a function of prefetches for one without effect and
  // drops the call.
  SWIN_INLINE void ask() {
    if (window_ == nullptr || asked_ == window_->real) return;
    const int64_t end = smaller(asked_ + share_, window_->real);
    for (int m = 0; m < window_->map_count(); ++m) {
      const Map& map = window_->map(MapName(m));
      if (map.view->channel != 1) continue;
      const char* rows = window_->rows<const char>(MapName(m), head_, bytes_);
      const int64_t* offsets = window_->offsets(MapName(m));
      for (int64_t i = asked_; i < end; ++i) {
        const char* row = rows + offsets[window_->token[i]] * bytes_;
        const uintptr_t last = reinterpret_cast<uintptr_t>(row + map.channels * bytes_) - 1;
        uintptr_t line = reinterpret_cast<uintptr_t>(row) / kLine * kLine;
        if (map.written) {
          for (; line <= last; line += kLine)
            __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        } else {
          for (; line <= last; line += kLine)
            __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        }
      }
    }
    asked_ = end;
  }

 private:
  static constexpr uintptr_t kLine = 64;
  const Window* window_ = nullptr;
  int64_t head_ = 0, bytes_ = 0, share_ = 0, asked_ = 0;
};

// Each row divided by max(‖row‖, 1e-12), as F.normalize does; 1/that norm goes to `inverse`, if not
// null. A negative inverse marks a row that the clamp holds.
template <class T>
void normalise_rows(T* rows, int64_t n, int64_t width, T* inverse) {
  constexpr T kClamp = T(1e-12);
  for (int64_t i = 0; i < n; ++i) {
    T* row = rows + i * width;
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
