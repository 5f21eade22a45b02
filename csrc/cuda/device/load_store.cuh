// Tiles of tokens between a map in memory and shared memory, by a whole block.
#pragma once

#include "cuda/device/mma.cuh"
#include "cuda/device/params.cuh"
#include "cuda/device/token_places.cuh"

namespace swin_kernels::cuda {

// Lines of `Channels` numbers and 16 bytes, so that eight lines are in eight groups of banks.
template <class T, int Channels>
struct TokenTile {
  static constexpr int kPitch = Channels + 16 / int(sizeof(T));
  static_assert(Channels * sizeof(T) % 32 == 0);
};

struct alignas(16) Piece {
  uint32_t words[4];
};

// f(a number of the dtype).
template <class F>
SWIN_DEVICE auto as_element(Element element, const F& f) {
  switch (element) {
    case Element::kFloat:
      return f(float());
    case Element::kDouble:
      return f(double());
    case Element::kHalf:
      return f(Half());
    default:
      return f(BFloat16());
  }
}

// view[i, j, k] of as many axes as it has.
template <class Sum>
SWIN_DEVICE Sum read(const FloatView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t offset = i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
  return as_element(view.element, [&](auto type) {
    return Sum(to_float(static_cast<const decltype(type)*>(view.data)[offset]));
  });
}

// What a token of padding holds in channel c: rounded as a token is; 0 where `pad` is null, or of
// none.
template <class T, class Sum>
SWIN_DEVICE T padding(const FloatView* pad, int64_t head, int64_t c) {
  if (pad == nullptr || pad->data == nullptr) return rounded<T>(Sum(0));
  return rounded<T>(read<Sum>(*pad, head, c));
}

// Channels [begin, begin + Channels) of the tokens at `offsets`: those that `view` has, the rest 0.
// Each warp loads its own 16 rows, so that rows which no other warp reads need no barrier of the
// block before. By copies that `wait_for_copies` ends where `by_16_bytes`.
template <class T, class Sum, int Channels, class Offsets>
SWIN_DEVICE void load_tile(T* tile, const TokenView& view, const Offsets& offsets, int begin,
                           int dim, const FloatView* pad, int64_t head, bool by_16_bytes) {
  constexpr int kPitch = TokenTile<T, Channels>::kPitch;
  constexpr int kPiece = 16 / int(sizeof(T)), kPieces = Channels / kPiece;
  const T* data = static_cast<const T*>(view.data);
  const int lane = thread_index() % kWarp, first = thread_index() / kWarp * kRows;
  bool single = false;  // whether the lane has pieces that no copy brings
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
  for (int i = 0; i < kRows * kPieces; i += kWarp) {
    const int row = first + (i + lane) / kPieces, piece = (i + lane) % kPieces * kPiece;
    const int64_t offset = offsets[row];
    T* to = tile + row * kPitch + piece;
    if (offset == kNoToken || begin + piece >= dim)
      *reinterpret_cast<Piece*>(to) = Piece{};
    else if (by_16_bytes && offset >= 0)
      copy_async(to, data + offset + begin + piece);
    else
      single = true;
  }
  if (!single) return;
#pragma unroll 1
  for (int i = lane; i < kRows * kPieces; i += kWarp) {
    const int row = first + i / kPieces, c = begin + i % kPieces * kPiece;
    const int64_t offset = offsets[row];
    if (offset == kNoToken || c >= dim || (by_16_bytes && offset >= 0)) continue;
    T* to = tile + row * kPitch + i % kPieces * kPiece;
#pragma unroll
    for (int e = 0; e < kPiece; ++e) {
      T x = rounded<T>(Sum(0));
      if (c + e < dim && offset >= 0) x = data[offset + (c + e) * view.channel];
      if (c + e < dim && offset == kPadding) x = padding<T, Sum>(pad, head, c + e);
      to[e] = x;
    }
  }
}

// A warp's rows of a tile, from `first` on, to the tokens at `offsets`.
template <class T, int Channels, class Offsets>
SWIN_DEVICE void store_rows(const T* tile, const TokenView& view, const Offsets& offsets, int first,
                            int begin, int dim, bool by_16_bytes, int lane) {
  constexpr int kPitch = TokenTile<T, Channels>::kPitch;
  constexpr int kPiece = 16 / int(sizeof(T)), kPieces = Channels / kPiece;
  T* data = static_cast<T*>(view.data);
  if (by_16_bytes) {
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
    for (int i = 0; i < kRows * kPieces; i += kWarp) {
      const int row = first + (i + lane) / kPieces, piece = (i + lane) % kPieces * kPiece;
      const int64_t offset = offsets[row];
      if (offset >= 0 && begin + piece < dim)
        *reinterpret_cast<Piece*>(data + offset + begin + piece) =
            *reinterpret_cast<const Piece*>(tile + row * kPitch + piece);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < kRows * kPieces; i += kWarp) {
    const int row = first + i / kPieces, c = begin + i % kPieces * kPiece;
    const int64_t offset = offsets[row];
    const T* from = tile + row * kPitch + i % kPieces * kPiece;
    if (offset < 0) continue;
#pragma unroll
    for (int e = 0; e < kPiece; ++e)
      if (c + e < dim) data[offset + (c + e) * view.channel] = from[e];
  }
}

// A warp's sums to the tokens at `offsets`: through its rows of a tile, which nobody reads any
// more.
template <int Channels, class Sum, int Tiles, class T, class Offsets>
SWIN_DEVICE void store_sums(const Sum (&sums)[Tiles][4], int tiles, T* tile, const TokenView& view,
                            const Offsets& offsets, int first, int begin, int dim, bool by_16_bytes,
                            int lane) {
  constexpr int kPitch = TokenTile<T, Channels>::kPitch;
  put(tile + first * kPitch, kPitch, sums, tiles, lane);
  warp_barrier();
  store_rows<T, Channels>(tile, view, offsets, first, begin, dim, by_16_bytes, lane);
}

}  // namespace swin_kernels::cuda
