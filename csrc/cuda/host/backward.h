// The backward of one precision: which kernels, the tensors that they sum to, and their launches.
#pragma once

#include "cuda/device/multi_tile_bwd.cuh"
#include "cuda/device/single_tile_bwd.cuh"
#include "cuda/host/partial_sums.h"

namespace swin_kernels::cuda {

// Whether a whole window's backward fits the shared memory: that of fp64 does not.
template <class P>
constexpr bool kWholeBackward =
    sizeof(SingleTileBackwardMemory<P, kWholeChannels<P>>) <= kSharedBytes;

// A run of windows for each program that sums the gradient of a bias.
template <class P>
int64_t backward_run(const Device& device, const Problem& p, bool whole, int64_t channels) {
  int64_t length = 1;
  if constexpr (kWholeBackward<P>) {
    if (whole)
      choose_channels<P>(channels, [&](auto chosen) {
        constexpr int kChannels = decltype(chosen)::value;
        length = windows_per_program(p, device, single_tile_backward<P, kChannels>, p.heads,
                                     threads_for(p.tokens()),
                                     sizeof(SingleTileBackwardMemory<P, kChannels>));
      });
  }
  if (!whole) {
    constexpr int kChannels = kTiledChannels<P>;
    length = windows_per_program(p, device, tiled_grad_bias<P, kChannels>,
                                 p.heads * tiles_of(p) * tiles_of(p), threads_for(kTile),
                                 sizeof(TiledBackwardMemory<P, kChannels>));
  }
  return length;
}

template <class P, int Channels>
void launch_tiled(const Device& device, const Backward& call, bool wants_bias,
                  int64_t bias_programs) {
  const Problem& p = call.in.problem;
  const int64_t tiles = tiles_of(p),
                blocks = checked_blocks(p.batch * p.windows() * p.heads * tiles);
  const int threads = threads_for(kTile);
  constexpr int64_t bytes = sizeof(TiledBackwardMemory<P, Channels>);
  static_assert(bytes <= kSharedBytes);
  device.launch(tiled_statistics<P, Channels>, call, blocks, threads, bytes);
  device.launch(tiled_grad_query<P, Channels>, call, blocks, threads, bytes);
  device.launch(tiled_grad_key_value<P, Channels>, call, blocks, threads, bytes);
  if (wants_bias)
    device.launch(tiled_grad_bias<P, Channels>, call, checked_blocks(bias_programs * tiles * tiles),
                  threads, bytes);
}

template <class P>
Gradients run_backward(const Device& device, const Arguments& a, const Problem& p,
                       const Tensor& grad_out, int64_t needs) {
  using T = typename P::Element;
  using Sum = typename P::Sum;
  using Wide = WideSum<P>;
  const TokenGradients grad(a);
  Backward call;
  call.in = call_of<T>(a, p);
  call.grad_out = read_only(grad_out);
  call.grad = grad.views;
  call.in.by_16_bytes = call.in.by_16_bytes && by_16_bytes<T>(call.grad_out, p.value_dim) &&
                        by_16_bytes<T>(call.grad, p);
  const int64_t channels = std::max(p.head_dim, p.value_dim);
  const bool whole = kWholeBackward<P> && p.tokens() <= kTile && channels <= kWholeChannels<P>;
  call.windows_per_program = backward_run<P>(device, p, whole, channels);
  const int64_t runs = runs_of(p, call.windows_per_program);
  const int64_t other_rows = whole ? runs : p.batch * p.windows() * tiles_of(p);
  Partials<Sum, Wide> partials(a, p, needs, runs, other_rows);
  partials.hand_to(call);
  MaybeTensor statistics;  // lives until the kernels are launched
  if constexpr (kWholeBackward<P>) {
    if (whole)
      choose_channels<P>(channels, [&](auto chosen) {
        constexpr int kChannels = decltype(chosen)::value;
        device.launch(single_tile_backward<P, kChannels>, call, checked_blocks(runs * p.heads),
                      threads_for(p.tokens()), sizeof(SingleTileBackwardMemory<P, kChannels>));
      });
  }
  if (!whole) {
    statistics = sums_like<Sum>(a.query, {p.batch * p.windows(), p.heads, kStatistics, p.tokens()});
    call.statistics = statistics->mutable_data_ptr();
    launch_tiled<P, kTiledChannels<P>>(device, call, partials.bias.has_value(), runs * p.heads);
  }
  return {grad.query,
          grad.key,
          grad.value,
          partials.of_bias(device),
          partials.of_table(device, call.in.bias),
          partials.template summed<Wide>(device, partials.pad_key, a.pad_key,
                                         holds_pad_key(a) ? float_view(a.pad_key) : FloatView()),
          partials.template summed<Wide>(device, partials.pad_value, a.pad_value),
          partials.template summed<Wide>(device, partials.logit_scale, a.logit_scale)};
}

}  // namespace swin_kernels::cuda
