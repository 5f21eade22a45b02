// The kernels for any processor: 16-byte vectors that every 64-bit target has.
#define SWIN_ISA generic
#define SWIN_VECTOR_BYTES 16
#include "cpu/isa/std.h"
// the body comes after the headers it uses, so that no shared inline function is compiled for one
// processor only
#include "cpu/isa/kernels.inc"

namespace swin_kernels::cpu {
constexpr Kernels kGeneric = generic::kernels("default");
}
