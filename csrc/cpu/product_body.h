// Products of small matrices whose result stays in registers over the depth. Included once per
// instruction set.

constexpr int kMaxRows = 6;
constexpr int kMaxColumns = SWIN_COLUMN_VECTORS;

// The left factor, read a number at a time: (row, step) at rows[row][step], or, without rows, at
// data[row·row_stride + step·step_stride], so that a transposed one costs nothing.
template <class T>
struct Left {
  const T* const* rows = nullptr;
  const T* data = nullptr;
  int64_t row_stride = 0, step_stride = 1;

  const T* row(int64_t r) const { return rows != nullptr ? rows[r] : data + r * row_stride; }
};

// The right factor, read a vector at a time: step k begins at rows[k] + column.
template <class T>
struct Right {
  const T* const* rows;
  int64_t column = 0;
};

// A matrix read and written a vector at a time; rows start `stride` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  operator Rows<const T>() const { return {data, stride}; }
};

// result(rows, columns) = start + factor·left·right, from zero where start has no data; `columns`
// is a multiple of the lanes. Row r of the result begins at result[r].
template <class T>
struct Product {
  Left<T> left;
  Right<T> right;
  int64_t depth;
  T* const* result;
  int64_t rows, columns;
  T factor = 1;
  const T* row_factors = nullptr;  // a further factor for each row
  Rows<const T> start = {};
  bool adds = false;  // the start is the result itself
};

// What one tile of it reads and writes.
template <class T>
struct Tile {
  const T* left[kMaxRows];
  int64_t left_step;
  const T* const* right;
  int64_t right_column, depth;
  T* result[kMaxRows];
  T factor[kMaxRows];
  const T* start[kMaxRows];
  bool starts;
  Lines lines;
};

// R rows and C vectors, in registers over the depth; asks for one of the lines each step.
template <class T, int R, int C, bool kAsks>
void product_tile(const Tile<T>& tile) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  const T* left[R];
  for (int r = 0; r < R; ++r) left[r] = tile.left[r];
  const T* const* right = tile.right;
  const int64_t left_step = tile.left_step, column = tile.right_column, depth = tile.depth;
  const Lines lines = tile.lines;
  Vec<T> sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) sum[r][v] = Vec<T>{};
  for (int64_t k = 0, step = 0; k < depth; ++k, step += left_step) {
    if (kAsks) lines.ask(k);
    const T* row = right[k] + column;
    Vec<T> panel[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) panel[v] = load(row + v * kCount);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T x = left[r][step];
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] += x * panel[v];
    }
  }
  const auto finish = [&](auto starts) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) {
        Vec<T> result = sum[r][v] * tile.factor[r];
        if constexpr (starts) result += load(tile.start[r] + v * kCount);
        store(tile.result[r] + v * kCount, result);
      }
  };
  if (tile.starts) {
    finish(std::true_type());
  } else {
    finish(std::false_type());
  }
}

template <class T, bool kAsks, size_t... I>
constexpr auto product_tile_of(int64_t rows, int64_t columns, std::index_sequence<I...>) {
  constexpr void (*kTable[])(const Tile<T>&) = {
      &product_tile<T, int(I) / kMaxColumns + 1, int(I) % kMaxColumns + 1, kAsks>...};
  return kTable[(rows - 1) * kMaxColumns + columns - 1];
}

// Steps that are summed in a register before they are added to c: a chain of 576 roundings errs
// three times as much as nine of 64.
constexpr int64_t kMaxDepth = 64;

// Tiles are of even size: 49 rows are 9 tiles of 5 or 6, not 8 and a lone row.
template <class T>
void multiply(const Product<T>& p, Ahead& ahead) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr auto kTiles = std::make_index_sequence<kMaxRows * kMaxColumns>();
  const int64_t vectors = p.columns / kCount;
  const int64_t row_tiles = (p.rows + kMaxRows - 1) / kMaxRows;
  const int64_t column_tiles = (vectors + kMaxColumns - 1) / kMaxColumns;
  const int64_t depth_tiles = (p.depth + kMaxDepth - 1) / kMaxDepth;
  Tile<T> tile;
  tile.left_step = p.left.step_stride;
  for (int64_t ct = 0; ct < column_tiles; ++ct) {
    const int64_t v0 = vectors * ct / column_tiles, v1 = vectors * (ct + 1) / column_tiles;
    tile.right_column = p.right.column + v0 * kCount;
    for (int64_t dt = 0; dt < depth_tiles; ++dt) {
      const int64_t k0 = p.depth * dt / depth_tiles, k1 = p.depth * (dt + 1) / depth_tiles;
      tile.right = p.right.rows + k0;
      tile.depth = k1 - k0;
      const bool adds = p.adds || dt > 0;
      tile.starts = adds || p.start.data != nullptr;
      for (int64_t rt = 0; rt < row_tiles; ++rt) {
        const int64_t r0 = p.rows * rt / row_tiles, r1 = p.rows * (rt + 1) / row_tiles;
        for (int64_t r = r0, i = 0; r < r1; ++r, ++i) {
          tile.left[i] = p.left.row(r) + k0 * p.left.step_stride;
          tile.result[i] = p.result[r] + v0 * kCount;
          tile.start[i] = adds ? tile.result[i] : p.start.data + r * p.start.stride + v0 * kCount;
          tile.factor[i] = p.row_factors == nullptr ? p.factor : p.factor * p.row_factors[r];
        }
        tile.lines = ahead.take(k1 - k0);
        const auto run = tile.lines.base != nullptr
                             ? product_tile_of<T, true>(r1 - r0, v1 - v0, kTiles)
                             : product_tile_of<T, false>(r1 - r0, v1 - v0, kTiles);
        run(tile);
      }
    }
  }
}
