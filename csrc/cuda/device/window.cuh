// Where a program's windows and a tile's tokens are: index arithmetic of host and device alike.
#pragma once

#include "window_geometry.h"

namespace swin_kernels::cuda {

// A window of a batch; windows are counted row-major over images, then over the map.
struct WindowPlace {
  int64_t image, place[kAxes];

  SWIN_HOST_DEVICE WindowPlace(const Problem& p, int64_t window) {
    image = window;
    for (int a = kAxes - 1; a >= 0; --a) {
      place[a] = image % p.axis[a].count();
      image /= p.axis[a].count();
    }
  }

  SWIN_HOST_DEVICE void next(const Problem& p) {
    for (int a = kAxes - 1; a >= 0; --a) {
      if (++place[a] < p.axis[a].count()) return;
      place[a] = 0;
    }
    ++image;
  }

  // Within its image.
  SWIN_HOST_DEVICE int64_t number(const Problem& p) const {
    return (place[0] * p.axis[1].count() + place[1]) * p.axis[2].count() + place[2];
  }

  // A bit for each axis on which a seam of the roll cuts this window.
  SWIN_HOST_DEVICE int seams(const Problem& p) const {
    int bits = 0;
    for (int a = 0; a < kAxes; ++a)
      if (p.axis[a].shift > 0 && !p.axis[a].wraps && place[a] == p.axis[a].count() - 1)
        bits |= 1 << a;
    return bits;
  }
};

// The head of a program, and its run of windows: heads are neighbours in launch order, as they
// share the cache lines of a token.
struct WindowRun {
  int64_t head, first;  // the first window
  int count;

  SWIN_HOST_DEVICE WindowRun(const Problem& p, int64_t program, int64_t windows_per_program)
      : head(program % p.heads), first(program / p.heads * windows_per_program) {
    const int64_t left = p.batch * p.windows() - first;
    count = int(left < windows_per_program ? left : windows_per_program);
  }
};

// A token of a window, by its number.
struct TokenPlace {
  int64_t place[kAxes];

  SWIN_HOST_DEVICE TokenPlace(const Problem& p, int token) {
    for (int a = kAxes - 1; a >= 0; --a) {
      place[a] = token % int(p.axis[a].window);
      token /= int(p.axis[a].window);
    }
  }

  // A bit for each axis: on which side of the seam it lies, in a window that one cuts.
  SWIN_HOST_DEVICE int sides(const Problem& p) const {
    int bits = 0;
    for (int a = 0; a < kAxes; ++a)
      if (place[a] >= p.axis[a].window - p.axis[a].shift) bits |= 1 << a;
    return bits;
  }

  // The row of the geometric table for a query and a key is the difference of their numbers, and
  // that of the middle.
  SWIN_HOST_DEVICE int table_number(const Problem& p) const {
    const int64_t row1 = 2 * p.axis[2].window - 1, row0 = (2 * p.axis[1].window - 1) * row1;
    return int(place[0] * row0 + place[1] * row1 + place[2]);
  }
};

// Of the last token of a window: what centres differences of table numbers.
SWIN_HOST_DEVICE inline int table_middle(const Problem& p) {
  return TokenPlace(p, int(p.tokens()) - 1).table_number(p);
}

// The roll of one axis as a rotation: by less than its period.
struct Rotation {
  int64_t period, by, size;  // size: tokens of the map, the others are padding

  SWIN_HOST_DEVICE Rotation(const Axis& axis, bool roll_then_pad)
      : period(roll_then_pad ? axis.size : axis.padded()),
        by(axis.shift < period ? axis.shift : axis.shift % period),
        size(axis.size) {}

  // Whether the token at `rolled` comes from around the end of the map.
  SWIN_HOST_DEVICE bool around(int64_t rolled) const { return rolled + by >= period; }
  SWIN_HOST_DEVICE bool real(int64_t rolled) const {
    return rolled < period && rolled + by - (around(rolled) ? period : 0) < size;
  }
};

// The position on the map of a window's token; false if padding added it.
SWIN_HOST_DEVICE inline bool source_of(const Problem& p, const WindowPlace& window,
                                       const TokenPlace& token, int64_t (&source)[kAxes]) {
  bool real = true;
  for (int a = 0; a < kAxes; ++a) {
    const int64_t rolled = window.place[a] * p.axis[a].window + token.place[a];
    source[a] = p.axis[a].source(rolled, p.roll_then_pad);
    real = real && source[a] >= 0;
  }
  return real;
}

SWIN_HOST_DEVICE inline int64_t offset_of(const TokenView& view, int64_t image, int64_t head,
                                          const int64_t (&source)[kAxes]) {
  int64_t offset = image * view.batch + head * view.head;
  for (int a = 0; a < kAxes; ++a) offset += source[a] * view.axis[a];
  return offset;
}

}  // namespace swin_kernels::cuda
