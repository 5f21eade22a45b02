// Products of small matrices whose result stays in registers over the depth. Included once per
// instruction set.

constexpr int kMaxRows = 6;
constexpr int kMaxColumns = SWIN_COLUMN_VECTORS;

// The left factor, read a number at a time: (row, step) at data[row·row_stride + step·step_stride],
// so that a transposed one costs nothing.
template <class T>
struct Left {
  const T* data;
  int64_t row_stride, step_stride;
};

// A matrix read and written a vector at a time; rows start `stride` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  operator Rows<const T>() const { return {data, stride}; }
};

// c(R, C vectors) = start + factor·a·b; without `kStarts` from zero.
template <class T, int R, int C, bool kStarts>
void product_tile(Left<T> a, Rows<const T> b, int64_t depth, T factor, Rows<const T> start,
                  Rows<T> c) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  Vec<T> sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) sum[r][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> panel[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) panel[v] = load(b.data + k * b.stride + v * kCount);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T x = a.data[r * a.row_stride + k * a.step_stride];
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] += x * panel[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      Vec<T> result = sum[r][v] * factor;
      if (kStarts) result += load(start.data + r * start.stride + v * kCount);
      store(c.data + r * c.stride + v * kCount, result);
    }
}

template <class T>
using ProductTile = void (*)(Left<T>, Rows<const T>, int64_t, T, Rows<const T>, Rows<T>);

template <class T, bool kStarts, size_t... I>
constexpr ProductTile<T> product_tile_of(int rows, int columns, std::index_sequence<I...>) {
  constexpr ProductTile<T> kTable[] = {
      &product_tile<T, int(I) / kMaxColumns + 1, int(I) % kMaxColumns + 1, kStarts>...};
  return kTable[(rows - 1) * kMaxColumns + columns - 1];
}

// Steps that are summed in a register before they are added to c: a chain of 576 roundings errs
// three times as much as nine of 64.
constexpr int64_t kMaxDepth = 64;

// c(rows, columns) = start + factor·a·b, from zero without a start; columns is a multiple of the
// lanes. Tiles are of even size: 49 rows are 9 tiles of 5 or 6, not 8 and a lone row.
template <class T>
void product(Left<T> a, Rows<const T> b, int64_t depth, T factor, Rows<const T> start, Rows<T> c,
             int64_t rows, int64_t columns, Ahead& ahead) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr auto kTiles = std::make_index_sequence<kMaxRows * kMaxColumns>();
  const int64_t vectors = columns / kCount;
  const int64_t row_tiles = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t column_tiles = (vectors + kMaxColumns - 1) / kMaxColumns;
  const int64_t depth_tiles = (depth + kMaxDepth - 1) / kMaxDepth;
  for (int64_t ct = 0; ct < column_tiles; ++ct) {
    const int64_t v0 = vectors * ct / column_tiles, v1 = vectors * (ct + 1) / column_tiles;
    for (int64_t dt = 0; dt < depth_tiles; ++dt) {
      const int64_t k0 = depth * dt / depth_tiles, k1 = depth * (dt + 1) / depth_tiles;
      for (int64_t rt = 0; rt < row_tiles; ++rt) {
        const int64_t r0 = rows * rt / row_tiles, r1 = rows * (rt + 1) / row_tiles;
        const auto at = [&](auto m) {
          if (m.data != nullptr) m.data += r0 * m.stride + v0 * kCount;
          return m;
        };
        const Rows<const T> from = at(dt > 0 ? Rows<const T>(c) : start);
        const ProductTile<T> tile =
            from.data != nullptr ? product_tile_of<T, true>(int(r1 - r0), int(v1 - v0), kTiles)
                                 : product_tile_of<T, false>(int(r1 - r0), int(v1 - v0), kTiles);
        tile({a.data + r0 * a.row_stride + k0 * a.step_stride, a.row_stride, a.step_stride},
             {b.data + k0 * b.stride + v0 * kCount, b.stride}, k1 - k0, factor, from, at(c));
        ahead.ask();
      }
    }
  }
}
