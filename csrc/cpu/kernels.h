// Parameters of the fused CPU kernels, and the table of their variants: one per instruction set.
#pragma once

#include <cstdint>

#include "cpu/attention_operands.h"
#include "cpu/sublayer_kernels.h"
#include "window_geometry.h"

namespace swin_kernels::cpu {

struct Forward {
  Operands in;
  TokenView out;
};

// The backward runs over chunks of windows, and in each over a few heads. Each (chunk, head) sums
// what has no place of its own in the map, from zeros on, and a second pass adds the chunks up in
// order: the same bits for any number of threads.
struct Backward {
  Operands in;
  TokenView grad_out;
  TokenViews grad;
  int64_t windows_per_chunk = 1, heads_per_task = 1;
  bool holds_half = false;       // gradients of tokens that fp16 is to hold, though they are wider
  void* partial_bias = nullptr;  // (chunks, H, keys, queries rounded up to lanes)
  // in double, as one row sums over every token of padding, all alike where there is no bias
  void* partial_pad_key = nullptr;      // (chunks, H, D)
  void* partial_pad_value = nullptr;    // (chunks, H, Dv)
  void* partial_logit_scale = nullptr;  // (chunks, H): over every token

  int64_t head_groups() const { return parts_of(in.problem.heads, heads_per_task); }

  struct Share {
    int64_t first_window, last_window, first_head, last_head, chunk;
  };
  Share share(int64_t task) const {
    const int64_t chunk = task / head_groups(), group = task % head_groups();
    const int64_t windows = in.problem.batch * in.problem.windows();
    const int64_t window = chunk * windows_per_chunk, head = group * heads_per_task;
    const int64_t last_window = window + windows_per_chunk, last_head = head + heads_per_task;
    return {window, last_window < windows ? last_window : windows, head,
            last_head < in.problem.heads ? last_head : in.problem.heads, chunk};
  }
};

// One instruction set's kernels. A forward task is (image, window, head), a backward task (chunk,
// group of heads), in this order, the last fastest.
struct Kernels {
  const char* name;
  int vector_bytes;
  void (*forward[kElements])(const Forward&, int64_t begin, int64_t end);
  void (*backward[kElements])(const Backward&, int64_t begin, int64_t end);
  LinearKernels linear[kElements];
};

// Those of tokens of one dtype for this processor.
const Kernels& kernels(Element element);

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bfloat16;  // of bfloat16 alone
#endif

}  // namespace swin_kernels::cpu
