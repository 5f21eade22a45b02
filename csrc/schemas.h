// The arguments of the native ops: swin_kernels.problem.Operands, then Options. A packed qkv comes
// as `query` alone.
#pragma once

#define SWIN_OPERANDS                                                                    \
  "Tensor query, Tensor? key, Tensor? value, Tensor? bias, Tensor? bias_table, Tensor? " \
  "bias_index, "                                                                         \
  "Tensor? mask, Tensor? pad_key, Tensor? pad_value, Tensor? logit_scale, Tensor? dropout_seed, "
#define SWIN_OPTIONS                                                                             \
  "int[] window_size, int[] shift_size, bool[] periodic, bool roll_then_pad, float mask_value, " \
  "float scale, float dropout_p"
