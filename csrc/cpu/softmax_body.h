// Logits to probabilities, a key a row and a query a lane: maxima and sums over the keys are then
// sums of vectors. Included once per instruction set.

// scale, or the head's logit_scale in cosine attention.
template <class T>
inline T factor_of(const Operands& in, int64_t head) {
  return in.logit_scale == nullptr ? T(in.scale) : static_cast<const T*>(in.logit_scale)[head];
}

// Keys that are summed before they are added to the whole sum, about the root of their number: a
// chain of 49 roundings errs twice as much as seven of seven.
SWIN_INLINE int64_t keys_of_a_sum(int64_t keys) {
  int64_t some = 4;
  while (some * some < keys) some *= 2;
  return some;
}

// What the backward asks of the softmax beside the weights: the gradients dp of the probabilities
// (keys, queries) go in, `top` is dp at the key of the largest logit and `mean` Σ e·(dp − top) / Σ
// e. Where a query sees only keys of equal dp, their difference from the mean is then exactly 0, as
// it is in real numbers; with the mean of dp itself it would be a rounding error.
template <class T>
struct GradSums {
  Rows<const T> dp;
  T* top = nullptr;
  T* mean = nullptr;

  GradSums from(int64_t column) const {
    if (dp.data == nullptr) return *this;
    return {{dp.data + column, dp.stride}, top + column, mean + column};
  }
};

// C vectors V of queries: s becomes e = exp(s + mask − max), `inverse` 1/Σe, or 0 where every key
// is at −inf. Row j of the mask is mask[j].
template <class V, int C, bool kMasked, bool kGrad, class T>
void weigh_vectors(int64_t keys, Rows<T> s, const T* const* mask, int64_t i0, T* inverse,
                   const GradSums<T>& grad) {
  constexpr int64_t kCount = sizeof(V) / sizeof(T);
  const auto dp = [&](int64_t j, int v) {
    return load_vector<V>(grad.dp.data + j * grad.dp.stride + v * kCount);
  };
  const V lowest = -std::numeric_limits<T>::infinity() - V{};
  V most[C], top[C], sum[C], weighted[C];
  for (int v = 0; v < C; ++v) {
    most[v] = lowest;
    if (kGrad) top[v] = dp(0, v);
  }
  for (int64_t j = 0; j < keys; ++j) {
    T* row = s.data + j * s.stride;
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      V x = load_vector<V>(row + v * kCount);
      if (kMasked) {
        x += load_vector<V>(mask[j] + i0 + v * kCount);
        store_vector(row + v * kCount, x);
      }
      if (kGrad) top[v] = x > most[v] ? dp(j, v) : top[v];
      most[v] = larger(x, most[v]);
    }
  }
  for (int v = 0; v < C; ++v) {
    most[v] = most[v] == lowest ? V{} : most[v];
    sum[v] = weighted[v] = V{};
  }
  const int64_t step = keys_of_a_sum(keys);
  for (int64_t j0 = 0; j0 < keys; j0 += step) {
    V some[C], some_weighted[C];
    for (int v = 0; v < C; ++v) some[v] = some_weighted[v] = V{};
    const int64_t end = smaller(j0 + step, keys);
    for (int64_t j = j0; j < end; ++j) {
      T* row = s.data + j * s.stride;
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) {
        const V e = exp_flushed(load_vector<V>(row + v * kCount) - most[v]);
        store_vector(row + v * kCount, e);
        some[v] += e;
        if (kGrad) some_weighted[v] += e * (dp(j, v) - top[v]);
      }
    }
    for (int v = 0; v < C; ++v) {
      sum[v] += some[v];
      if (kGrad) weighted[v] += some_weighted[v];
    }
  }
  for (int v = 0; v < C; ++v) {
    const V factor = sum[v] == V{} ? V{} : 1 / sum[v];
    store_vector(inverse + v * kCount, factor);
    if (kGrad) {
      store_vector(grad.top + v * kCount, top[v]);
      store_vector(grad.mean + v * kCount, V(weighted[v] * factor));
    }
  }
}

template <class T>
class Softmax {
 public:
  Softmax(const Operands& in, Scratch& scratch)
      : in_(in),
        tokens_(in.problem.tokens()),
        width_(round_up<T>(tokens_)),
        shift_(scratch.take<T>(8 * width_)),
        mask_rows_(scratch.take<const T*>(tokens_)),
        mask_(in.mask.data == nullptr ? nullptr : scratch.take<T>(tokens_ * width_)),
        mask_as_given_(in.mask.data == nullptr ? nullptr : scratch.take<T>(width_ * width_)) {}

  void place(const Window& w, int64_t head) {
    bias_ =
        in_.bias == nullptr ? nullptr : static_cast<const T*>(in_.bias) + head * tokens_ * width_;
    masked_ = w.regions > 1 || in_.mask.data != nullptr;
    if (!masked_ || masked_window_ == w.index) return;
    masked_window_ = w.index;
    // between regions: one row per region of a window, as a key's row depends on its region alone
    for (int region = 0; region < w.regions; ++region) {
      T* row = shift_ + region * width_;
      for (int64_t i = 0; i < width_; ++i)
        row[i] = i < tokens_ && w.region[i] != region ? T(in_.mask_value) : T(0);
    }
    for (int64_t j = 0; j < tokens_; ++j) mask_rows_[j] = shift_ + w.region[j] * width_;
    if (in_.mask.data != nullptr) add_given(w);
  }

  // What logits start from, (keys, queries from i0 on); null data where the call has no bias.
  Rows<const T> bias(int64_t i0) const { return {bias_ == nullptr ? nullptr : bias_ + i0, width_}; }

  // Queries [i0, i0 + columns): s becomes e = exp(s + masks − max over the keys), `inverse` 1/Σe.
  void weigh(int64_t i0, int64_t columns, Rows<T> s, T* inverse,
             const GradSums<T>& grad = {}) const {
    constexpr int64_t kCount = Lanes<T>::kCount;
    int64_t c = 0;
    while (c + kCount <= columns)
      c += weigh_whole((columns - c) / kCount, {s.data + c, s.stride}, i0 + c, inverse + c,
                       grad.from(c));
    if (c < columns)
      weigh_some<HalfVec<T>, 1>({s.data + c, s.stride}, i0 + c, inverse + c, grad.from(c));
  }

 private:
  // As many vectors as are left and fit in registers, side by side as each is a chain of maxima;
  // returns their queries.
  template <int C = kMaxColumns>
  int64_t weigh_whole(int64_t left, Rows<T> s, int64_t i0, T* inverse,
                      const GradSums<T>& grad) const {
    if constexpr (C > 1)
      if (left < C) return weigh_whole<C - 1>(left, s, i0, inverse, grad);
    weigh_some<Vec<T>, C>(s, i0, inverse, grad);
    return C * Lanes<T>::kCount;
  }

  template <class V, int C>
  void weigh_some(Rows<T> s, int64_t i0, T* inverse, const GradSums<T>& grad) const {
    const auto weigh = grad.dp.data == nullptr ? (masked_ ? &weigh_vectors<V, C, true, false, T>
                                                          : &weigh_vectors<V, C, false, false, T>)
                                               : (masked_ ? &weigh_vectors<V, C, true, true, T>
                                                          : &weigh_vectors<V, C, false, true, T>);
    weigh(tokens_, s, mask_rows_, i0, inverse, grad);
  }

  // The caller's mask has a row a query; what is added to the logits, a row a key.
  void add_given(const Window& w) {
    for (int64_t i = 0; i < width_; ++i) {
      T* row = mask_as_given_ + i * width_;
      if (i < tokens_) {
        load_mask_row(in_.mask, w.index, i, tokens_, row, width_);
      } else {
        std::memset(row, 0, size_t(width_) * sizeof(T));
      }
    }
    for (int64_t j = 0; j < tokens_; ++j) {
      T* row = mask_ + j * width_;
      for (int64_t i = 0; i < width_; ++i)
        row[i] = mask_as_given_[i * width_ + j] + mask_rows_[j][i];
      mask_rows_[j] = row;
    }
  }

  const Operands& in_;
  int64_t tokens_, width_;
  T* shift_;                  // a row a region of the window
  const T** mask_rows_;       // (keys)
  T *mask_, *mask_as_given_;  // (keys, queries), (queries, keys)
  const T* bias_ = nullptr;
  bool masked_ = false;
  int64_t masked_window_ = -1;
};

// The dropout factors of probabilities (keys, queries from i0 on), multiplied into `x`.
template <class T>
inline void drop(const Operands& in, const Window& w, int64_t head, int64_t i0, int64_t queries,
                 Rows<T> x) {
  const int64_t tokens = in.problem.tokens();
  const uint64_t window = uint64_t(w.image * in.problem.windows() + w.index);
  const uint64_t threshold = uint64_t(in.dropout_p * 4294967296.0);
  const T kept = in.dropout_p < 1 ? T(1 / (1 - in.dropout_p)) : T(0);
  for (int64_t j = 0; j < tokens; ++j)
    for (int64_t i = 0; i < queries; ++i) {
      const uint32_t word =
          philox_first_word(uint32_t((i0 + i) * tokens + j), uint32_t(head), uint32_t(window),
                            uint32_t(window >> 32), in.dropout_seed);
      x.data[j * x.stride + i] *= word >= threshold ? kept : T(0);
    }
}
