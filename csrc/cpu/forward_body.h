// The fused forward of one (window, head). Included once per instruction set.

// Queries whose logits are worked on together: whole vectors, of at most about so many bytes.
template <class T>
inline int64_t queries_at_once(int64_t tokens, int64_t bytes) {
  const int64_t vectors = bytes / (tokens * SWIN_VECTOR_BYTES), most = round_up<T>(tokens);
  const int64_t fit = vectors / kMaxColumns * kMaxColumns * Lanes<T>::kCount;
  constexpr int64_t kLeast = kMaxColumns * Lanes<T>::kCount;
  return smaller(most, fit < kLeast ? kLeast : fit);
}
constexpr int64_t kForwardLogitBytes = 64 << 10;

// The queries [first, first + count) of part g of `parts`; whole vectors but for the last.
struct Part {
  int64_t first, count;
};
template <class T>
inline Part part_of(int64_t queries, int64_t g, int64_t parts) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t vectors = (queries + kCount - 1) / kCount;
  const int64_t first = vectors * g / parts * kCount, end = vectors * (g + 1) / parts * kCount;
  return {first, smaller(end, queries) - first};
}

template <class Token, class A = Singles<typename SumOf<Token>::type>>
void forward(const Forward& call, int64_t begin, int64_t end) {
  using T = typename A::Sum;
  using E = typename A::Element;
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const int64_t tokens = p.tokens(), width = round_up<T>(tokens),
                group = queries_at_once<T>(tokens, kForwardLogitBytes);
  const bool cosine = in.logit_scale != nullptr;
  Scratch scratch;
  const Map maps[] = {{&in.query, p.head_dim},
                      {&in.key, p.head_dim},
                      {&in.value, p.value_dim},
                      {&call.out, p.value_dim}};
  Window places[2] = {Window(p, maps, 4, scratch),
                      Window(p, maps, 4, scratch)};  // this window and the one asked for
  Ahead ahead(places[0], sizeof(Token), scratch);
  Softmax<T> softmax(in, scratch);
  TokenRows<E> query(maps[kQuery], width, cosine, scratch);
  TokenRows<E> key(maps[kKey], tokens, cosine, scratch);
  TokenRows<E> value(maps[kValue], tokens, false, scratch);
  Transposed<A> query_t(width, p.head_dim, scratch);
  OverTokens<A> value_steps(maps[kValue], tokens, scratch);
  WeightFactors<A> factors(tokens, group, scratch);
  ResultRows<T> out(maps[kOut], group, false, scratch);
  T* logits = scratch.take<T>(tokens * group);  // (keys, queries)
  T* const* logit_rows = row_pointers(logits, group, tokens, scratch);
  const Rows<T> weights = {logits, group};
  T* inverse = scratch.take<T>(group);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.heads, window = task / p.heads;
    Window& w = places[window % 2];
    w.place(p, window / p.windows(), window % p.windows());
    softmax.place(w, head);
    query.template read<Token>(w, kQuery, head, w.end, nullptr);
    key.template read<Token>(w, kKey, head, tokens, in.pad_key);
    value.template read<Token>(w, kValue, head, tokens, in.pad_value);
    if (task + 1 < end) {
      const int64_t next = (task + 1) / p.heads;
      places[next % 2].place(p, next / p.windows(), next % p.windows());
      ahead.expect(places[next % 2], (task + 1) % p.heads);
    }
    if constexpr (A::kPer == 1) {
      if (cosine) {
        normalise_rows(query, w.end);
        normalise_rows(key, tokens);
      }
    }
    query_t.fill(query, w.end);
    const auto* value_rows = value_steps.fill(value, 0, tokens);
    const int64_t parts = (round_up<T>(w.end) + group - 1) / group;
    for (int64_t g = 0; g < parts; ++g) {
      const auto [i0, rows] = part_of<T>(w.end, g, parts);
      const int64_t columns = round_queries<T>(rows);
      multiply<A>({.left = {.rows = over_channels<A>(key)},
                   .right = {query_t.rows(), i0},
                   .depth = steps<A>(p.head_dim),
                   .result = logit_rows,
                   .rows = tokens,
                   .columns = columns,
                   .factor = factor_of<T>(in, head),
                   .start = softmax.bias(i0)},
                  ahead);
      softmax.weigh(i0, columns, weights, inverse);
      if (in.dropout_p > 0) drop<T>(in, w, head, i0, rows, weights);
      out.template aim<Token>(w, kOut, head, i0, rows);
      multiply<A>({.left = factors.over_keys(weights, tokens, columns),
                   .right = {value_rows},
                   .depth = steps<A>(tokens),
                   .result = out.rows(),
                   .rows = rows,
                   .columns = out.width(),
                   .row_factors = inverse},
                  ahead);
      out.template store<Token>(w, kOut, head, i0, rows);
    }
  }
}
