// The kernels of fp16 on the matrix units, summed in fp32.
#include "cuda/host/backward.h"
#include "cuda/host/forward.h"

SWIN_COMPILE(Fp16)
