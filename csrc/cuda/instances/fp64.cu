// The kernels of fp64.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

SWIN_COMPILE(Fp64)
