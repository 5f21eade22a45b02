// Schemas of the native ops; their kernels register themselves beside their code.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(swin_kernels, m) {
  m.def("window_attention_forward(" SWIN_OPERANDS SWIN_OPTIONS ") -> Tensor");
  // gradients of query, key, value, bias, bias_table, pad_key, pad_value, logit_scale; empty where
  // not needed
  m.def("window_attention_backward(Tensor grad_out, " SWIN_OPERANDS SWIN_OPTIONS
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_capability() -> str");
}
