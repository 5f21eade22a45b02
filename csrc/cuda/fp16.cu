// The kernels of fp16 on the matrix units, summed in fp32.
#include "cuda/run_backward.h"
#include "cuda/run_forward.h"

namespace swin_kernels::cuda {
SWIN_COMPILE(Fp16)
}  // namespace swin_kernels::cuda
