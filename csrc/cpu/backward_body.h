// The fused backward of one (chunk of windows, head): recomputes the probabilities, writes the
// gradients of the tokens in place and sums the others over the chunk. Included once per
// instruction set.

constexpr int64_t kBackwardLogitBytes =
    192 << 10;  // P and dS of a group of rows, twice this, stay in L2

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  Vec<T> sum{};
  for (int64_t i = 0; i < n; i += Lanes<T>::kCount) sum += load(a + i) * load(b + i);
  return sum_of<T>(sum);
}

// dx of x̂ = x·inverse, in place of dx̂; where the clamp held (inverse < 0) x̂ is linear in x.
template <class Token, class T>
inline void through_norm(const T* unit, T inverse, int64_t width, T* grad) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  const T radial = inverse < 0 ? T(0) : dot(unit, grad, width),
          scale = inverse < 0 ? -inverse : inverse;
  for (int64_t c = 0; c < width; c += kCount)
    store(grad + c, Vec<T>((load(grad + c) - load(unit + c) * radial) * scale));
  // fp16 cannot hold dx̂/1e-12: inf would turn into NaN against the zero input behind it
  if (std::is_same_v<Token, Half> && inverse < 0)
    for (int64_t c = 0; c < width; ++c)
      grad[c] = grad[c] > 65504 ? 65504 : grad[c] < -65504 ? -65504 : grad[c];
}

template <class T>
inline void add_row(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// The tiles of one thread.
template <class T>
struct BackwardTiles {
  int64_t tokens, keys, depth, value_depth, group;
  T *query, *key, *key_t, *value, *value_t, *grad_out;
  T *probabilities, *grad_logits, *grad_query, *grad_key, *grad_value;
  T *bias, *query_inverse, *key_inverse;

  // The bias tile is summed in scratch only where it goes on into a table; else in its partial.
  BackwardTiles(const Problem& p, bool own_bias, Scratch& scratch)
      : tokens(p.tokens()),
        keys(round_up<T>(tokens)),
        depth(round_up<T>(p.head_dim)),
        value_depth(round_up<T>(p.value_dim)),
        group(rows_at_once<T>(tokens, keys, kBackwardLogitBytes)),
        query(scratch.take<T>(keys * depth)),
        key(scratch.take<T>(keys * depth)),
        key_t(scratch.take<T>(keys * depth)),
        value(scratch.take<T>(keys * value_depth)),
        value_t(scratch.take<T>(keys * value_depth)),
        grad_out(scratch.take<T>(group * value_depth)),
        probabilities(scratch.take<T>(group * keys)),
        grad_logits(scratch.take<T>(group * keys)),
        grad_query(scratch.take<T>(group * depth)),
        grad_key(scratch.take<T>(keys * depth)),
        grad_value(scratch.take<T>(keys * value_depth)),
        bias(own_bias ? scratch.take<T>(tokens * keys) : nullptr),
        query_inverse(scratch.take<T>(keys)),
        key_inverse(scratch.take<T>(keys)) {}
};

// dS = P∘(dP − Σ P∘dP) of one row, in place of dP; with dropout M, P becomes P∘M for dV. Added to
// `bias` if not null.
template <class T>
inline void grad_logits_row(const Operands& in, const Window& w, int64_t head, int64_t i,
                            int64_t keys, T* p, T* dp, T* bias) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  if (in.dropout_p > 0) drop(in, w, head, i, dp);
  const T delta = dot(p, dp, keys);
  for (int64_t j = 0; j < keys; j += kCount) {
    const Vec<T> ds = load(p + j) * (load(dp + j) - delta);
    store(dp + j, ds);
    if (bias != nullptr) store(bias + j, Vec<T>(load(bias + j) + ds));
  }
  if (in.dropout_p > 0) drop(in, w, head, i, p);
}

// The rows [r0, r0 + rows) of the real tokens: dQ is finished and stored, dK and dV are added to.
template <class Token, class T>
void backward_rows(const Backward& call, const Window& w, Softmax<T>& softmax, BackwardTiles<T>& t,
                   int64_t head, int64_t r0, int64_t rows, T* bias, double* logit_scale,
                   Ahead& ahead, int64_t share) {
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const T factor = factor_of<T>(in, head);
  T* query = t.query + r0 * t.depth;
  pack_real<Token>(w, kOut, head, r0, r0 + rows, t.grad_out, t.value_depth);
  product<T, false>(query, t.depth, 1, t.key_t, t.keys, p.head_dim, t.probabilities, t.keys, rows,
                    t.keys);
  ahead.ask<Token>(share);
  product<T, false>(t.grad_out, t.value_depth, 1, t.value_t, t.keys, p.value_dim, t.grad_logits,
                    t.keys, rows, t.keys);
  ahead.ask<Token>(share);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = w.token[r0 + r];
    T* row = t.probabilities + r * t.keys;
    const T inverse = softmax.weigh(i, row);
    for (int64_t j = 0; j < t.keys; j += Lanes<T>::kCount)
      store(row + j, Vec<T>(load(row + j) * inverse));
    grad_logits_row(in, w, head, i, t.keys, row, t.grad_logits + r * t.keys,
                    bias == nullptr ? nullptr : bias + i * t.keys);
  }
  ahead.ask<Token>(share);
  product<T, false>(t.grad_logits, t.keys, 1, t.key, t.depth, t.tokens, t.grad_query, t.depth, rows,
                    t.depth);
  ahead.ask<Token>(share);
  product<T, true>(t.grad_logits, 1, t.keys, query, t.depth, rows, t.grad_key, t.depth, t.tokens,
                   t.depth);
  ahead.ask<Token>(share);
  product<T, true>(t.probabilities, 1, t.keys, t.grad_out, t.value_depth, rows, t.grad_value,
                   t.value_depth, t.tokens, t.value_depth);
  ahead.ask<Token>(share);
  for (int64_t r = 0; r < rows; ++r) {
    T* grad = t.grad_query + r * t.depth;
    if (in.logit_scale != nullptr) {
      if (logit_scale != nullptr) *logit_scale += dot(query + r * t.depth, grad, t.depth);
      for (int64_t c = 0; c < t.depth; ++c) grad[c] *= factor;
      through_norm<Token>(query + r * t.depth, t.query_inverse[r0 + r], t.depth, grad);
    } else {
      for (int64_t c = 0; c < t.depth; ++c) grad[c] *= factor;
    }
    store_row(grad, p.head_dim,
              w.rows<Token>(kGradQuery, head) + w.offsets(kGradQuery)[w.token[r0 + r]]);
  }
}

// dK and dV of the window to their places; those of padding are summed.
template <class Token, class T>
void finish_keys(const Backward& call, const Window& w, BackwardTiles<T>& t, int64_t head,
                 T* pad_key, T* pad_value) {
  const Problem& p = call.in.problem;
  const T factor = factor_of<T>(call.in, head);
  for (int64_t j = 0; j < t.tokens; ++j) {
    T* grad = t.grad_key + j * t.depth;
    for (int64_t c = 0; c < t.depth; ++c) grad[c] *= factor;
    if (call.in.logit_scale != nullptr)
      through_norm<Token>(t.key + j * t.depth, t.key_inverse[j], t.depth, grad);
    if (!w.padding(j)) {
      store_row(grad, p.head_dim, w.rows<Token>(kGradKey, head) + w.offsets(kGradKey)[j]);
      store_row(t.grad_value + j * t.value_depth, p.value_dim,
                w.rows<Token>(kGradValue, head) + w.offsets(kGradValue)[j]);
    } else {
      if (pad_key != nullptr) add_row(grad, p.head_dim, pad_key);
      if (pad_value != nullptr) add_row(t.grad_value + j * t.value_depth, p.value_dim, pad_value);
    }
  }
}

// This (chunk, head)'s piece of a buffer of partial sums, cleared; null where the call wants no
// such gradient.
template <class T>
inline T* partial(void* buffer, int64_t task, int64_t n) {
  if (buffer == nullptr) return nullptr;
  T* piece = static_cast<T*>(buffer) + task * n;
  std::memset(piece, 0, size_t(n) * sizeof(T));
  return piece;
}

template <class Token>
void backward(const Backward& call, int64_t begin, int64_t end) {
  using T = typename SumOf<Token>::type;
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const bool to_table = call.partial_table != nullptr;
  Scratch scratch;
  const Map maps[] = {{&in.query, p.head_dim, false},       {&in.key, p.head_dim, false},
                      {&in.value, p.value_dim, false},      {&call.grad_out, p.value_dim, false},
                      {&call.grad_query, p.head_dim, true}, {&call.grad_key, p.head_dim, true},
                      {&call.grad_value, p.value_dim, true}};
  Window places[2] = {Window(p, maps, 7, scratch),
                      Window(p, maps, 7, scratch)};  // this window and the one prefetched
  Softmax<T> softmax(in, scratch);
  BackwardTiles<T> t(p, to_table, scratch);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.heads, chunk = task / p.heads;
    const int64_t all = p.batch * p.windows(), first = chunk * call.windows_per_chunk;
    const int64_t last =
        first + call.windows_per_chunk < all ? first + call.windows_per_chunk : all;
    T* bias = to_table ? t.bias : partial<T>(call.partial_bias, task, t.tokens * t.keys);
    if (to_table) std::memset(bias, 0, size_t(t.tokens * t.keys) * sizeof(T));
    T* table = partial<T>(call.partial_table, task, call.table_rows);
    T* pad_key = partial<T>(call.partial_pad_key, task, p.head_dim);
    T* pad_value = partial<T>(call.partial_pad_value, task, p.value_dim);
    double* logit_scale = partial<double>(call.partial_logit_scale, task, 1);

    for (int64_t window = first; window < last; ++window) {
      Window& w = places[window % 2];
      w.place(p, window / p.windows(), window % p.windows());
      softmax.place(w, head);
      pack_real<Token>(w, kQuery, head, 0, w.real, t.query, t.depth);
      pack_all<Token>(w, kKey, head, t.tokens, in.pad_key, t.key, t.keys, t.depth);
      pack_all<Token>(w, kValue, head, t.tokens, in.pad_value, t.value, t.keys, t.value_depth);
      Ahead ahead;
      if (window + 1 < last) {
        Window& next = places[(window + 1) % 2];
        next.place(p, (window + 1) / p.windows(), (window + 1) % p.windows());
        ahead = Ahead(next, head);
      }
      if (in.logit_scale != nullptr) {
        normalise_rows<T>(t.query, w.real, t.depth, t.query_inverse);
        normalise_rows<T>(t.key, t.tokens, t.depth, t.key_inverse);
      }
      transpose<T>(t.key, t.depth, t.keys, t.depth, factor_of<T>(in, head), t.key_t, t.keys);
      transpose<T>(t.value, t.value_depth, t.keys, t.value_depth, T(1), t.value_t, t.keys);
      std::memset(t.grad_key, 0, size_t(t.keys * t.depth) * sizeof(T));
      std::memset(t.grad_value, 0, size_t(t.keys * t.value_depth) * sizeof(T));
      const int64_t groups = (w.real + t.group - 1) / t.group;
      const int64_t share = (t.tokens + 6 * groups - 1) / (6 * groups);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t r0 = w.real * g / groups, rows = w.real * (g + 1) / groups - r0;
        backward_rows<Token>(call, w, softmax, t, head, r0, rows, bias, logit_scale, ahead, share);
      }
      finish_keys<Token>(call, w, t, head, pad_key, pad_value);
    }
    if (to_table)
      for (int64_t i = 0; i < t.tokens; ++i)
        for (int64_t j = 0; j < t.tokens; ++j)
          table[call.bias_index[i * t.tokens + j]] += bias[i * t.keys + j];
  }
}
