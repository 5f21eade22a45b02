// Rows of tokens between the caller's memory and packed tiles. Included once per instruction set.

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
