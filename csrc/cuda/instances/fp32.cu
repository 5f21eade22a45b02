// The kernels of fp32, exact.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Fp32)
}  // namespace swin_kernels::cuda
