// What the ops of both sublayers share on the host: parameters in whole vectors, packed weights,
// gradients of parameters.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/pack_operands.h"

namespace swin_kernels::cpu {

inline const LinearKernels& linear_kernels(Element compute) {
  return kernels(compute).linear[int(compute)];
}

// Whether the channels of a row are; of one channel any stride is as good.
inline bool side_by_side(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1;
}

// What the operands of a sublayer point into.
template <class T>
struct SublayerBuffers {
  std::vector<int64_t> live;  // images that are not dropped
  std::vector<std::vector<T>> vectors;
  std::vector<Tensor> tensors;

  // A vector in whole vectors of the processor, zeros behind.
  const T* padded(const MaybeTensor& t, int64_t lanes) {
    if (!t.has_value()) return nullptr;
    std::vector<T>& copy = vectors.emplace_back(size_t(parts_of(t->size(0), lanes) * lanes));
    as_dtype(t->scalar_type(), [&]<class From>(From) {
      const From* data = static_cast<const From*>(t->const_data_ptr());
      for (int64_t i = 0; i < t->size(0); ++i) copy[size_t(i)] = T(data[i * t->stride(0)]);
    });
    return copy.data();
  }

  // (B) factors of the images' branches, null for ones.
  const T* image_factors(const MaybeTensor& scales, int64_t images) {
    const T* factors = padded(scales, 1);
    for (int64_t image = 0; image < images; ++image)
      if (factors == nullptr || factors[image] != T(0)) live.push_back(image);
    return factors;
  }

  // A weight (outputs, depth) as its panels; `transposed` has it as one of (depth, outputs).
  PackedWeight packed(const MaybeTensor& given, const Tensor& weight, bool transposed,
                      const LinearKernels& run);
};

// A weight packed, in a tensor of its dtype.
Tensor pack(const LinearKernels& run, const Tensor& weight, bool transposed);

template <class T>
PackedWeight SublayerBuffers<T>::packed(const MaybeTensor& given, const Tensor& weight,
                                        bool transposed, const LinearKernels& run) {
  PackedWeight result = {nullptr, weight.size(transposed ? 0 : 1), weight.size(transposed ? 1 : 0)};
  if (given.has_value()) {
    STD_TORCH_CHECK(given->numel() * int64_t(given->element_size()) ==
                            run.packed_bytes(result.depth, result.outputs) &&
                        given->is_cpu() && given->dim() == 1 && given->stride(0) == 1,
                    "swin_kernels: a packed weight of another shape, dtype or processor");
    result.data = given->const_data_ptr();
  } else {
    result.data = tensors.emplace_back(pack(run, weight, transposed)).const_data_ptr();
  }
  return result;
}

inline MapView map_of(const Tensor& t, void* data) {
  MapView view = {data, t.stride(0), {}};
  for (int64_t i = 1; i + 1 < t.dim(); ++i) view.axis[kAxes - (t.dim() - 1) + i] = t.stride(i);
  return view;
}

inline MapView read_only_map(const Tensor& t) {
  return map_of(t, const_cast<void*>(t.const_data_ptr()));
}

// The images whose branch is dropped, as they came.
void copy_dropped(const Tensor& from, const Tensor& to, const std::vector<int64_t>& live);

// The gradient of a linear layer, summed over chunks of rows: sums lie in the weight's gradient
// itself where they can.
template <class T>
struct LayerGradient {
  Tensor weight;
  std::vector<double> bias;
  WeightGradient call;

  LayerGradient(const Tensor& of, bool wants_weight, bool wants_bias, int64_t chunks, int64_t lanes)
      : weight(torch::stable::empty(wants_weight ? shape_of(of) : std::vector<int64_t>{0},
                                    of.scalar_type())) {
    call.outputs = of.size(0);
    call.inputs = of.size(1);
    bias.resize(size_t(wants_bias ? parts_of(call.outputs, lanes) * lanes : 0));
    if (wants_bias) call.bias = bias.data();
    if (!wants_weight) return;
    call.weight = weight.mutable_data_ptr();
    const int64_t width = parts_of(call.inputs, lanes) * lanes;
    if (chunks == 0) std::memset(call.weight, 0, size_t(weight.numel()) * weight.element_size());
    if (chunks > 0 && width == call.inputs && sizeof(T) == weight.element_size()) {
      call.sums = std::exchange(call.weight, nullptr);
    } else if (chunks > 1) {
      sums_ = Numbers<T>(call.outputs * width);
      call.sums = sums_.data();
    }
  }

  // A chunk's rows: the gradients of the layer's outputs, and its inputs if the weight's gradient
  // is wanted.
  void add(const LinearKernels& run, const void* grad, const void* input, int64_t rows, bool first,
           bool last) {
    if (grad == nullptr || (call.bias == nullptr && input == nullptr)) return;
    call.grad = grad;
    call.input = input;
    call.rows = rows;
    call.adds = !first;
    call.last = last;
    torch::stable::parallel_for(
        0, run.gradient_tasks(call.outputs, call.inputs), 1,
        [&](int64_t begin, int64_t end) { run.weight_gradient(call, begin, end); });
  }

 private:
  Numbers<T> sums_;
};

// A vector like `like` of element(i), empty where it is not wanted.
template <class F>
Tensor vector_of(bool wanted, const MaybeTensor& like, torch::headeronly::ScalarType dtype,
                 const F& element) {
  if (!wanted || !like.has_value()) return torch::stable::empty({0}, dtype);
  Tensor t = torch::stable::empty(shape_of(*like), like->scalar_type());
  as_dtype(like->scalar_type(), [&]<class To>(To) {
    To* data = static_cast<To*>(t.mutable_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) data[i] = static_cast<To>(element(i));
  });
  return t;
}

// Gradients of the parameters with C numbers, from the sums of groups of rows.
template <class T>
struct RowSums {
  int64_t groups, width;
  Numbers<T> sums;

  RowSums(int64_t groups, int64_t width)
      : groups(groups), width(width), sums(groups * kRowSums * width) {}

  Tensor gradient(bool wanted, const MaybeTensor& like, RowSum sum,
                  torch::headeronly::ScalarType dtype) const {
    return vector_of(wanted, like, dtype, [&](int64_t i) {
      double total = 0;
      for (int64_t g = 0; g < groups; ++g) total += double(sums[(g * kRowSums + sum) * width + i]);
      return T(total);
    });
  }
};

}  // namespace swin_kernels::cpu
