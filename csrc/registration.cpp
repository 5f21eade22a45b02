// Defines the native ops; each device's kernels register themselves beside their code.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(swin_kernels, m) {
  m.def(SWIN_FORWARD_SCHEMA);
  m.def(SWIN_BACKWARD_SCHEMA);
  m.def(SWIN_MLP_FORWARD_SCHEMA);
  m.def(SWIN_MLP_BACKWARD_SCHEMA);
  m.def(SWIN_SUBLAYER_FORWARD_SCHEMA);
  m.def(SWIN_SUBLAYER_BACKWARD_SCHEMA);
  m.def("packed_weight_matches(Tensor weight, Tensor packed) -> bool");
  m.def("pack_linear_weight(Tensor weight) -> Tensor");
  m.def("cpu_capability() -> str");
}
