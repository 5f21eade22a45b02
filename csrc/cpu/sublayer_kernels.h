// Parameters of the kernels of sublayers: LayerNorm, linear layers and what lies between, with the
// residual sum.
#pragma once

#include <cstdint>

#include "cpu/attention_operands.h"
#include "window_geometry.h"

namespace swin_kernels::cpu {

enum class Activation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// A tensor (B, *S, C) at its strides in elements; its channels lie side by side.
struct MapView {
  void* data = nullptr;
  int64_t batch = 0, axis[kAxes] = {0, 0, 0};
};

// The rows of a call, those of images that are not dropped.
struct MapRows {
  int64_t size[kAxes] = {1, 1, 1};
  int64_t live_images = 0;
  const int64_t* image = nullptr;  // (live_images)

  int64_t per_image() const { return size[0] * size[1] * size[2]; }
  int64_t count() const { return live_images * per_image(); }
};

// A weight (outputs, depth) as panels of outputs, `packed_weights.inc`.
struct PackedWeight {
  const void* data = nullptr;
  int64_t depth = 0, outputs = 0;
};

// Pointers to void hold Sum, in whole vectors with zeros behind; null where the call has none.
struct MlpOperands {
  MapRows rows;
  MapView x;
  int64_t channels = 0, hidden = 0;
  Activation activation = Activation::kGelu;
  bool norm_last = false;  // LayerNorm of the branch's end, as Swin V2 has it
  double norm_eps = 1e-5;
  const void* norm_weight = nullptr;     // (C); null: no LayerNorm
  const void* norm_bias = nullptr;       // (C)
  const void* fc1_bias = nullptr;        // (K)
  const void* fc2_bias = nullptr;        // (C)
  const void* layer_scale = nullptr;     // (C)
  const void* residual_scale = nullptr;  // (B)
  PackedWeight fc1, fc2;
};

// Rows cut into groups, and those into blocks of even size. What is summed over rows is summed over
// a group's first, which do not depend on the threads, as blocks may.
struct RowBlocks {
  int64_t rows = 0, group_rows = 1, blocks = 1;

  int64_t groups() const { return parts_of(rows, group_rows); }
  int64_t most_rows() const { return parts_of(groups(), blocks) * group_rows; }
  int64_t first_row(int64_t block) const {
    const int64_t row = groups() * block / blocks * group_rows;
    return row < rows ? row : rows;
  }
};

struct MlpForward {
  MlpOperands in;
  MapView out;
  RowBlocks cut;
};

// The backward goes over chunks of rows. Of each chunk blocks of rows first leave, in the dtype
// that products take, what the weights' gradients are products of; these are added up after.
struct MlpBackward {
  MlpOperands in;
  MapView grad_out, grad_x;
  PackedWeight fc1_transposed, fc2_transposed;  // for the gradients behind them
  int64_t first_row = 0;                        // of the chunk
  RowBlocks cut;                                // of its rows
  bool sums_layer_scale = false;
  // of the chunk, as factors: the first layer's input and the gradient of its output, the second's
  // gradient and its input; null where not wanted
  void *normed = nullptr, *grad_hidden = nullptr, *grad_branch = nullptr, *hidden = nullptr;
  // (groups of all chunks, kRowSums, C in whole vectors) of Sum
  void* row_sums = nullptr;
};

// Sums of a group's rows: what the gradients of the parameters with C numbers are sums of.
enum RowSum { kSumNormWeight, kSumNormBias, kSumLastBias, kSumLayerScale, kRowSums };

// x + g(LayerNorm, qkv, attention in windows, projection). `attention` has the sizes, masks and the
// bias; its tokens are rows of the kernels' own.
struct AttentionOperands {
  Operands attention;
  TokenView x;  // one head of C channels, which lie side by side
  int64_t channels = 0;
  int64_t live_images = 0;
  const int64_t* image = nullptr;  // (live_images)
  bool norm_last = false;
  double norm_eps = 1e-5;
  // as in MlpOperands
  const void *norm_weight = nullptr, *norm_bias = nullptr;
  const void* qkv_bias = nullptr;   // (3·C)
  const void* proj_bias = nullptr;  // (C)
  const void *layer_scale = nullptr, *residual_scale = nullptr;
  PackedWeight qkv, proj;
  int64_t block_windows = 1;  // worked on together

  int64_t windows() const { return live_images * attention.problem.windows(); }
};

// Tasks are blocks of windows.
struct AttentionForward {
  AttentionOperands in;
  TokenView out;
};

// Tasks are groups of windows, which attention's sums are taken over, within a chunk of groups.
// Those of rows are taken over some rows of a block, as long chains of roundings err more.
struct AttentionBackward {
  static constexpr int64_t kSumRows = 48;
  int64_t sums_of_block() const {
    return parts_of(in.block_windows * in.attention.problem.tokens(), kSumRows);
  }

  AttentionOperands in;
  TokenView grad_out, grad_x;
  PackedWeight qkv_transposed, proj_transposed;
  int64_t first_window = 0, windows = 0, group_windows = 1;  // of the chunk
  bool sums_layer_scale = false, wants_attended = false, holds_half = false;
  // of the chunk, as factors: inputs of both layers and gradients of their outputs; null where not
  // wanted
  void *normed = nullptr, *grad_qkv = nullptr, *attended = nullptr, *grad_branch = nullptr;
  void* row_sums =
      nullptr;  // (blocks of all chunks, sums_of_block(), kRowSums, C in whole vectors)
  void* partial_bias = nullptr;         // (groups, H, keys, queries rounded up to lanes) of Sum
  void* partial_logit_scale = nullptr;  // (groups, H) of double
};

// Which way a weight (rows, columns) lies in memory: (outputs, depth), or (depth, outputs).
struct WeightToPack {
  const void* data = nullptr;
  int64_t depth = 0, outputs = 0;
  bool transposed = false;
  void* packed = nullptr;
};

// A chunk's share in the gradient of a linear layer: gradᵀ·input over its rows, of what a chunk of
// rows left as factors.
struct WeightGradient {
  const void *grad = nullptr, *input = nullptr;  // no input: of the bias alone
  int64_t rows = 0, outputs = 0, inputs = 0;
  bool adds = false, last = true;  // not the first chunk; the last
  void* weight = nullptr;          // (outputs, inputs) in the weight's dtype, behind the last
  void* sums = nullptr;            // (outputs, inputs in whole vectors) of Sum
  double* bias = nullptr;          // (outputs in whole vectors), from zeros on
};

// The kernels of products in one dtype, that of the weights.
struct LinearKernels {
  int64_t (*packed_bytes)(int64_t depth, int64_t outputs);
  int64_t (*panels)(int64_t outputs);
  void (*pack)(const WeightToPack&, int64_t first_panel, int64_t last_panel);
  // the number that a packed weight holds for an output and a step of the depth
  double (*packed_at)(const PackedWeight&, int64_t output, int64_t k);
  // of a chunk's rows of so many columns
  int64_t (*factor_bytes)(int64_t rows, int64_t columns);
  int64_t (*gradient_tasks)(int64_t outputs, int64_t inputs);
  void (*weight_gradient)(const WeightGradient&, int64_t first_task, int64_t last_task);
  // of blocks of rows, by the dtype of x; null where that does not go with the weights'
  void (*mlp_forward[kElements])(const MlpForward&, int64_t begin, int64_t end);
  void (*mlp_backward[kElements])(const MlpBackward&, int64_t begin, int64_t end);
  void (*attention_forward[kElements])(const AttentionForward&, int64_t begin, int64_t end);
  void (*attention_backward[kElements])(const AttentionBackward&, int64_t begin, int64_t end);
};

}  // namespace swin_kernels::cpu
