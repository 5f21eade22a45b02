// The forward of one precision: which kernel, and its launch.
#pragma once

#include "cuda/device/multi_tile_fwd.cuh"
#include "cuda/device/single_tile_fwd.cuh"
#include "cuda/host/launch_params.h"
#include "cuda/host/run.h"

namespace swin_kernels::cuda {

template <class P>
void run_forward(const Device& device, const Arguments& a, const Problem& p, const Tensor& out) {
  using T = typename P::Element;
  Forward call;
  call.in = call_of<T>(a, p);
  call.out = view_of(out);
  call.in.by_16_bytes = call.in.by_16_bytes && by_16_bytes<T>(call.out, p.value_dim);
  const int64_t channels = std::max(p.head_dim, p.value_dim), tokens = p.tokens();
  using Tiled = TiledForwardMemory<P, kTiledChannels<P>>;
  static_assert(sizeof(Tiled) <= kSharedBytes);
  choose_channels<P>(channels, [&](auto chosen) {
    constexpr int kChannels = decltype(chosen)::value;
    constexpr int64_t bytes = sizeof(SingleTileForwardMemory<P, kChannels>);
    static_assert(bytes <= kSharedBytes);
    if (tokens <= kTile && channels <= kChannels) {
      constexpr auto kernel = single_tile_forward<P, kChannels>;
      const int threads = threads_for(tokens);
      call.windows_per_program = windows_per_program(p, device, kernel, p.heads, threads, bytes);
      const int64_t blocks = checked_blocks(runs_of(p, call.windows_per_program) * p.heads);
      device.launch(kernel, call, blocks, threads, bytes);
    } else {
      const int64_t blocks = checked_blocks(p.batch * p.windows() * p.heads * tiles_of(p));
      device.launch(tiled_forward<P, kTiledChannels<P>>, call, blocks, threads_for(kTile),
                    sizeof(Tiled));
    }
  });
}

}  // namespace swin_kernels::cuda
