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

// The MLP sublayer: swin_kernels.mlp_problem.MlpOperands, then MlpOptions. `activation` is an index
// into its ACTIVATIONS. The backward gives the gradients of x and of the parameters in their order,
// empty where `needs` has no bit for one.
#define SWIN_MLP_ARGUMENT_SCHEMA                                                               \
  "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "    \
  "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? residual_scale, Tensor? " \
  "fc1_packed, Tensor? fc2_packed, int activation, bool norm_last, float norm_eps"
#define SWIN_MLP_FORWARD_SCHEMA "mlp_sublayer_forward(" SWIN_MLP_ARGUMENT_SCHEMA ") -> Tensor"
#define SWIN_MLP_BACKWARD_SCHEMA                                     \
  "mlp_sublayer_backward(Tensor grad_out, " SWIN_MLP_ARGUMENT_SCHEMA \
  ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

// The attention sublayer: swin_kernels.attention_problem.AttentionOperands, then AttentionOptions.
// The backward gives the gradients of x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight,
// proj_bias, layer_scale, bias, bias_table and logit_scale, empty where `needs` has no bit for one.
#define SWIN_SUBLAYER_ARGUMENT_SCHEMA                                                              \
  "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor " \
  "proj_weight, Tensor? proj_bias, Tensor? layer_scale, Tensor? bias, Tensor? bias_table, "        \
  "Tensor? "                                                                                       \
  "logit_scale, Tensor? residual_scale, Tensor? bias_index, Tensor? mask, Tensor? dropout_seed, "  \
  "Tensor? qkv_packed, Tensor? proj_packed, int[] window_size, int[] shift_size, bool[] "          \
  "periodic, "                                                                                     \
  "bool roll_then_pad, float mask_value, float scale, float dropout_p, int num_heads, bool "       \
  "norm_last, float norm_eps"
#define SWIN_SUBLAYER_FORWARD_SCHEMA \
  "window_attention_sublayer_forward(" SWIN_SUBLAYER_ARGUMENT_SCHEMA ") -> Tensor"
#define SWIN_SUBLAYER_BACKWARD_SCHEMA                                                         \
  "window_attention_sublayer_backward(Tensor grad_out, " SWIN_SUBLAYER_ARGUMENT_SCHEMA        \
  ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, " \
  "Tensor, Tensor)"
