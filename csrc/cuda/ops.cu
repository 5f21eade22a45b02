// The native ops on CUDA tensors. `_C_cpu` defines them; the tests' emulator, in a namespace of its
// own, does so here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/host/run.h"
#include "schemas.h"

#if defined(__CUDACC__)
#define SWIN_LIBRARY swin_kernels
#define SWIN_DISPATCH_KEY CUDA
#else
#define SWIN_LIBRARY swin_kernels_emulated
#define SWIN_DISPATCH_KEY CPU
#endif

namespace swin_kernels::cuda {
namespace {

SWIN_KERNEL(32, 1)
probe_kernel(SWIN_PARAMETER int) {}

// f(Precision<…>()) for tokens of a dtype.
template <class F>
auto choose(Element element, bool tf32, const F& f) {
  switch (element) {
    case Element::kHalf:
      return f(Fp16());
    case Element::kBFloat16:
      return f(Bf16());
    case Element::kFloat:
      return tf32 ? f(Tf32()) : f(Fp32());
    default:
      return f(Fp64());
  }
}

// Throws before anything is launched.
inline Problem checked_on_device(const Arguments& a) {
#if defined(__CUDACC__)
  STD_TORCH_CHECK(a.query.is_cuda(), "swin_kernels: expected CUDA tensors");
#endif
  return checked_problem(a);
}

Tensor window_attention_forward(SWIN_PARAMETERS, bool allow_tf32) {
  const Arguments a SWIN_ARGUMENTS;
  const Problem p = checked_on_device(a);
  Tensor out = torch::stable::new_empty(a.query, output_shape(a));
  if (p.batch == 0) return out;
  const Device device(a.query);
  choose(element_of(a.query), allow_tf32,
         [&](auto precision) { run_forward<decltype(precision)>(device, a, p, out); });
  return out;
}

Gradients window_attention_backward(Tensor grad_out, SWIN_PARAMETERS, bool allow_tf32,
                                    int64_t needs) {
  const Arguments a SWIN_ARGUMENTS;
  const Problem p = checked_on_device(a);
  check_grad_out(grad_out, a);
  const Device device(a.query);
  return choose(element_of(a.query), allow_tf32, [&](auto precision) {
    return run_backward<decltype(precision)>(device, a, p, grad_out, needs);
  });
}

// Whether this object was built for a device.
bool cuda_has_code_for(int64_t index) { return Device::has_code(int32_t(index), probe_kernel); }

}  // namespace
}  // namespace swin_kernels::cuda

// the macros of torch paste what they are given: the names have to be spelled out before
#define SWIN_DEFINE(library) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#define SWIN_IMPLEMENT(library, key) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

SWIN_DEFINE(SWIN_LIBRARY) {
#if !defined(__CUDACC__)
  m.def(SWIN_FORWARD_SCHEMA);
  m.def(SWIN_BACKWARD_SCHEMA);
#endif
  m.def("cuda_has_code_for(int device) -> bool");
}

SWIN_IMPLEMENT(SWIN_LIBRARY, SWIN_DISPATCH_KEY) {
  m.impl("window_attention_forward", TORCH_BOX(&swin_kernels::cuda::window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&swin_kernels::cuda::window_attention_backward));
}

SWIN_IMPLEMENT(SWIN_LIBRARY, CompositeExplicitAutograd) {
  m.impl("cuda_has_code_for", TORCH_BOX(&swin_kernels::cuda::cuda_has_code_for));
}
