// From an op's arguments to launches of the kernels of one precision: what both directions share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cuda/device/params.cuh"
#include "cuda/host/device_launcher.h"
#include "cuda/host/run_length.h"
#include "cuda/host/tile_widths.h"

namespace swin_kernels::cuda {

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

template <class T>
bool by_16_bytes(const TokenView& view, int64_t channels) {
  const auto fits = [](int64_t n) { return n * int64_t(sizeof(T)) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.channel == 1 && fits(channels) &&
         fits(view.batch) && fits(view.head) && fits(view.axis[0]) && fits(view.axis[1]) &&
         fits(view.axis[2]);
}
template <class T>
bool by_16_bytes(const TokenViews& views, const Problem& p) {
  return by_16_bytes<T>(views.query, p.head_dim) && by_16_bytes<T>(views.key, p.head_dim) &&
         by_16_bytes<T>(views.value, p.value_dim);
}

template <class T>
Call call_of(const Arguments& a, const Problem& p) {
  Call call;
  call.problem = p;
  call.tokens = views_of(a);
  call.by_16_bytes = by_16_bytes<T>(call.tokens, p);
  if (a.bias.has_value()) {
    call.bias.kind = BiasKind::kDense;
    call.bias.numbers = float_view(a.bias);
  } else if (a.bias_table.has_value()) {
    call.bias.kind = a.bias_index.has_value() ? BiasKind::kIndexedTable : BiasKind::kTable;
    call.bias.numbers = float_view(a.bias_table);
    call.bias.rows = a.bias_table->size(0);
  }
  if (a.bias_index.has_value()) {
    call.bias.index = a.bias_index->const_data_ptr();
    call.bias.index_is_64_bits = a.bias_index->scalar_type() == torch::headeronly::ScalarType::Long;
    for (int i = 0; i < 2; ++i) call.bias.index_stride[i] = a.bias_index->stride(i);
  }
  call.mask = float_view(a.mask);
  call.pad_key = float_view(a.pad_key);
  call.pad_value = float_view(a.pad_value);
  call.logit_scale = float_view(a.logit_scale);
  if (a.dropout_p > 0) {
    call.dropout_seed = static_cast<const int64_t*>(a.dropout_seed->const_data_ptr());
    call.dropout_threshold = uint64_t(a.dropout_p * 4294967296.0);
    call.kept_factor = a.dropout_p < 1 ? 1 / (1 - a.dropout_p) : 0;
  }
  call.mask_value = a.mask_value;
  call.scale = a.scale;
  return call;
}

// A run of windows for each program of a kernel that has `programs` for every run. The same on one
// device always, as sums over runs are to be.
template <class A>
int64_t windows_per_program(const Problem& p, const Device& device, void (*kernel)(A),
                            int64_t programs, int threads, int64_t shared_bytes) {
  const int64_t at_once = device.programs_at_once(kernel, threads, shared_bytes);
  return run_length(p.batch * p.windows(), programs, at_once);
}

inline int64_t runs_of(const Problem& p, int64_t windows_per_program) {
  return parts_of(p.batch * p.windows(), windows_per_program);
}

inline int64_t tiles_of(const Problem& p) { return parts_of<int64_t>(p.tokens(), kTile); }

// A warp for every 16 rows of a tile.
inline int threads_for(int64_t rows) { return int(parts_of<int64_t>(rows, kRows) * kWarp); }

inline int64_t checked_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMostBlocks, "swin_kernels: ", blocks,
                  " programs are needed, a launch has up to ", kMostBlocks, ": split the batch");
  return blocks;
}

}  // namespace swin_kernels::cuda
