// The fused forward of one (window, head), and what the backward recomputes of it. Included once
// per instruction set.

// Logits to probabilities, row by row, with every term that is added to them.
template <class T>
class Softmax {
 public:
  Softmax(const Operands& in, Scratch& scratch)
      : in_(in),
        tokens_(in.problem.tokens()),
        width_(round_up<T>(tokens_)),
        no_bias_(scratch.take<T>(width_)),
        row_(scratch.take<T>(width_)),
        shift_(scratch.take<T>(8 * width_)) {
    for (int64_t j = 0; j < width_; ++j)
      no_bias_[j] = j < tokens_ ? T(0) : -std::numeric_limits<T>::infinity();
  }

  // Between regions of a window: one row of mask per region, as a row's mask depends on its region
  // alone.
  void place(const Window& w, int64_t head) {
    window_ = &w;
    bias_ =
        in_.bias == nullptr ? nullptr : static_cast<const T*>(in_.bias) + head * tokens_ * width_;
    if (w.regions < 2 || shift_window_ == w.index) return;
    shift_window_ = w.index;
    for (int region = 0; region < w.regions; ++region) {
      T* row = shift_ + region * width_;
      for (int64_t j = 0; j < width_; ++j)
        row[j] = j < tokens_ && w.region[j] != region ? T(in_.mask_value) : T(0);
    }
  }

  // Row i of the window: s becomes exp(s + terms − max); returns 1/sum, or 0 where every key is at
  // −inf.
  T weigh(int64_t i, T* s) {
    const T* bias = bias_ == nullptr ? no_bias_ : bias_ + i * width_;
    const T* mask = nullptr;
    if (window_->regions > 1) mask = shift_ + window_->region[i] * width_;
    if (in_.mask.data != nullptr) {
      load_mask_row(in_.mask, window_->index, i, tokens_, row_, width_);
      if (mask != nullptr)
        for (int64_t j = 0; j < width_; ++j) row_[j] += mask[j];
      mask = row_;
    }
    constexpr int64_t kCount = Lanes<T>::kCount;
    Vec<T> most = splat(-std::numeric_limits<T>::infinity());
    for (int64_t j = 0; j < width_; j += kCount) {
      Vec<T> x = load(s + j) + load(bias + j);
      if (mask != nullptr) x += load(mask + j);
      store(s + j, x);
      most = x > most ? x : most;
    }
    T top = max_of<T>(most);
    if (top == -std::numeric_limits<T>::infinity()) top = 0;
    Vec<T> sum{};
    for (int64_t j = 0; j < width_; j += kCount) {
      const Vec<T> e = exp_flushed(load(s + j) - top);
      store(s + j, e);
      sum += e;
    }
    const T total = sum_of<T>(sum);
    return total == 0 ? T(0) : 1 / total;
  }

  int64_t width() const { return width_; }

 private:
  const Operands& in_;
  int64_t tokens_, width_;
  T* no_bias_;  // 0 on the tokens, −inf on the columns that fill up the lanes
  T* row_;
  T* shift_;
  const T* bias_ = nullptr;
  const Window* window_ = nullptr;
  int64_t shift_window_ = -1;
};

// The dropout factors of one row of probabilities, multiplied into `x`.
template <class T>
inline void drop(const Operands& in, const Window& w, int64_t head, int64_t i, T* x) {
  const int64_t tokens = in.problem.tokens();
  const uint64_t window = uint64_t(w.image * in.problem.windows() + w.index);
  const uint64_t threshold = uint64_t(in.dropout_p * 4294967296.0);
  const T kept = in.dropout_p < 1 ? T(1 / (1 - in.dropout_p)) : T(0);
  for (int64_t j = 0; j < tokens; ++j) {
    const uint32_t word =
        philox_first_word(uint32_t(i * tokens + j), uint32_t(head), uint32_t(window),
                          uint32_t(window >> 32), in.dropout_seed);
    x[j] *= word >= threshold ? kept : T(0);
  }
}

// scale, or the head's logit_scale in cosine attention.
template <class T>
inline T factor_of(const Operands& in, int64_t head) {
  return in.logit_scale == nullptr ? T(in.scale) : static_cast<const T*>(in.logit_scale)[head];
}

// Rows whose logits are worked on together: whole tiles of the product, about an L1 cache of them.
template <class T>
inline int64_t rows_at_once(int64_t rows, int64_t width, int64_t bytes) {
  const int64_t fit = bytes / (width * int64_t(sizeof(T))) / kMaxRows * kMaxRows;
  return fit < kMaxRows ? kMaxRows : fit < rows ? fit : rows;
}
constexpr int64_t kForwardLogitBytes = 18 * 64 * 4;

template <class Token>
void forward(const Forward& call, int64_t begin, int64_t end) {
  using T = typename SumOf<Token>::type;
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const int64_t tokens = p.tokens(), keys = round_up<T>(tokens);
  const int64_t depth = round_up<T>(p.head_dim), value_depth = round_up<T>(p.value_dim);
  const int64_t group = rows_at_once<T>(tokens, keys, kForwardLogitBytes);
  Scratch scratch;
  const Map maps[] = {{&in.query, p.head_dim, false},
                      {&in.key, p.head_dim, false},
                      {&in.value, p.value_dim, false},
                      {&call.out, p.value_dim, true}};
  Window places[2] = {Window(p, maps, 4, scratch),
                      Window(p, maps, 4, scratch)};  // this window and the one prefetched
  Softmax<T> softmax(in, scratch);
  T* query = scratch.take<T>(tokens * depth);
  T* key = scratch.take<T>(keys * depth);
  T* key_t = scratch.take<T>(keys * depth);  // (depth, keys)
  T* value = scratch.take<T>(keys * value_depth);
  T* logits = scratch.take<T>(group * keys);
  T* out = scratch.take<T>(group * value_depth);
  T* inverse = scratch.take<T>(group);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.heads, window = task / p.heads;
    Window& w = places[window % 2];
    w.place(p, window / p.windows(), window % p.windows());
    softmax.place(w, head);
    pack_real<Token>(w, kQuery, head, 0, w.real, query, depth);
    pack_all<Token>(w, kKey, head, tokens, in.pad_key, key, keys, depth);
    pack_all<Token>(w, kValue, head, tokens, in.pad_value, value, keys, value_depth);
    Ahead ahead;
    if (task + 1 < end) {
      const int64_t next = (task + 1) / p.heads;
      places[next % 2].place(p, next / p.windows(), next % p.windows());
      ahead = Ahead(places[next % 2], (task + 1) % p.heads);
    }
    if (in.logit_scale != nullptr) {
      normalise_rows<T>(query, w.real, depth, nullptr);
      normalise_rows<T>(key, tokens, depth, nullptr);
    }
    transpose<T>(key, depth, keys, depth, factor_of<T>(in, head), key_t, keys);
    Token* home = w.rows<Token>(kOut, head);
    const int64_t groups = (w.real + group - 1) / group;
    const int64_t share = (tokens + 3 * groups - 1) / (3 * groups);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t r0 = w.real * g / groups, rows = w.real * (g + 1) / groups - r0;
      product<T, false>(query + r0 * depth, depth, 1, key_t, keys, p.head_dim, logits, keys, rows,
                        keys);
      ahead.ask<Token>(share);
      for (int64_t r = 0; r < rows; ++r) {
        inverse[r] = softmax.weigh(w.token[r0 + r], logits + r * keys);
        if (in.dropout_p > 0) drop(in, w, head, w.token[r0 + r], logits + r * keys);
      }
      ahead.ask<Token>(share);
      product<T, false>(logits, keys, 1, value, value_depth, tokens, out, value_depth, rows,
                        value_depth);
      ahead.ask<Token>(share);
      for (int64_t r = 0; r < rows; ++r) {
        T* row = out + r * value_depth;
        for (int64_t c = 0; c < value_depth; c += Lanes<T>::kCount)
          store(row + c, Vec<T>(load(row + c) * inverse[r]));
        store_row(row, p.value_dim, home + w.offsets(kOut)[w.token[r0 + r]]);
      }
    }
  }
}
