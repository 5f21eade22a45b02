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
template <class Token, class T>
struct BackwardTiles {
  int64_t tokens, width, depth, value_depth, group;
  TokenRows<T> query, key, value, grad_out;
  T *query_t, *grad_out_t;
  const T *const *query_t_rows, *const *grad_out_t_rows;
  T *weights, *grad_logits;
  T *const *weight_rows, *const *grad_logit_rows;
  ResultRows<T> grad_query, grad_key, grad_value;
  T* scaled;  // the gradients of the output over Σe
  const T* const* scaled_rows;
  T *inverse, *top, *mean, *query_inverse, *key_inverse;

  BackwardTiles(const Problem& p, const Map* maps, bool cosine, Scratch& scratch)
      : tokens(p.tokens()),
        width(round_up<T>(tokens)),
        depth(round_up<T>(p.head_dim)),
        value_depth(round_up<T>(p.value_dim)),
        group(queries_at_once<T>(tokens, kBackwardLogitBytes)),
        query(maps[kQuery], width, cosine || crowded<Token>(maps[kQuery], tokens), scratch),
        key(maps[kKey], tokens, cosine || crowded<Token>(maps[kKey], tokens), scratch),
        value(maps[kValue], tokens, false, scratch),
        grad_out(maps[kOut], width, false, scratch),
        query_t(scratch.take<T>(depth * width)),
        grad_out_t(scratch.take<T>(value_depth * width)),
        query_t_rows(row_pointers(query_t, width, depth, scratch)),
        grad_out_t_rows(row_pointers(grad_out_t, width, value_depth, scratch)),
        weights(scratch.take<T>(tokens * group)),
        grad_logits(scratch.take<T>(tokens * group)),
        weight_rows(row_pointers(weights, group, tokens, scratch)),
        grad_logit_rows(row_pointers(grad_logits, group, tokens, scratch)),
        grad_query(maps[kGradQuery], group, cosine, scratch),
        grad_key(maps[kGradKey], tokens, cosine, scratch),
        grad_value(maps[kGradValue], tokens, false, scratch),
        scaled(scratch.take<T>(group * value_depth)),
        scaled_rows(row_pointers(scaled, value_depth, group, scratch)),
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
  T *bias, *pad_key, *pad_value;
  double* logit_scale;

  Partials(const Backward& call, int64_t chunk, int64_t head) {
    const Problem& p = call.in.problem;
    const int64_t place = chunk * p.heads + head, tokens = p.tokens();
    bias = at<T>(call.partial_bias, place, tokens * round_up<T>(tokens));
    pad_key = at<T>(call.partial_pad_key, place, p.head_dim);
    pad_value = at<T>(call.partial_pad_value, place, p.value_dim);
    logit_scale = at<double>(call.partial_logit_scale, place, 1);
  }

 private:
  template <class S>
  static S* at(void* buffer, int64_t place, int64_t n) {
    return buffer == nullptr ? nullptr : static_cast<S*>(buffer) + place * n;
  }
};

// dS = P∘(dP − Σ P∘dP) in place of dP, P being e·inverse, of a vector V of queries; added to `bias`
// if that has data.
template <class V, bool kBias, class T>
void grad_logits_vector(int64_t keys, Rows<const T> e, Rows<T> dp, const T* inverse,
                        const GradSums<T>& grad, Rows<T> bias) {
  const V factor = load_vector<V>(inverse), top = load_vector<V>(grad.top),
          mean = load_vector<V>(grad.mean);
  for (int64_t j = 0; j < keys; ++j) {
    T* home = dp.data + j * dp.stride;
    const V ds =
        load_vector<V>(e.data + j * e.stride) * ((load_vector<V>(home) - top - mean) * factor);
    store_vector(home, ds);
    if (kBias) {
      T* sum = bias.data + j * bias.stride;
      store_vector(sum, V(load_vector<V>(sum) + ds));
    }
  }
}

template <class T>
void grad_logits(int64_t keys, int64_t columns, Rows<const T> e, Rows<T> dp, const T* inverse,
                 const GradSums<T>& grad, Rows<T> bias) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  for (int64_t c = 0; c < columns; c += kCount) {
    const auto run = [&]<class V>(V) {
      const auto one =
          bias.data == nullptr ? &grad_logits_vector<V, false, T> : &grad_logits_vector<V, true, T>;
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
template <class Token, class T>
void backward_queries(const Backward& call, const Window& w, const Softmax<T>& softmax,
                      BackwardTiles<Token, T>& t, const Partials<T>& partials, int64_t head,
                      int64_t i0, int64_t rows, Ahead& ahead) {
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const int64_t columns = round_queries<T>(rows);
  const bool cosine = in.logit_scale != nullptr;
  const T factor = factor_of<T>(in, head);
  const Rows<T> weights = {t.weights, t.group}, dp = {t.grad_logits, t.group};
  multiply<T>({.left = {.rows = t.key.rows()},
               .right = {t.query_t_rows, i0},
               .depth = p.head_dim,
               .result = t.weight_rows,
               .rows = t.tokens,
               .columns = columns,
               .factor = factor,
               .start = softmax.bias(i0)},
              ahead);
  multiply<T>({.left = {.rows = t.value.rows()},
               .right = {t.grad_out_t_rows, i0},
               .depth = p.value_dim,
               .result = t.grad_logit_rows,
               .rows = t.tokens,
               .columns = columns},
              ahead);
  if (in.dropout_p > 0) drop(in, w, head, i0, rows, dp);
  const GradSums<T> sums = {dp, t.top, t.mean};
  softmax.weigh(i0, columns, weights, t.inverse, sums);
  grad_logits<T>(t.tokens, columns, weights, dp, t.inverse, sums,
                 {partials.bias == nullptr ? nullptr : partials.bias + i0, t.width});
  if (in.dropout_p > 0) drop(in, w, head, i0, rows, weights);
  for (int64_t r = 0; r < rows; ++r)  // dV takes the weights with 1/Σe in the other factor
    store_row(t.grad_out.rows()[i0 + r], t.inverse[r], t.value_depth, t.scaled + r * t.value_depth);
  const T outer = cosine ? T(1) : factor;  // else through_norm has it
  t.grad_query.template aim<Token>(w, kGradQuery, head, i0, rows);
  multiply<T>({.left = {.data = t.grad_logits, .row_stride = 1, .step_stride = t.group},
               .right = {t.key.rows()},
               .depth = t.tokens,
               .result = t.grad_query.rows(),
               .rows = rows,
               .columns = t.depth,
               .factor = outer},
              ahead);
  multiply<T>({.left = {.data = t.grad_logits, .row_stride = t.group},
               .right = {t.query.rows() + i0},
               .depth = rows,
               .result = t.grad_key.rows(),
               .rows = t.tokens,
               .columns = t.depth,
               .factor = outer,
               .adds = i0 > 0},
              ahead);
  multiply<T>({.left = {.data = t.weights, .row_stride = t.group},
               .right = {t.scaled_rows},
               .depth = rows,
               .result = t.grad_value.rows(),
               .rows = t.tokens,
               .columns = t.value_depth,
               .adds = i0 > 0},
              ahead);
  if (cosine)
    for (int64_t r = 0; r < rows; ++r) {
      const T* unit = t.query.rows()[i0 + r];
      T* grad = t.grad_query.rows()[r];
      if (w.padding(i0 + r)) continue;
      if (partials.logit_scale != nullptr) *partials.logit_scale += dot(unit, grad, t.depth);
      through_norm<Token>(unit, t.query_inverse[i0 + r], factor, t.depth, grad);
    }
  t.grad_query.template store<Token>(w, kGradQuery, head, i0, rows);
}

// dK and dV of the window to their places; those of padding are summed.
template <class Token, class T>
void finish_keys(const Backward& call, const Window& w, BackwardTiles<Token, T>& t,
                 const Partials<T>& partials, int64_t head) {
  const Problem& p = call.in.problem;
  if (call.in.logit_scale != nullptr)
    for (int64_t j = 0; j < t.tokens; ++j)
      through_norm<Token>(t.key.rows()[j], t.key_inverse[j], factor_of<T>(call.in, head), t.depth,
                          t.grad_key.rows()[j]);
  t.grad_key.template store<Token>(w, kGradKey, head, 0, t.tokens);
  t.grad_value.template store<Token>(w, kGradValue, head, 0, t.tokens);
  if (w.real == t.tokens) return;
  const auto add = [](const T* from, int64_t n, T* to) {
    for (int64_t i = 0; to != nullptr && i < n; ++i) to[i] += from[i];
  };
  for (int64_t j = 0; j < t.tokens; ++j) {
    if (!w.padding(j)) continue;
    add(t.grad_key.rows()[j], p.head_dim, partials.pad_key);
    add(t.grad_value.rows()[j], p.value_dim, partials.pad_value);
  }
}

template <class Token>
void backward(const Backward& call, int64_t begin, int64_t end) {
  using T = typename SumOf<Token>::type;
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
  BackwardTiles<Token, T> t(p, maps, cosine, scratch);

  for (int64_t task = begin; task < end; ++task) {
    const auto [first_window, last_window, first_head, last_head, chunk] = call.share(task);
    for (int64_t window = first_window; window < last_window; ++window) {
      Window& w = places[window % 2];
      w.place(p, window / p.windows(), window % p.windows());
      for (int64_t head = first_head; head < last_head; ++head) {
        const Partials<T> partials(call, chunk, head);
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
        if (cosine) {
          normalise_rows(t.query, w.end, t.query_inverse);
          normalise_rows(t.key, t.tokens, t.key_inverse);
        }
        const int64_t columns = round_up<T>(w.end);
        transpose<T>(t.query.rows(), w.end, columns, t.depth, t.query_t, t.width);
        transpose<T>(t.grad_out.rows(), w.end, columns, t.value_depth, t.grad_out_t, t.width);
        const int64_t parts = (columns + t.group - 1) / t.group;
        for (int64_t g = 0; g < parts; ++g) {
          const auto [i0, rows] = part_of<T>(w.end, g, parts);
          backward_queries<Token>(call, w, softmax, t, partials, head, i0, rows, ahead);
        }
        finish_keys<Token>(call, w, t, partials, head);
      }
    }
  }
}
