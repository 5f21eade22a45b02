// The kernels of bf16 on the matrix units, summed in fp32.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Bf16)
}  // namespace swin_kernels::cuda
