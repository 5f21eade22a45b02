// The fused backward of one (chunk of windows, head): recomputes the probabilities, writes the
// gradients of the tokens in place and sums the others over the chunk. Included once per
// instruction set.

constexpr int64_t kBackwardLogitBytes =
    192 << 10;  // P and dP of a group of queries, twice this, stay in L2

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  Vec<T> sum{};
  for (int64_t i = 0; i < n; i += Lanes<T>::kCount) sum += load(a + i) * load(b + i);
  return sum_of<T>(sum);
}

// dx of x̂ = x·inverse, in place of dx̂/factor; where the clamp held (inverse < 0) x̂ is linear in x.
template <class Token, class T>
inline void through_norm(const T* unit, T inverse, T factor, int64_t width, T* grad) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  const T radial = inverse < 0 ? T(0) : dot(unit, grad, width),
          scale = factor * (inverse < 0 ? -inverse : inverse);
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
  int64_t tokens, width, depth, value_depth, group;
  TokenRows<T> query, key, value, grad_out;
  T *query_t, *grad_out_t;
  const T *const *query_t_rows, *const *grad_out_t_rows;
  T *weights, *grad_logits, *grad_query, *grad_key, *grad_value;
  T* scaled;  // the gradients of the output over Σe
  const T* const* scaled_rows;
  T *inverse, *top, *mean, *bias, *query_inverse, *key_inverse;

  // The bias tile is summed in scratch only where it goes on into a table; else in its partial.
  BackwardTiles(const Problem& p, const Map* maps, bool cosine, bool own_bias, Scratch& scratch)
      : tokens(p.tokens()),
        width(round_up<T>(tokens)),
        depth(round_up<T>(p.head_dim)),
        value_depth(round_up<T>(p.value_dim)),
        group(queries_at_once<T>(tokens, kBackwardLogitBytes)),
        query(maps[kQuery], width, cosine, scratch),
        key(maps[kKey], tokens, cosine, scratch),
        value(maps[kValue], tokens, false, scratch),
        grad_out(maps[kOut], width, false, scratch),
        query_t(scratch.take<T>(depth * width)),
        grad_out_t(scratch.take<T>(value_depth * width)),
        query_t_rows(row_pointers(query_t, width, depth, scratch)),
        grad_out_t_rows(row_pointers(grad_out_t, width, value_depth, scratch)),
        weights(scratch.take<T>(tokens * group)),
        grad_logits(scratch.take<T>(tokens * group)),
        grad_query(scratch.take<T>(group * depth)),
        grad_key(scratch.take<T>(tokens * depth)),
        grad_value(scratch.take<T>(tokens * value_depth)),
        scaled(scratch.take<T>(group * value_depth)),
        scaled_rows(row_pointers(scaled, value_depth, group, scratch)),
        inverse(scratch.take<T>(group)),
        top(scratch.take<T>(group)),
        mean(scratch.take<T>(group)),
        bias(own_bias ? scratch.take<T>(tokens * width) : nullptr),
        query_inverse(scratch.take<T>(width)),
        key_inverse(scratch.take<T>(tokens)) {}
};

// dS = P∘(dP − Σ P∘dP) in place of dP, P being e·inverse; added to `bias` if that has data.
template <class T, bool kBias>
void grad_logits_vectors(int64_t keys, int64_t columns, Rows<const T> e, Rows<T> dp,
                         const T* inverse, const GradSums<T>& grad, Rows<T> bias) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  for (int64_t c = 0; c < columns; c += kCount) {
    const Vec<T> factor = load(inverse + c), top = load(grad.top + c), mean = load(grad.mean + c);
    for (int64_t j = 0; j < keys; ++j) {
      T* home = dp.data + j * dp.stride + c;
      const Vec<T> ds = load(e.data + j * e.stride + c) * ((load(home) - top - mean) * factor);
      store(home, ds);
      if (kBias) {
        T* sum = bias.data + j * bias.stride + c;
        store(sum, Vec<T>(load(sum) + ds));
      }
    }
  }
}

// The queries [i0, i0 + rows): dQ is finished and stored, dK and dV are added to.
template <class Token, class T>
void backward_queries(const Backward& call, const Window& w, const Softmax<T>& softmax,
                      BackwardTiles<T>& t, int64_t head, int64_t i0, int64_t rows, T* bias,
                      double* logit_scale, Ahead& ahead) {
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const int64_t columns = round_up<T>(rows);
  const bool cosine = in.logit_scale != nullptr;
  const T factor = factor_of<T>(in, head);
  const Rows<T> weights = {t.weights, columns}, grad_logits = {t.grad_logits, columns};
  product<T>({t.key.rows()}, {t.query_t_rows, i0}, p.head_dim, factor, softmax.bias(i0), weights,
             t.tokens, columns, ahead);
  product<T>({t.value.rows()}, {t.grad_out_t_rows, i0}, p.value_dim, T(1), {}, grad_logits,
             t.tokens, columns, ahead);
  if (in.dropout_p > 0) drop(in, w, head, i0, rows, grad_logits);
  const GradSums<T> sums = {grad_logits, t.top, t.mean};
  softmax.weigh(i0, columns, weights, t.inverse, sums);
  if (bias == nullptr) {
    grad_logits_vectors<T, false>(t.tokens, columns, weights, grad_logits, t.inverse, sums, {});
  } else {
    grad_logits_vectors<T, true>(t.tokens, columns, weights, grad_logits, t.inverse, sums,
                                 {bias + i0, t.width});
  }
  if (in.dropout_p > 0) drop(in, w, head, i0, rows, weights);
  for (int64_t r = 0; r < rows; ++r)  // dV takes the weights with 1/Σe in the other factor
    store_row(t.grad_out.rows()[i0 + r], t.inverse[r], t.value_depth, t.scaled + r * t.value_depth);
  const T outer = cosine ? T(1) : factor;  // else through_norm has it
  product<T>({nullptr, t.grad_logits, 1, columns}, {t.key.rows()}, t.tokens, outer, {},
             {t.grad_query, t.depth}, rows, t.depth, ahead);
  const auto sum_of = [&](T* data, int64_t stride) {  // over the groups of queries
    return i0 == 0 ? Rows<const T>{} : Rows<const T>{data, stride};
  };
  product<T>({nullptr, t.grad_logits, columns}, {t.query.rows() + i0}, rows, outer,
             sum_of(t.grad_key, t.depth), {t.grad_key, t.depth}, t.tokens, t.depth, ahead);
  product<T>({nullptr, t.weights, columns}, {t.scaled_rows}, rows, T(1),
             sum_of(t.grad_value, t.value_depth), {t.grad_value, t.value_depth}, t.tokens,
             t.value_depth, ahead);
  for (int64_t r = 0; r < rows; ++r) {
    if (w.padding(i0 + r)) continue;
    T* grad = t.grad_query + r * t.depth;
    if (cosine) {
      const T* unit = t.query.rows()[i0 + r];
      if (logit_scale != nullptr) *logit_scale += dot(unit, grad, t.depth);
      through_norm<Token>(unit, t.query_inverse[i0 + r], factor, t.depth, grad);
    }
    store_row(grad, T(1), p.head_dim,
              w.rows<Token>(kGradQuery, head) + w.offsets(kGradQuery)[i0 + r]);
  }
}

// dK and dV of the window to their places; those of padding are summed.
template <class Token, class T>
void finish_keys(const Backward& call, const Window& w, BackwardTiles<T>& t, int64_t head,
                 T* pad_key, T* pad_value) {
  const Problem& p = call.in.problem;
  const T factor = factor_of<T>(call.in, head);
  for (int64_t j = 0; j < t.tokens; ++j) {
    T *grad = t.grad_key + j * t.depth, *grad_value = t.grad_value + j * t.value_depth;
    if (call.in.logit_scale != nullptr)
      through_norm<Token>(t.key.rows()[j], t.key_inverse[j], factor, t.depth, grad);
    if (!w.padding(j)) {
      store_row(grad, T(1), p.head_dim, w.rows<Token>(kGradKey, head) + w.offsets(kGradKey)[j]);
      store_row(grad_value, T(1), p.value_dim,
                w.rows<Token>(kGradValue, head) + w.offsets(kGradValue)[j]);
    } else {
      if (pad_key != nullptr) add_row(grad, p.head_dim, pad_key);
      if (pad_value != nullptr) add_row(grad_value, p.value_dim, pad_value);
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
  const Map maps[] = {{&in.query, p.head_dim},        {&in.key, p.head_dim},
                      {&in.value, p.value_dim},       {&call.grad_out, p.value_dim},
                      {&call.grad_query, p.head_dim}, {&call.grad_key, p.head_dim},
                      {&call.grad_value, p.value_dim}};
  Window places[2] = {Window(p, maps, 7, scratch),
                      Window(p, maps, 7, scratch)};  // this window and the one prefetched
  Ahead ahead(places[0], sizeof(Token), scratch);
  Softmax<T> softmax(in, scratch);
  BackwardTiles<T> t(p, maps, in.logit_scale != nullptr, to_table, scratch);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.heads, chunk = task / p.heads;
    const int64_t all = p.batch * p.windows(), first = chunk * call.windows_per_chunk;
    const int64_t last = smaller(first + call.windows_per_chunk, all);
    T* bias = to_table ? t.bias : partial<T>(call.partial_bias, task, t.tokens * t.width);
    if (to_table) std::memset(bias, 0, size_t(t.tokens * t.width) * sizeof(T));
    T* table = partial<T>(call.partial_table, task, call.table_rows);
    T* pad_key = partial<T>(call.partial_pad_key, task, p.head_dim);
    T* pad_value = partial<T>(call.partial_pad_value, task, p.value_dim);
    double* logit_scale = partial<double>(call.partial_logit_scale, task, 1);

    for (int64_t window = first; window < last; ++window) {
      Window& w = places[window % 2];
      w.place(p, window / p.windows(), window % p.windows());
      softmax.place(w, head);
      const int64_t columns = round_up<T>(w.end);
      t.query.template read<Token>(w, kQuery, head, w.end, nullptr);
      t.key.template read<Token>(w, kKey, head, t.tokens, in.pad_key);
      t.value.template read<Token>(w, kValue, head, t.tokens, in.pad_value);
      t.grad_out.template read<Token>(w, kOut, head, w.end, nullptr);
      if (window + 1 < last) {
        Window& next = places[(window + 1) % 2];
        next.place(p, (window + 1) / p.windows(), (window + 1) % p.windows());
        ahead.expect(next, head);
      }
      if (in.logit_scale != nullptr) {
        normalise_rows(t.query, w.end, t.query_inverse);
        normalise_rows(t.key, t.tokens, t.key_inverse);
      }
      transpose<T>(t.query.rows(), w.end, columns, t.depth, t.query_t, t.width);
      transpose<T>(t.grad_out.rows(), w.end, columns, t.value_depth, t.grad_out_t, t.width);
      const int64_t parts = (columns + t.group - 1) / t.group;
      for (int64_t g = 0; g < parts; ++g) {
        const auto [i0, rows] = part_of<T>(w.end, g, parts);
        backward_queries<Token>(call, w, softmax, t, head, i0, rows, bias, logit_scale, ahead);
      }
      finish_keys<Token>(call, w, t, head, pad_key, pad_value);
    }
    if (to_table)
      for (int64_t j = 0; j < t.tokens; ++j)
        for (int64_t i = 0; i < t.tokens; ++i)
          table[call.bias_index[j * t.tokens + i]] += bias[j * t.width + i];
  }
}
