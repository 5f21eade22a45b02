// Defines the native ops; each device's kernels register themselves beside their code.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(swin_kernels, m) {
  m.def(SWIN_FORWARD_SCHEMA);
  m.def(SWIN_BACKWARD_SCHEMA);
  m.def("cpu_capability() -> str");
}
