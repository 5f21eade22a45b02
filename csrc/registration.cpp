// Schemas of the native ops; their kernels register themselves beside their code.
#include <torch/csrc/stable/library.h>

// The arguments of both ops: swin_kernels.problem.Operands, then Options. A packed qkv comes as
// `query` alone.
#define SWIN_OPERANDS                                                                    \
  "Tensor query, Tensor? key, Tensor? value, Tensor? bias, Tensor? bias_table, Tensor? " \
  "bias_index, "                                                                         \
  "Tensor? mask, Tensor? pad_key, Tensor? pad_value, Tensor? logit_scale, Tensor? dropout_seed, "
#define SWIN_OPTIONS                                                                             \
  "int[] window_size, int[] shift_size, bool[] periodic, bool roll_then_pad, float mask_value, " \
  "float scale, float dropout_p"

STABLE_TORCH_LIBRARY(swin_kernels, m) {
  m.def("window_attention_forward(" SWIN_OPERANDS SWIN_OPTIONS ") -> Tensor");
  // gradients of query, key, value, bias, bias_table, pad_key, pad_value, logit_scale; empty where
  // not needed
  m.def("window_attention_backward(Tensor grad_out, " SWIN_OPERANDS SWIN_OPTIONS
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_capability() -> str");
}
