// The kernels of fp32, exact.
#include "cuda/run_backward.h"
#include "cuda/run_forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Fp32)
}  // namespace swin_kernels::cuda
