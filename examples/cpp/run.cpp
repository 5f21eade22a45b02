// Runs a package of AOTInductor that holds our operation, without Python in the process.
//
//     run model.pt2 tensors.pt _C_cpu.abi3.so[:_C_cuda.abi3.so] [ROUNDS]
//
// The shared objects register the operation with torch's dispatcher when they are loaded, the first
// its schema too; the package finds it there by name. tensors.pt is a list of inputs (N, B, 3,
// height, width), the stock model's logits (N, B, classes) and those in float64. The largest and
// the mean error of ours may be twice that of stock's, and one ulp. Exit code 0 if they are not
// more.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/cuda.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<at::Tensor> tensors_of(const std::string& path) {
  const c10::IValue list = torch::jit::pickle_load(bytes_of(path));
  std::vector<at::Tensor> tensors;
  if (list.isList())
    for (const c10::IValue& x : list.toListRef())
      if (x.isTensor()) tensors.push_back(x.toTensor());
  if (tensors.size() != 3)
    throw std::runtime_error(path + ": expected a list of three tensors, as export.py saves it");
  return tensors;
}

bool python_is_here() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find("libpython") != std::string::npos ||
        line.find("libtorch_python") != std::string::npos)
      return true;
  return false;
}

// The largest and the mean magnitude.
std::array<double, 2> sizes_of(const at::Tensor& x) {
  return {x.abs().max().item<double>(), x.abs().mean().item<double>()};
}

// Milliseconds a call, of `rounds`, the tenth of them first thrown away.
double time_of(torch::inductor::AOTIModelPackageLoader& model, const at::Tensor& image,
               int rounds) {
  const auto wait = [&] {
    if (image.is_cuda()) torch::cuda::synchronize();
  };
  for (int i = 0; i < rounds / 10 + 1; ++i) model.run({image});
  wait();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < rounds; ++i) model.run({image});
  wait();
  const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - begin;
  return passed.count() / rounds;
}

int run(const std::string& package, const std::string& tensors, const std::string& libraries,
        int rounds) {
  std::istringstream objects(libraries);
  for (std::string object; std::getline(objects, object, ':');)
    if (dlopen(object.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
      throw std::runtime_error(dlerror());
  bytes_of(package);  // says so where it is missing
  const std::vector<at::Tensor> loaded = tensors_of(tensors);
  at::Tensor images = loaded[0];
  const at::Tensor stock = loaded[1].to(at::kDouble), exact = loaded[2];

  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(package);
  if (model.get_metadata()["AOTI_DEVICE_KEY"] == "cuda") images = images.cuda();
  std::vector<at::Tensor> outputs;
  for (const at::Tensor& image : images.unbind()) outputs.push_back(model.run({image}).at(0));
  const at::Tensor logits = at::stack(outputs).cpu().to(at::kDouble);

  const auto error = sizes_of(logits - exact), of_stock = sizes_of(stock - exact);
  const auto size = sizes_of(exact);
  bool holds = true;
  for (const int kind : {0, 1}) {
    const double ulp = std::numeric_limits<float>::epsilon() * size[kind];
    holds = holds && error[kind] <= 2 * of_stock[kind] + ulp;
  }
  std::printf(
      "%lld logits of %lld inputs, largest and mean error against float64: %.2e, %.2e; "
      "of the stock model %.2e, %.2e: %s\n",
      static_cast<long long>(logits.numel()), static_cast<long long>(images.size(0)), error[0],
      error[1], of_stock[0], of_stock[1], holds ? "the error rule holds" : "BEYOND the error rule");
  if (rounds > 0) std::printf("%.2f ms a call\n", time_of(model, images[0], rounds));
  std::printf("Python in this process: %s\n", python_is_here() ? "YES" : "no");
  return holds && !python_is_here() ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4 || count > 5) {
    std::fprintf(stderr, "usage: %s model.pt2 tensors.pt SHARED_OBJECT[:SHARED_OBJECT] [ROUNDS]\n",
                 arguments[0]);
    return 2;
  }
  try {
    const std::string rounds = count > 4 ? arguments[4] : "0";
    if (rounds.empty() || rounds.size() > 6 ||
        rounds.find_first_not_of("0123456789") != std::string::npos)
      throw std::runtime_error("ROUNDS: expected a whole number up to 999999, got " + rounds);
    return run(arguments[1], arguments[2], arguments[3], std::stoi(rounds));
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s: %s\n", arguments[0], error.what_without_backtrace());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", arguments[0], error.what());
    return 2;
  }
}
