// Launches of kernels: on the current stream of a tensor's device, or in the tests' emulator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <tuple>

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

  // How many programs of a kernel the device works on at once; asked of the driver once.
  template <class A>
  int64_t programs_at_once(void (*kernel)(A), int threads, int64_t shared_bytes) const {
    using Key = std::tuple<const void*, int32_t, int, int64_t>;
    static thread_local std::map<Key, int64_t> known;
    const Key key(reinterpret_cast<const void*>(kernel), index_, threads, shared_bytes);
    if (const auto entry = known.find(key); entry != known.end()) return entry->second;
    return known[key] = asked_programs_at_once(kernel, threads, shared_bytes);
  }

  template <class A>
  void launch(void (*kernel)(A), const A& arguments, int64_t blocks, int threads,
              int64_t shared_bytes) const {
    if (blocks == 0) return;
    allow_shared_memory(kernel, shared_bytes);
    kernel<<<unsigned(blocks), threads, size_t(shared_bytes), stream_>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  template <class A>
  int64_t asked_programs_at_once(void (*kernel)(A), int threads, int64_t shared_bytes) const {
    allow_shared_memory(kernel, shared_bytes);
    int multiprocessors = 0, programs = 0;
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index_));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&programs, kernel, threads,
                                                                 size_t(shared_bytes)));
    return int64_t(multiprocessors) * (programs > 0 ? programs : 1);  // 0: the launch will say why
  }

  template <class A>
  static void allow_shared_memory(void (*kernel)(A), int64_t bytes) {
    if (bytes > 48 << 10)
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  }

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

  // Few, and no multiple of most numbers of heads: runs of several windows, the last a short one.
  template <class A>
  int64_t programs_at_once(void (*)(A), int, int64_t) const {
    return 5;
  }

  template <class A>
  void launch(void (*kernel)(A), const A& arguments, int64_t blocks, int threads,
              int64_t shared_bytes) const {
    emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments); });
  }
};

#endif

}  // namespace swin_kernels::cuda
