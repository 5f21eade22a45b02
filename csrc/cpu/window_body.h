// The tokens of one window, and where they lie in each of the maps. Included once per instruction
// set.

// Memory of one thread for the length of a call, in pieces that start on cache lines.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() {
    for (int i = 0; i < used_; ++i) std::free(pieces_[i]);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t n) {
    const size_t bytes = (size_t(n) * sizeof(T) + 63) / 64 * 64;
    void* piece = used_ < kMost ? std::aligned_alloc(64, bytes) : nullptr;
    if (piece == nullptr) throw std::bad_alloc();
    pieces_[used_++] = piece;
    return static_cast<T*>(piece);
  }

 private:
  static constexpr int kMost = 128;  // pieces that one thread takes
  void* pieces_[kMost];
  int used_ = 0;
};

// What a call reads and writes token by token; kOut is the output or its gradient.
enum MapName { kQuery, kKey, kValue, kOut, kGradQuery, kGradKey, kGradValue };
struct Map {
  const TokenView* view;
  int64_t channels;
};

// The tokens of one window of one image, and where they lie in each of the maps, by MapName.
struct Window {
  int64_t image = -1, index = -1;  // window within the image
  int64_t real = 0;                // tokens that are not padding
  int64_t end = 0;                 // one past the last of them
  int regions = 1;
  int64_t* token;   // (N): the real ones, in order
  int32_t* region;  // (N): 0 … regions − 1

  Window(const Problem& p, const Map* maps, int map_count, Scratch& scratch)
      : token(scratch.take<int64_t>(p.tokens())),
        region(scratch.take<int32_t>(p.tokens())),
        maps_(maps),
        map_count_(map_count),
        tokens_(p.tokens()),
        offset_(scratch.take<int64_t>(map_count * p.tokens())) {
    for (int a = 0; a < kAxes; ++a) {
      source_[a] = scratch.take<int64_t>(p.axis[a].window);
      side_[a] = scratch.take<int32_t>(p.axis[a].window);
    }
  }

  void place(const Problem& p, int64_t image_index, int64_t window_index) {
    const bool same_place = index == window_index;
    image = image_index;
    index = window_index;
    if (same_place) return;
    const int64_t n0 = p.axis[0].window, n1 = p.axis[1].window, n2 = p.axis[2].window;
    const int64_t c1 = p.axis[1].count(), c2 = p.axis[2].count();
    const int64_t place[kAxes] = {index / (c1 * c2), index / c2 % c1, index % c2};
    int sides[kAxes];
    bool whole = true;
    for (int a = 0; a < kAxes; ++a)
      sides[a] = place_axis(a, p.axis[a], place[a], p.roll_then_pad, whole);
    regions = sides[0] * sides[1] * sides[2];
    int64_t t = 0;
    for (int64_t i = 0; i < n0; ++i)
      for (int64_t j = 0; j < n1; ++j, t += n2) {
        const int32_t first = (side_[0][i] * sides[1] + side_[1][j]) * sides[2];
        for (int64_t k = 0; k < n2; ++k) region[t + k] = first + side_[2][k];
        for (int m = 0; m < map_count_; ++m) {
          const int64_t *stride = maps_[m].view->axis, s2 = stride[2];
          const int64_t row = source_[0][i] * stride[0] + source_[1][j] * stride[1];
          int64_t* offset = offset_ + m * tokens_ + t;
          for (int64_t k = 0; k < n2; ++k) offset[k] = row + source_[2][k] * s2;
        }
      }
    if (whole) {
      for (t = 0; t < tokens_; ++t) token[t] = t;
      real = end = tokens_;
    } else {
      mark_padding(n0, n1, n2);
    }
  }

  bool padding(int64_t t) const { return offset_[t] < 0; }
  const Map& map(MapName name) const { return maps_[name]; }
  int map_count() const { return map_count_; }
  int64_t tokens() const { return tokens_; }

  // Where the rows of one head begin; that of token t lies offsets(name)[t] elements on.
  template <class Token>
  Token* rows(MapName name, int64_t head, int64_t scale = 1) const {
    const TokenView& view = *maps_[name].view;
    return static_cast<Token*>(view.data) + (image * view.batch + head * view.head) * scale;
  }
  const int64_t* offsets(MapName name) const { return offset_ + name * tokens_; }

 private:
  // Where the window's tokens of one axis come from, −1 for padding, and on which side of the seam
  // they lie; returns how many sides it meets.
  int place_axis(int a, const Axis& axis, int64_t window, bool roll_then_pad, bool& whole) {
    const int64_t first = window * axis.window;
    const int region = axis.region(first);
    int sides = 1;
    for (int64_t i = 0; i < axis.window; ++i) {
      source_[a][i] = axis.source(first + i, roll_then_pad);
      whole = whole && source_[a][i] >= 0;
      side_[a][i] = axis.region(first + i) != region;  // a window meets at most two
      if (side_[a][i]) sides = 2;
    }
    return sides;
  }

  void mark_padding(int64_t n0, int64_t n1, int64_t n2) {
    real = end = 0;
    int64_t t = 0;
    for (int64_t i = 0; i < n0; ++i)
      for (int64_t j = 0; j < n1; ++j)
        for (int64_t k = 0; k < n2; ++k, ++t) {
          if (source_[0][i] >= 0 && source_[1][j] >= 0 && source_[2][k] >= 0) {
            token[real++] = t;
            end = t + 1;
          } else {
            for (int m = 0; m < map_count_; ++m) offset_[m * tokens_ + t] = -1;
          }
        }
  }

  const Map* maps_;
  int map_count_;
  int64_t tokens_;
  int64_t* offset_;  // (maps, N): −1 for padding
  int64_t* source_[kAxes];
  int32_t* side_[kAxes];
};
