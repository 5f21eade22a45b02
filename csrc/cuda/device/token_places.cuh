// What a tile's tokens are within a window, and where they lie in memory: by a whole block.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/window.cuh"

namespace swin_kernels::cuda {

constexpr int64_t kPadding = -1;  // in place of an offset: a token that padding added
constexpr int64_t kNoToken = -2;  // beyond the window

// What logits and offsets ask of a tile's tokens: the same in every window, so that divisions are
// done once.
struct TokenFacts {
  int table_number[kTile], sides[kTile];
  int16_t place[kAxes][kTile];  // kMaxTokens on an axis at most
};

SWIN_DEVICE void note_token(TokenFacts& facts, const Problem& p, const TokenPlace& token, int row) {
  facts.table_number[row] = token.table_number(p);
  facts.sides[row] = token.sides(p);
#pragma unroll
  for (int a = 0; a < kAxes; ++a) facts.place[a][row] = int16_t(token.place[a]);
}

// Row `row` of the tile from token `first` on; beyond the window the last token.
SWIN_DEVICE TokenPlace token_of_row(const Problem& p, int first, int row) {
  const int last = int(p.tokens()) - 1;
  return {p, first + row < last ? first + row : last};
}

// The offsets of kTile tokens of a window from token `first` on in each of some views; notes the
// tokens too.
template <int Views>
SWIN_DEVICE void note_and_place_tokens(TokenFacts& facts, int64_t (&offsets)[Views][kTile],
                                       const TokenView* const (&views)[Views], const Problem& p,
                                       const WindowPlace& window, int64_t head, int first) {
  constexpr int kSharers = 2;  // of a token's views, so that 128 threads have work
  for (int i = thread_index(); i < kSharers * kTile; i += block_threads()) {
    const int row = i % kTile, share = i / kTile;
    const TokenPlace token = token_of_row(p, first, row);
    if (share == 0) note_token(facts, p, token, row);
    const bool inside = first + row < int(p.tokens());
    int64_t source[kAxes];
    const bool real = inside && source_of(p, window, token, source);
#pragma unroll
    for (int v = 0; v < Views; ++v) {
      if (v % kSharers != share) continue;
      offsets[v][row] = real     ? offset_of(*views[v], window.image, head, source)
                        : inside ? kPadding
                                 : kNoToken;
    }
  }
}

// A window's part of the offsets of its tokens.
template <int Views>
struct WindowOffsets {
  // of the window's first token, by the axes on which a token comes from around the end of the map
  int64_t origin[Views][1 << kAxes];
  int around[kTile];  // those axes, as bits; kPadding or kNoToken
};

// The tokens of every window of up to kTile, in some views.
template <int Views>
struct WindowTokens {
  TokenFacts facts;
  int64_t within[Views][kTile];  // from the window's first token
  int64_t stride[Views][kAxes], batch[Views], head[Views];
  Rotation rotation[kAxes];

  // Once a program.
  SWIN_DEVICE void note(const TokenView* const (&views)[Views], const Problem& p, int64_t of_head) {
    if (thread_index() == 0) {
#pragma unroll
      for (int a = 0; a < kAxes; ++a) rotation[a] = Rotation(p.axis[a], p.roll_then_pad);
#pragma unroll
      for (int v = 0; v < Views; ++v) {
#pragma unroll
        for (int a = 0; a < kAxes; ++a) stride[v][a] = views[v]->axis[a];
        batch[v] = views[v]->batch;
        head[v] = of_head * views[v]->head;
      }
    }
    for (int row = thread_index(); row < kTile; row += block_threads()) {
      const TokenPlace token = token_of_row(p, 0, row);
      note_token(facts, p, token, row);
#pragma unroll
      for (int v = 0; v < Views; ++v) {
        within[v][row] = 0;
#pragma unroll
        for (int a = 0; a < kAxes; ++a) within[v][row] += token.place[a] * views[v]->axis[a];
      }
    }
  }

  // Once a window: half of the threads find where tokens come from, the others what that adds.
  SWIN_DEVICE void place(WindowOffsets<Views>& to, const Problem& p,
                         const WindowPlace& window) const {
    const int tokens = int(p.tokens());
    int64_t first[kAxes];
#pragma unroll
    for (int a = 0; a < kAxes; ++a) first[a] = window.place[a] * p.axis[a].window;
    for (int i = thread_index(); i < kTile + (Views << kAxes); i += block_threads()) {
      if (i < kTile) {
        int bits = 0;
        bool real = true;
#pragma unroll
        for (int a = 0; a < kAxes; ++a) {
          const int64_t rolled = first[a] + facts.place[a][i];
          real = real && rotation[a].real(rolled);
          bits |= int(rotation[a].around(rolled)) << a;
        }
        to.around[i] = int(i >= tokens ? kNoToken : real ? bits : kPadding);
      } else {
        const int v = (i - kTile) >> kAxes, axes = i % (1 << kAxes);
        int64_t origin = window.image * batch[v] + head[v];
#pragma unroll
        for (int a = 0; a < kAxes; ++a) {
          const int64_t back = (axes >> a & 1) != 0 ? rotation[a].period : 0;
          origin += (first[a] + rotation[a].by - back) * stride[v][a];
        }
        to.origin[v][axes] = origin;
      }
    }
  }
};

// The offsets of a window's tokens in one view, as if they were an array.
struct TokenOffsets {
  const int64_t *within, *origin;
  const int* around;

  template <int Views>
  SWIN_DEVICE TokenOffsets(const WindowTokens<Views>& tokens, const WindowOffsets<Views>& window,
                           int view)
      : within(tokens.within[view]), origin(window.origin[view]), around(window.around) {}

  SWIN_DEVICE int64_t operator[](int row) const {
    const int axes = around[row];
    return axes < 0 ? axes : within[row] + origin[axes];
  }
};

}  // namespace swin_kernels::cuda
