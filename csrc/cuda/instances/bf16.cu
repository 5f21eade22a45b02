// The kernels of bf16 on the matrix units, summed in fp32.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

SWIN_COMPILE(Bf16)
