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

// Whether tokens read where they lie would drive each other out of the first cache: rows a multiple
// of 512 bytes apart, say, share an eighth of its sets. Those of right factors are read several
// times.
template <class Token>
inline bool crowded(const Map& map, int64_t tokens) {
  constexpr int64_t kLine = 64, kSets = 64, kWays = 8;
  const int64_t lines = (map.channels * int64_t(sizeof(Token)) + kLine - 1) / kLine;
  int64_t step = map.view->axis[kAxes - 1] * int64_t(sizeof(Token)) / kLine, sets = kSets;
  for (; sets > 1 && step % 2 == 0; step /= 2) sets /= 2;
  return 2 * tokens * lines > smaller(sets * lines, kSets) * kWays;
}

// The tiles of one thread.
template <class Token, class A>
struct BackwardTiles {
  using T = typename A::Sum;
  using E = typename A::Element;
  int64_t tokens, width, group;
  TokenRows<E> query, key, value, grad_out;
  Transposed<A> query_t, grad_out_t;
  OverTokens<A> query_steps, key_steps, grad_out_steps;
  T *weight_data, *grad_data;
  Rows<T> weights, grad_logits;
  T *const *weight_rows, *const *grad_rows;
  WeightFactors<A> weight_factors, grad_factors;
  ResultRows<T> grad_query, grad_key, grad_value;
  T *inverse, *top, *mean, *query_inverse, *key_inverse;

  BackwardTiles(const Problem& p, const Map* maps, bool cosine, Scratch& scratch)
      : tokens(p.tokens()),
        width(round_up<T>(tokens)),
        group(queries_at_once<T>(tokens, kBackwardLogitBytes)),
        query(maps[kQuery], width, cosine || crowded<Token>(maps[kQuery], tokens), scratch),
        key(maps[kKey], tokens, cosine || crowded<Token>(maps[kKey], tokens), scratch),
        value(maps[kValue], tokens, false, scratch),
        grad_out(maps[kOut], width, crowded<Token>(maps[kOut], tokens), scratch),
        query_t(width, p.head_dim, scratch),
        grad_out_t(width, p.value_dim, scratch),
        query_steps(maps[kQuery], width, scratch),
        key_steps(maps[kKey], tokens, scratch),
        grad_out_steps(maps[kOut], width, scratch),
        weight_data(scratch.take<T>(tokens * group)),
        grad_data(scratch.take<T>(tokens * group)),
        weights{weight_data, group},
        grad_logits{grad_data, group},
        weight_rows(row_pointers(weight_data, group, tokens, scratch)),
        grad_rows(row_pointers(grad_data, group, tokens, scratch)),
        weight_factors(tokens, group, scratch),
        grad_factors(tokens, group, scratch),
        grad_query(maps[kGradQuery], group, cosine, scratch),
        grad_key(maps[kGradKey], tokens, cosine, scratch),
        grad_value(maps[kGradValue], tokens, false, scratch),
        inverse(scratch.take<T>(group)),
        top(scratch.take<T>(group)),
        mean(scratch.take<T>(group)),
        query_inverse(scratch.take<T>(width)),
        key_inverse(scratch.take<T>(tokens)) {}
};

// Where one (chunk, head) sums what has no place of its own in the map; null where the call wants
// no such gradient.
template <class T>
struct Partials {
  T* bias;
  double *pad_key, *pad_value, *logit_scale;

  Partials(const Backward& call, int64_t chunk, int64_t head, bool clears) {
    const Problem& p = call.in.problem;
    const int64_t place = chunk * p.heads + head, tokens = p.tokens();
    const auto at = [&]<class S>(S, void* buffer, int64_t n) -> S* {
      if (buffer == nullptr) return nullptr;
      S* sums = static_cast<S*>(buffer) + place * n;
      if (clears) std::memset(sums, 0, size_t(n) * sizeof(S));
      return sums;
    };
    bias = at(T(), call.partial_bias, tokens * round_up<T>(tokens));
    pad_key = at(double(), call.partial_pad_key, p.head_dim);
    pad_value = at(double(), call.partial_pad_value, p.value_dim);
    logit_scale = at(double(), call.partial_logit_scale, 1);
  }
};

// P = e·inverse in place of e and dS = P∘(dP − Σ P∘dP) in place of dP, of a vector V of queries; dS
// is added to `bias` if that has data.
template <class V, bool kBias, class T>
void finish_logits_vector(int64_t keys, Rows<T> e, Rows<T> dp, const T* inverse,
                          const GradSums<T>& grad, Rows<T> bias) {
  const V factor = load_vector<V>(inverse), top = load_vector<V>(grad.top),
          mean = load_vector<V>(grad.mean);
  for (int64_t j = 0; j < keys; ++j) {
    T *weight = e.data + j * e.stride, *home = dp.data + j * dp.stride;
    const V p = load_vector<V>(weight) * factor, ds = p * (load_vector<V>(home) - top - mean);
    store_vector(weight, p);
    store_vector(home, ds);
    if (kBias) {
      T* sum = bias.data + j * bias.stride;
      store_vector(sum, V(load_vector<V>(sum) + ds));
    }
  }
}

template <class T>
void finish_logits(int64_t keys, int64_t columns, Rows<T> e, Rows<T> dp, const T* inverse,
                   const GradSums<T>& grad, Rows<T> bias) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  for (int64_t c = 0; c < columns; c += kCount) {
    const auto run = [&]<class V>(V) {
      const auto one = bias.data == nullptr ? &finish_logits_vector<V, false, T>
                                            : &finish_logits_vector<V, true, T>;
      one(keys, {e.data + c, e.stride}, {dp.data + c, dp.stride}, inverse + c, grad.from(c),
          {bias.data == nullptr ? nullptr : bias.data + c, bias.stride});
    };
    if (c + kCount <= columns) {
      run(Vec<T>{});
    } else {
      run(HalfVec<T>{});
    }
  }
}

// The queries [i0, i0 + rows): dQ is finished and stored, dK and dV are added to.
template <class Token, class A, class T = typename A::Sum>
void backward_queries(const Backward& call, const Window& w, const Softmax<T>& softmax,
                      BackwardTiles<Token, A>& t, const Partials<T>& partials, int64_t head,
                      int64_t i0, int64_t rows, Ahead& ahead) {
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const int64_t columns = round_queries<T>(rows);
  const bool cosine = in.logit_scale != nullptr;
  const T factor = factor_of<T>(in, head);
  multiply<A>({.left = {.rows = over_channels<A>(t.key)},
               .right = {t.query_t.rows(), i0},
               .depth = steps<A>(p.head_dim),
               .result = t.weight_rows,
               .rows = t.tokens,
               .columns = columns,
               .factor = factor,
               .start = softmax.bias(i0)},
              ahead);
  multiply<A>({.left = {.rows = over_channels<A>(t.value)},
               .right = {t.grad_out_t.rows(), i0},
               .depth = steps<A>(p.value_dim),
               .result = t.grad_rows,
               .rows = t.tokens,
               .columns = columns},
              ahead);
  if (in.dropout_p > 0) drop(in, w, head, i0, rows, t.grad_logits);
  const GradSums<T> sums = {t.grad_logits, t.top, t.mean};
  softmax.weigh(i0, columns, t.weights, t.inverse, sums);
  finish_logits<T>(t.tokens, columns, t.weights, t.grad_logits, t.inverse, sums,
                   {partials.bias == nullptr ? nullptr : partials.bias + i0, t.width});
  if (in.dropout_p > 0) drop(in, w, head, i0, rows, t.weights);
  const T outer = cosine ? T(1) : factor;  // else through_norm has it
  t.grad_query.template aim<Token>(w, kGradQuery, head, i0, rows);
  multiply<A>({.left = t.grad_factors.over_keys(t.grad_logits, t.tokens, columns),
               .right = {t.key_steps.fill(t.key, 0, t.tokens)},
               .depth = steps<A>(t.tokens),
               .result = t.grad_query.rows(),
               .rows = rows,
               .columns = t.grad_query.width(),
               .factor = outer},
              ahead);
  multiply<A>({.left = t.grad_factors.over_queries(t.grad_logits, t.tokens, rows),
               .right = {t.query_steps.fill(t.query, i0, rows)},
               .depth = steps<A>(rows),
               .result = t.grad_key.rows(),
               .rows = t.tokens,
               .columns = t.grad_key.width(),
               .factor = outer,
               .adds = i0 > 0},
              ahead);
  multiply<A>({.left = t.weight_factors.over_queries(t.weights, t.tokens, rows),
               .right = {t.grad_out_steps.fill(t.grad_out, i0, rows)},
               .depth = steps<A>(rows),
               .result = t.grad_value.rows(),
               .rows = t.tokens,
               .columns = t.grad_value.width(),
               .adds = i0 > 0},
              ahead);
  if constexpr (A::kPer == 1) {
    for (int64_t r = 0; cosine && r < rows; ++r) {
      const T* unit = t.query.rows()[i0 + r];
      T* grad = t.grad_query.rows()[r];
      if (w.padding(i0 + r)) continue;
      if (partials.logit_scale != nullptr)
        *partials.logit_scale += dot(unit, grad, t.query.width());
      through_norm<Token>(unit, t.query_inverse[i0 + r], factor, t.query.width(), grad);
    }
  }
  t.grad_query.template store<Token>(w, kGradQuery, head, i0, rows);
}

// dK and dV of the window to their places; those of padding are summed.
template <class Token, class A, class T = typename A::Sum>
void finish_keys(const Backward& call, const Window& w, BackwardTiles<Token, A>& t,
                 const Partials<T>& partials, int64_t head) {
  const Problem& p = call.in.problem;
  if constexpr (A::kPer == 1) {
    for (int64_t j = 0; call.in.logit_scale != nullptr && j < t.tokens; ++j)
      through_norm<Token>(t.key.rows()[j], t.key_inverse[j], factor_of<T>(call.in, head),
                          t.key.width(), t.grad_key.rows()[j]);
  }
  t.grad_key.template store<Token>(w, kGradKey, head, 0, t.tokens);
  t.grad_value.template store<Token>(w, kGradValue, head, 0, t.tokens);
  if (w.real == t.tokens) return;
  const auto add = [](const T* from, int64_t n, double* to) {
    for (int64_t i = 0; to != nullptr && i < n; ++i) to[i] += from[i];
  };
  for (int64_t j = 0; j < t.tokens; ++j) {
    if (!w.padding(j)) continue;
    add(t.grad_key.rows()[j], p.head_dim, partials.pad_key);
    add(t.grad_value.rows()[j], p.value_dim, partials.pad_value);
  }
}

template <class Token, class A = Singles<typename SumOf<Token>::type>>
void backward(const Backward& call, int64_t begin, int64_t end) {
  using T = typename A::Sum;
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const bool cosine = in.logit_scale != nullptr;
  Scratch scratch;
  const Map maps[] = {{&in.query, p.head_dim},        {&in.key, p.head_dim},
                      {&in.value, p.value_dim},       {&call.grad_out, p.value_dim},
                      {&call.grad_query, p.head_dim}, {&call.grad_key, p.head_dim},
                      {&call.grad_value, p.value_dim}};
  Window places[2] = {Window(p, maps, 7, scratch),
                      Window(p, maps, 7, scratch)};  // this window and the one asked for
  Ahead ahead(places[0], sizeof(Token), scratch);
  Softmax<T> softmax(in, scratch);
  BackwardTiles<Token, A> t(p, maps, cosine, scratch);

  for (int64_t task = begin; task < end; ++task) {
    const auto [first_window, last_window, first_head, last_head, chunk] = call.share(task);
    for (int64_t window = first_window; window < last_window; ++window) {
      Window& w = places[window % 2];
      w.place(p, window / p.windows(), window % p.windows());
      for (int64_t head = first_head; head < last_head; ++head) {
        const Partials<T> partials(call, chunk, head, window == first_window);
        softmax.place(w, head);
        t.query.template read<Token>(w, kQuery, head, w.end, nullptr);
        t.key.template read<Token>(w, kKey, head, t.tokens, in.pad_key);
        t.value.template read<Token>(w, kValue, head, t.tokens, in.pad_value);
        t.grad_out.template read<Token>(w, kOut, head, w.end, nullptr);
        t.grad_key.template aim<Token>(w, kGradKey, head, 0, t.tokens);
        t.grad_value.template aim<Token>(w, kGradValue, head, 0, t.tokens);
        if (head + 1 < last_head) {
          ahead.expect(w, head + 1);
        } else if (window + 1 < last_window) {
          Window& next = places[(window + 1) % 2];
          next.place(p, (window + 1) / p.windows(), (window + 1) % p.windows());
          ahead.expect(next, first_head);
        }
        if constexpr (A::kPer == 1) {
          if (cosine) {
            normalise_rows(t.query, w.end, t.query_inverse);
            normalise_rows(t.key, t.tokens, t.key_inverse);
          }
        }
        t.query_t.fill(t.query, w.end);
        t.grad_out_t.fill(t.grad_out, w.end);
        const int64_t parts = (round_up<T>(w.end) + t.group - 1) / t.group;
        for (int64_t g = 0; g < parts; ++g) {
          const auto [i0, rows] = part_of<T>(w.end, g, parts);
          backward_queries<Token, A>(call, w, softmax, t, partials, head, i0, rows, ahead);
        }
        finish_keys<Token, A>(call, w, t, partials, head);
      }
    }
  }
}
