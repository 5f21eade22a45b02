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

// What the tiles of one product share, and where one of them begins.
template <class T>
struct Tile {
  const T* left[kMaxRows];
  int64_t left_step;
  const T* const* right;
  int64_t right_column, depth;
  T factor;
  Rows<const T> start;
  Rows<T> result;
  Lines lines;
};

// result(R, C vectors) = start + factor·left·right, from zero where start has no data; asks for one
// of the lines each step.
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
  const T factor = tile.factor;
  const auto finish = [&](auto starts) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) {
        Vec<T> result = sum[r][v] * factor;
        if constexpr (starts) result += load(tile.start.data + r * tile.start.stride + v * kCount);
        store(tile.result.data + r * tile.result.stride + v * kCount, result);
      }
  };
  if (tile.start.data != nullptr) {
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

// result(rows, columns) = start + factor·left·right, from zero without a start; columns is a
// multiple of the lanes. Tiles are of even size: 49 rows are 9 tiles of 5 or 6, not 8 and a lone
// row.
template <class T>
void product(const Left<T>& left, const Right<T>& right, int64_t depth, T factor,
             Rows<const T> start, Rows<T> result, int64_t rows, int64_t columns, Ahead& ahead) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr auto kTiles = std::make_index_sequence<kMaxRows * kMaxColumns>();
  const int64_t vectors = columns / kCount;
  const int64_t row_tiles = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t column_tiles = (vectors + kMaxColumns - 1) / kMaxColumns;
  const int64_t depth_tiles = (depth + kMaxDepth - 1) / kMaxDepth;
  Tile<T> tile;
  tile.left_step = left.step_stride;
  tile.factor = factor;
  for (int64_t ct = 0; ct < column_tiles; ++ct) {
    const int64_t v0 = vectors * ct / column_tiles, v1 = vectors * (ct + 1) / column_tiles;
    tile.right_column = right.column + v0 * kCount;
    for (int64_t dt = 0; dt < depth_tiles; ++dt) {
      const int64_t k0 = depth * dt / depth_tiles, k1 = depth * (dt + 1) / depth_tiles;
      tile.right = right.rows + k0;
      tile.depth = k1 - k0;
      for (int64_t rt = 0; rt < row_tiles; ++rt) {
        const int64_t r0 = rows * rt / row_tiles, r1 = rows * (rt + 1) / row_tiles;
        const auto at = [&](auto m) {
          if (m.data != nullptr) m.data += r0 * m.stride + v0 * kCount;
          return m;
        };
        for (int64_t r = r0; r < r1; ++r) tile.left[r - r0] = left.row(r) + k0 * left.step_stride;
        tile.start = at(dt > 0 ? Rows<const T>(result) : start);
        tile.result = at(result);
        tile.lines = ahead.take(k1 - k0);
        const auto run = tile.lines.base != nullptr
                             ? product_tile_of<T, true>(r1 - r0, v1 - v0, kTiles)
                             : product_tile_of<T, false>(r1 - r0, v1 - v0, kTiles);
        run(tile);
      }
    }
  }
}
