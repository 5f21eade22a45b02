// The kernels of one precision, as the ops run them. Each precision is compiled by itself: fp16.cu
// and its neighbours.
#pragma once

#include "arguments.h"
#include "cuda/device/mma.cuh"
#include "cuda/host/device_launcher.h"

namespace swin_kernels::cuda {

template <class P>
void run_forward(const Device& device, const Arguments& a, const Problem& p, const Tensor& out);

template <class P>
Gradients run_backward(const Device& device, const Arguments& a, const Problem& p,
                       const Tensor& grad_out, int64_t needs);

}  // namespace swin_kernels::cuda

#define SWIN_COMPILE(P)                                                                         \
  namespace swin_kernels::cuda {                                                                \
  template void run_forward<P>(const Device&, const Arguments&, const Problem&, const Tensor&); \
  template Gradients run_backward<P>(const Device&, const Arguments&, const Problem&,           \
                                     const Tensor&, int64_t);                                   \
  }
