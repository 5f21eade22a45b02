// What the ops of both sublayers share, and the ops on packed weights.
#include "cpu/sublayers.h"

#include <torch/csrc/stable/library.h>

#include <type_traits>

namespace swin_kernels::cpu {

Tensor pack(const LinearKernels& run, const Tensor& weight, bool transposed) {
  const Tensor whole = torch::stable::contiguous(weight);
  WeightToPack w;
  w.data = whole.const_data_ptr();
  w.outputs = whole.size(transposed ? 1 : 0);
  w.depth = whole.size(transposed ? 0 : 1);
  w.transposed = transposed;
  Tensor to = torch::stable::empty(
      {run.packed_bytes(w.depth, w.outputs) / int64_t(whole.element_size())}, whole.scalar_type());
  w.packed = to.mutable_data_ptr();
  constexpr int64_t kNumbers = 1 << 16;  // little enough work for one thread
  const int64_t grain = std::max<int64_t>(1, kNumbers / w.depth / 64);
  torch::stable::parallel_for(0, run.panels(w.outputs), grain,
                              [&](int64_t begin, int64_t end) { run.pack(w, begin, end); });
  return to;
}

void copy_dropped(const Tensor& from, const Tensor& to, const std::vector<int64_t>& live) {
  size_t next = 0;
  for (int64_t image = 0; image < from.size(0); ++image) {
    if (next < live.size() && live[next] == image) {
      ++next;
      continue;
    }
    Tensor target = torch::stable::narrow(const_cast<Tensor&>(to), 0, image, 1);
    torch::stable::copy_(target, torch::stable::narrow(const_cast<Tensor&>(from), 0, image, 1));
  }
}

namespace {

Tensor pack_linear_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "swin_kernels: weight: expected (outputs, depth)");
  const Element element = element_of(weight);
  return pack(linear_kernels(element), weight, false);
}

// Whether a packed weight still holds what the weight does: of some numbers all over it, for those
// who write to a weight behind the back of its version.
bool packed_weight_matches(Tensor weight, Tensor packed) {
  STD_TORCH_CHECK(weight.dim() == 2, "swin_kernels: weight: expected (outputs, depth)");
  const Element element = element_of(packed);
  const LinearKernels& run = linear_kernels(element);
  const PackedWeight of = {packed.const_data_ptr(), weight.size(1), weight.size(0)};
  if (packed.numel() * int64_t(packed.element_size()) != run.packed_bytes(of.depth, of.outputs))
    return false;
  constexpr int64_t kSamples = 64;
  const int64_t size = of.outputs * of.depth;
  bool same = true;
  as_dtype(weight.scalar_type(), [&]<class From>(From) {
    as_dtype(packed.scalar_type(), [&]<class To>(To) {
      const From* data = static_cast<const From*>(weight.const_data_ptr());
      for (int64_t s = 0; s < kSamples && same; ++s) {
        // one in each part of the weight, somewhere within it
        const int64_t first = size * s / kSamples, next = size * (s + 1) / kSamples;
        if (first == next) continue;
        const int64_t place = first + s * 2654435761 % (next - first);
        const int64_t output = place / of.depth, k = place % of.depth;
        const double held = run.packed_at(of, output, k);
        const double is = double(To(float(data[output * weight.stride(0) + k * weight.stride(1)])));
        const double wide = double(data[output * weight.stride(0) + k * weight.stride(1)]);
        const double expected = std::is_same_v<To, double> ? wide : is;
        same = held == expected || (held != held && expected != expected);
      }
    });
  });
  return same;
}

}  // namespace
}  // namespace swin_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(swin_kernels, CPU, m) {
  m.impl("packed_weight_matches", TORCH_BOX(&swin_kernels::cpu::packed_weight_matches));
  m.impl("pack_linear_weight", TORCH_BOX(&swin_kernels::cpu::pack_linear_weight));
}
