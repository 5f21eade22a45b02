// The kernels of fp64.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Fp64)
}  // namespace swin_kernels::cuda
