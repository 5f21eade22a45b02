// The native ops. Their arguments are swin_kernels.problem.Operands, then Options (a packed qkv
// comes as `query` alone), then whether products of fp32 may be rounded to TF32: a CPU never does.
// A backward gives the gradients of query, key, value, bias, bias_table, pad_key, pad_value and
// logit_scale, empty where not needed; `needs` has the bits of arguments.h.
#pragma once

#define SWIN_ARGUMENT_SCHEMA                                                                    \
  "Tensor query, Tensor? key, Tensor? value, Tensor? bias, Tensor? bias_table, Tensor? "        \
  "bias_index, Tensor? mask, Tensor? pad_key, Tensor? pad_value, Tensor? logit_scale, Tensor? " \
  "dropout_seed, int[] window_size, int[] shift_size, bool[] periodic, bool roll_then_pad, "    \
  "float mask_value, float scale, float dropout_p, bool allow_tf32"
#define SWIN_FORWARD_SCHEMA "window_attention_forward(" SWIN_ARGUMENT_SCHEMA ") -> Tensor"
#define SWIN_BACKWARD_SCHEMA                                         \
  "window_attention_backward(Tensor grad_out, " SWIN_ARGUMENT_SCHEMA \
  ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
