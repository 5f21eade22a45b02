// Launches of kernels: on the current stream of a tensor's device, or in the tests' emulator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cuda/device/ptx.cuh"

#if defined(__CUDACC__)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace swin_kernels::cuda {

using torch::stable::Tensor;

#if defined(__CUDACC__)

// Launches on a tensor's device for as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Whether a kernel can be launched there: the object has machine code or PTX for it.
  template <class A>
  static bool has_code(int32_t index, void (*kernel)(A)) {
    const torch::stable::accelerator::DeviceGuard guard(index);
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    if (!found) (void)cudaGetLastError();  // which the next launch would report as its own
    return found;
  }

  int multiprocessors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  template <class A>
  void launch(void (*kernel)(A), const A& arguments, int64_t blocks, int threads,
              int64_t shared_bytes) const {
    if (blocks == 0) return;
    if (shared_bytes > 48 << 10)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(shared_bytes)));
    kernel<<<unsigned(blocks), threads, size_t(shared_bytes), stream_>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#else

class Device {
 public:
  explicit Device(const Tensor&) {}

  template <class A>
  static bool has_code(int32_t, void (*)(A)) {
    return true;
  }

  int multiprocessors() const { return 1; }

  template <class A>
  void launch(void (*kernel)(A), const A& arguments, int64_t blocks, int threads,
              int64_t shared_bytes) const {
    emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments); });
  }
};

#endif

}  // namespace swin_kernels::cuda
