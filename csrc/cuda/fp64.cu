// The kernels of fp64.
#include "cuda/run_backward.h"
#include "cuda/run_forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Fp64)
}  // namespace swin_kernels::cuda
