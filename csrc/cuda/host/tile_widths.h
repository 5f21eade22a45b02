// How many channels of a token a tile holds, for each precision: what fits the shared memory.
#pragma once

#include <type_traits>

#include "cuda/device/mma.cuh"

namespace swin_kernels::cuda {

// Bytes that every GPU from sm_80 on lets a program have.
constexpr int64_t kSharedBytes = 99 << 10;

// Channels that a tile of a whole window holds, at most.
template <class P>
constexpr int kWholeChannels = P::kUnit == Unit::kHalf            ? 64
                               : sizeof(typename P::Element) == 4 ? 32
                                                                  : 16;

// Those of windows of several tiles have one width for each size of element: 128 bytes.
template <class P>
constexpr int kTiledChannels = 128 / int(sizeof(typename P::Element));

// f(std::integral_constant<int, channels of a tile>()) for whole windows: the narrowest tile that
// `channels` fit, else the widest.
template <class P, class F>
void choose_channels(int64_t channels, const F& f) {
  constexpr int kWidest = kWholeChannels<P>;
  if constexpr (P::kUnit == Unit::kHalf) {
    if (channels <= kWidest / 2) return f(std::integral_constant<int, kWidest / 2>());
  }
  f(std::integral_constant<int, kWidest>());
}

}  // namespace swin_kernels::cuda
