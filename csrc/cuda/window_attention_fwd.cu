// The forward op, and the schemas of both: those of csrc/registration.cpp, and whether products of
// fp32 tokens may be rounded to TF32.
#include <torch/csrc/stable/library.h>

#include "cuda/op.h"
#include "cuda/tiled_forward.h"
#include "cuda/whole_forward.h"
#include "schemas.h"

namespace swin_kernels::cuda {
namespace {

Tensor cuda_forward(SWIN_PARAMETERS, bool tf32) {
  const Arguments a SWIN_ARGUMENTS;
  const Problem p = checked_on_device(a);
  Tensor out = torch::stable::new_empty(a.query, output_shape(a));
  if (p.batch == 0) return out;
  const Device device(a.query);
  const int64_t channels = std::max(p.head_dim, p.value_dim);
  choose(element_of(a.query), tf32, channels, [&](auto kernels) {
    using P = typename decltype(kernels)::Precision;
    using T = typename P::Element;
    constexpr int kChannels = decltype(kernels)::kChannels;
    Forward call;
    call.in = call_of<T>(a, p);
    call.out = view_of(out, out.mutable_data_ptr(), -1);
    call.in.by_16_bytes = call.in.by_16_bytes && by_16_bytes<T>(call.out, p.value_dim);
    const int64_t windows = p.batch * p.windows(), tokens = p.tokens();
    using Tiled = TiledForwardMemory<P, kTiledChannels<P>>;
    static_assert(sizeof(Tiled) <= kSharedBytes);
    const int64_t whole_bytes = WholeForwardMemory<P, kChannels>::bytes(a.mask.has_value());
    if (tokens <= kTile && channels <= kChannels && whole_bytes <= kSharedBytes) {
      call.windows_per_program = windows_per_program(p, device);
      const int64_t blocks = checked_blocks(runs_of(p, call.windows_per_program) * p.heads);
      device.launch(whole_window_forward<P, kChannels>, call, blocks, threads_for(p.tokens()),
                    whole_bytes);
    } else {
      const int64_t blocks = checked_blocks(windows * p.heads * tiles_of(p));
      device.launch(tiled_forward<P, kTiledChannels<P>>, call, blocks, threads_for(kTile),
                    sizeof(Tiled));
    }
  });
  return out;
}

}  // namespace
}  // namespace swin_kernels::cuda

#define SWIN_DEFINE(library) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#define SWIN_IMPLEMENT(library, key) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

SWIN_DEFINE(SWIN_LIBRARY) {
  m.def("cuda_forward(" SWIN_OPERANDS SWIN_OPTIONS ", bool tf32) -> Tensor");
  m.def("cuda_backward(Tensor grad_out, " SWIN_OPERANDS SWIN_OPTIONS
        ", bool tf32, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor)");
}

SWIN_IMPLEMENT(SWIN_LIBRARY, SWIN_DISPATCH_KEY) {
  m.impl("cuda_forward", TORCH_BOX(&swin_kernels::cuda::cuda_forward));
}
