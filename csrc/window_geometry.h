// The facts of one call that every kernel shares: how a map is padded, rolled and cut into windows.
// No torch in it, so that it compiles for a device and for host tests alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SWIN_HOST_DEVICE __host__ __device__
#else
#define SWIN_HOST_DEVICE
#endif

namespace swin_kernels {

constexpr int64_t kMaxTokens = 1 << 15;  // of a window, so that no product of sizes overflows
constexpr double kNormClamp = 1e-12;     // of norms in cosine attention, as in the reference
constexpr int kAxes = 3;                 // maps of fewer axes have leading axes of one token

// How many parts of `size` cover n. On the host: in kernels the quotient is written out, as nvcc
// folds comparisons with it less well behind a call.
template <class Int>
constexpr Int parts_of(Int n, Int size) {
  return (n + size - 1) / size;
}

struct Axis {
  int64_t size = 1;    // tokens of the map
  int64_t window = 1;  // tokens of a window
  int64_t shift = 0;
  bool wraps = false;   // the axis is periodic: no region boundary on it
  int64_t windows = 1;  // kept, as a division costs a GPU a hundred instructions

  static Axis of(int64_t size, int64_t window, int64_t shift, bool wraps) {
    return {size, window, shift, wraps, parts_of(size, window)};
  }

  SWIN_HOST_DEVICE int64_t count() const { return windows; }
  SWIN_HOST_DEVICE int64_t padded() const { return count() * window; }

  // Where the token at `rolled` comes from; -1 if padding added it.
  SWIN_HOST_DEVICE int64_t source(int64_t rolled, bool roll_then_pad) const {
    const int64_t period = roll_then_pad ? size : padded();
    if (rolled >= period) return -1;
    int64_t position = rolled + shift;
    // mostly once, as a map is seldom smaller than its shift: a division costs more
    while (position >= period) position -= period;
    return position < size ? position : -1;
  }

  // 0 in the body of the map, 1 and 2 on either side of the seam that the roll made in the last
  // window.
  SWIN_HOST_DEVICE int region(int64_t rolled) const {
    if (shift == 0 || wraps) return 0;
    return int(rolled >= padded() - window) + int(rolled >= padded() - shift);
  }
};

struct Problem {
  Axis axis[kAxes];
  bool roll_then_pad = false;
  int64_t batch = 0, heads = 0, head_dim = 0, value_dim = 0;

  SWIN_HOST_DEVICE int64_t tokens() const {
    return axis[0].window * axis[1].window * axis[2].window;
  }
  SWIN_HOST_DEVICE int64_t windows() const {
    return axis[0].count() * axis[1].count() * axis[2].count();
  }
};

enum class Element : int { kFloat = 0, kDouble = 1, kHalf = 2, kBFloat16 = 3 };
constexpr int kElements = 4;

// A tensor (batch, *S, heads, channels) at its strides, in elements.
struct TokenView {
  void* data = nullptr;
  int64_t batch = 0, axis[kAxes] = {0, 0, 0}, head = 0, channel = 1;
};

struct TokenViews {
  TokenView query, key, value;
};

// A tensor of floating numbers of any dtype, at its strides in elements.
struct FloatView {
  const void* data = nullptr;  // null: none
  Element element = Element::kFloat;
  int64_t stride[3] = {0, 0, 0};
};

// The counter-based dropout mask of docs/contract.md: Philox4x32-10, first word of the block.
SWIN_HOST_DEVICE inline uint32_t philox_first_word(uint32_t c0, uint32_t c1, uint32_t c2,
                                                   uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace swin_kernels
