// The kernels of fp32, exact.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

SWIN_COMPILE(Fp32)
