// The fused forward of one (window, head). Included once per instruction set.

// Queries whose logits are worked on together: whole vectors, of at most about so many bytes.
template <class T>
inline int64_t queries_at_once(int64_t tokens, int64_t bytes) {
  const int64_t vectors = bytes / (tokens * SWIN_VECTOR_BYTES), most = round_up<T>(tokens);
  const int64_t fit = vectors / kMaxColumns * kMaxColumns * Lanes<T>::kCount;
  constexpr int64_t kLeast = kMaxColumns * Lanes<T>::kCount;
  return smaller(most, fit < kLeast ? kLeast : fit);
}
constexpr int64_t kPieces = 18;
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

template <class Token>
void forward(const Forward& call, int64_t begin, int64_t end) {
  using T = typename SumOf<Token>::type;
  const Operands& in = call.in;
  const Problem& p = in.problem;
  const int64_t tokens = p.tokens(), width = round_up<T>(tokens), depth = round_up<T>(p.head_dim),
                value_depth = round_up<T>(p.value_dim),
                group = queries_at_once<T>(tokens, kForwardLogitBytes);
  Scratch scratch;
  const Map maps[] = {{&in.query, p.head_dim, false},
                      {&in.key, p.head_dim, false},
                      {&in.value, p.value_dim, false},
                      {&call.out, p.value_dim, true}};
  Window places[2] = {Window(p, maps, 4, scratch),
                      Window(p, maps, 4, scratch)};  // this window and the one prefetched
  Softmax<T> softmax(in, scratch);
  T* query = scratch.take<T>(width * depth);
  T* query_t = scratch.take<T>(width * depth);  // (depth, width)
  T* key = scratch.take<T>(tokens * depth);
  T* value = scratch.take<T>(tokens * value_depth);
  T* logits = scratch.take<T>(tokens * group);  // (keys, queries)
  T* out = scratch.take<T>(group * value_depth);
  T* inverse = scratch.take<T>(group);
  std::memset(query, 0, size_t(width * depth) * sizeof(T));

  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.heads, window = task / p.heads;
    Window& w = places[window % 2];
    w.place(p, window / p.windows(), window % p.windows());
    softmax.place(w, head);
    pack<Token>(w, kQuery, head, 0, w.end, nullptr, query, depth);
    pack<Token>(w, kKey, head, 0, tokens, in.pad_key, key, depth);
    pack<Token>(w, kValue, head, 0, tokens, in.pad_value, value, value_depth);
    Ahead ahead;
    if (task + 1 < end) {
      const int64_t next = (task + 1) / p.heads;
      places[next % 2].place(p, next / p.windows(), next % p.windows());
      ahead = Ahead(places[next % 2], (task + 1) % p.heads, sizeof(Token), kPieces);
    }
    if (in.logit_scale != nullptr) {
      normalise_rows<T>(query, w.end, depth, nullptr);
      normalise_rows<T>(key, tokens, depth, nullptr);
    }
    transpose<T>(query, depth, w.end, round_up<T>(w.end), depth, query_t, width);
    Token* home = w.rows<Token>(kOut, head);
    const int64_t parts = (round_up<T>(w.end) + group - 1) / group;
    for (int64_t g = 0; g < parts; ++g) {
      const auto [i0, rows] = part_of<T>(w.end, g, parts);
      const int64_t columns = round_up<T>(rows);
      product<T>({key, depth, 1}, {query_t + i0, width}, p.head_dim, factor_of<T>(in, head),
                 softmax.bias(i0), {logits, columns}, tokens, columns, ahead);
      softmax.weigh(i0, columns, {logits, columns}, inverse);
      if (in.dropout_p > 0) drop<T>(in, w, head, i0, rows, {logits, columns});
      product<T>({logits, 1, columns}, {value, value_depth}, tokens, T(1), {}, {out, value_depth},
                 rows, value_depth, ahead);
      for (int64_t r = 0; r < rows; ++r) {
        if (w.padding(i0 + r)) continue;
        T* row = out + r * value_depth;
        for (int64_t c = 0; c < value_depth; c += Lanes<T>::kCount)
          store(row + c, Vec<T>(load(row + c) * inverse[r]));
        store_row(row, p.value_dim, home + w.offsets(kOut)[i0 + r]);
      }
    }
  }
}
