// Cache lines asked for before they are needed. Included once per instruction set.

// Cache lines: the l-th lies at base + offset[l].
struct Lines {
  const char* base = nullptr;
  const int64_t* offset = nullptr;

  // Into the second cache, not to drive out what is worked on. Inline by force: GCC takes a
  // function of prefetches for one without effect and drops the call.
  SWIN_INLINE void ask(int64_t l) const { __builtin_prefetch(base + offset[l], 0, 2); }
};

// The cache lines of a (window, head) that comes up next, to be asked for one by one between the
// multiplications of this one: they are too far apart for the processor to foresee, and all at once
// they would hold up the loads of the work itself.
class Ahead {
 public:
  Ahead(const Window& window, int64_t element_bytes, Scratch& scratch)
      : bytes_(element_bytes), map_count_(window.map_count()) {
    for (int m = 0; m < map_count_; ++m) {
      const Map& map = window.map(MapName(m));
      const int before = m - 1;  // query, key and value of a packed tensor lie alike
      const bool alike = m > 0 && same_places(map, window.map(MapName(before)));
      offset_[m] =
          alike ? offset_[before]
                : scratch.take<int64_t>(window.tokens() * (map.channels * bytes_ / kLine + 2));
    }
  }

  void expect(const Window& window, int64_t head) {
    if (placed_ != window.index) place(window);
    for (int m = 0; m < map_count_; ++m)
      base_[m] = window.rows<const char>(MapName(m), head, bytes_);
    map_ = next_ = 0;
  }

  // The next `n` lines of one map; those at its end, where fewer are left, are asked for at once.
  // Null where all were taken.
  Lines take(int64_t n) {
    while (map_ < map_count_) {
      const Lines lines = {base_[map_], offset_[map_] + next_};
      const int64_t left = count_[map_] - next_;
      next_ += n;
      if (left >= n) return lines;
      for (int64_t l = 0; l < left; ++l) lines.ask(l);
      ++map_;
      next_ = 0;
    }
    return {};
  }

 private:
  static constexpr int64_t kLine = 64;

  static bool same_places(const Map& a, const Map& b) {
    bool same = a.channels == b.channels && a.view->channel == b.view->channel;
    for (int x = 0; x < kAxes; ++x) same = same && a.view->axis[x] == b.view->axis[x];
    return same;
  }

  void place(const Window& window) {
    placed_ = window.index;
    for (int m = 0; m < map_count_; ++m) {
      if (m > 0 && offset_[m] == offset_[m - 1]) {
        count_[m] = count_[m - 1];
        continue;
      }
      count_[m] = 0;
      const Map& map = window.map(MapName(m));
      if (map.view->channel != 1) continue;
      const int64_t *offsets = window.offsets(MapName(m)), bytes = map.channels * bytes_;
      int64_t* line = offset_[m];
      for (int64_t i = 0; i < window.real; ++i) {
        const int64_t row = offsets[window.token[i]] * bytes_;
        for (int64_t b = 0; b < bytes; b += kLine) *line++ = row + b;
        if (bytes % kLine != 0) *line++ = row + bytes - 1;
      }
      count_[m] = line - offset_[m];
    }
  }

  static constexpr int kMaps = 7;
  int64_t bytes_;
  int map_count_;
  int64_t placed_ = -1;
  int64_t* offset_[kMaps];
  int64_t count_[kMaps] = {};
  const char* base_[kMaps];
  int map_ = kMaps;  // nothing is expected yet
  int64_t next_ = 0;
};
