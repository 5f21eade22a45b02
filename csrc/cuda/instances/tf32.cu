// The kernels of fp32 tokens that may be rounded to TF32, on the matrix units.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Tf32)
}  // namespace swin_kernels::cuda
