// The kernels of fp32 tokens that may be rounded to TF32, on the matrix units.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

SWIN_COMPILE(Tf32)
