// The kernels of fp32 tokens that may be rounded to TF32, on the matrix units.
#include "cuda/run_backward.h"
#include "cuda/run_forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Tf32)
}  // namespace swin_kernels::cuda
