// Which of the variants of the kernels this processor runs.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

namespace swin_kernels::cpu {
namespace {

const Kernels& choose_kernels() {
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");  // torch's own override
  const bool below_512 =
      wish != nullptr && (!std::strcmp(wish, "avx2") || !std::strcmp(wish, "default"));
  const bool below_256 = wish != nullptr && !std::strcmp(wish, "default");
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!below_512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  // every AVX2 processor converts fp16 too; not every compiler can ask for it
  if (!below_256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

}  // namespace

const Kernels& kernels(Element element) {
  static const Kernels& chosen = choose_kernels();
#if defined(__x86_64__)
  static const bool multiplies_bfloat16 =
      &chosen == &kAvx512 && __builtin_cpu_supports("avx512bf16");
  if (element == Element::kBFloat16 && multiplies_bfloat16) return kAvx512Bfloat16;
#endif
  return chosen;
}

}  // namespace swin_kernels::cpu
