// Checks of the emulator and of what the kernels are built from, by name: `checks NAME` prints what
// it found; tests/backends/cuda/test_cuda_emulator.py says what it should be.
#include <cstdio>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda/device/multi_tile_bwd.cuh"
#include "cuda/device/multi_tile_fwd.cuh"
#include "cuda/device/single_tile_bwd.cuh"
#include "cuda/device/single_tile_fwd.cuh"
#include "cuda/host/run_length.h"
#include "cuda/host/tile_widths.h"

namespace swin_kernels::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int64_t kBytes = 1 << 10;

// A launch's error, or that there was none.
std::string error_of(int64_t bytes, int threads, const std::function<void()>& kernel) {
  try {
    emulator::run(2, threads, bytes, kernel);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

// Of numbers that were read where NaN should be found or not.
std::string said(float x) { return std::isnan(x) ? "NaN" : std::to_string(x); }

alignas(16) float numbers[8] = {1, 2, 3, 4, 5, 6, 7, 8};

// What a thread finds of two groups of copies, before and after it waits for one and for all.
std::string copies() {
  std::string found;
  emulator::run(1, 32, kBytes, [&] {
    auto* memory = reinterpret_cast<float*>(shared_memory());
    if (thread_index() != 0) return;
    copy_async(memory, numbers);
    commit_copies();
    copy_async(memory + 4, numbers + 4);
    commit_copies();
    found = said(memory[0]) + " " + said(memory[4]);
    wait_for_copies<1>();
    found += ", " + said(memory[0]) + " " + said(memory[4]);
    wait_for_copies<0>();
    found += ", " + said(memory[0]) + " " + said(memory[4]);
  });
  return found;
}

// What thread 0 finds where thread 1 writes, in each of two blocks.
std::string neighbour(bool barrier) {
  std::string found;
  emulator::run(2, 32, kBytes, [&] {
    auto* memory = reinterpret_cast<float*>(shared_memory());
    memory[thread_index()] = float(thread_index());
    if (barrier) block_barrier();
    if (thread_index() == 0) found += (found.empty() ? "" : " ") + said(memory[1]);
  });
  return found;
}

// What each warp finds where both wrote, one after the other, in each of two blocks.
std::string overwritten(bool barrier) {
  std::string found[2];
  emulator::run(2, 2 * kWarp, kBytes, [&] {
    auto* memory = reinterpret_cast<float*>(shared_memory());
    const int warp = thread_index() / kWarp;
    if (thread_index() == 0) memory[0] = 1;
    block_barrier();
    warp_barrier();  // where warps are let loose
    const float x = memory[0];
    if (barrier) block_barrier();
    warp_barrier();
    if (warp == 0) memory[0] = 2;
    if (thread_index() % kWarp == 0) found[block_index()] += said(x) + " ";
  });
  return found[0] + found[1];
}

// The largest difference of a warp's products from plain loops over small whole numbers, which no
// sum rounds.
template <class P, Order L, Order R>
double product_difference(int tiles, bool weights) {
  using T = typename P::Element;
  constexpr int kMost = 6, kDepth = 48, kPitch = 56;
  std::mt19937 random(7);
  const auto integer = [&] { return float(int(random() % 9) - 4); };
  std::vector<float> left(16 * kDepth), right(kDepth * 8 * kMost);
  for (float& x : left) x = integer();
  for (float& x : right) x = integer();
  double largest = 0;
  emulator::run(1, kWarp, 2 * 64 * kPitch * int64_t(sizeof(T)), [&] {
    T* a = reinterpret_cast<T*>(shared_memory());
    T* b = a + 64 * kPitch;
    const int lane = thread_index();
    for (int i = lane; i < 16 * kDepth; i += kWarp) {
      const int row = i / kDepth, k = i % kDepth;
      a[L == Order::kDepthLast ? row * kPitch + k : k * kPitch + row] =
          rounded<T>(typename P::Sum(left[size_t(i)]));
    }
    for (int i = lane; i < kDepth * 8 * kMost; i += kWarp) {
      const int k = i / (8 * kMost), column = i % (8 * kMost);
      b[R == Order::kDepthLast ? column * kPitch + k : k * kPitch + column] =
          rounded<T>(typename P::Sum(right[size_t(i)]));
    }
    warp_barrier();
    const Lane own(lane);
    Sums<P, kMost> sums;
    clear(sums);
    if constexpr (P::kUnit == Unit::kHalf && R == Order::kDepthFirst) {
      if (weights) {
        float w[kDepth / 8][4];
        for (int n = 0; n < kDepth / 8; ++n)
          for (int e = 0; e < 4; ++e)
            w[n][e] = left[size_t(own.row(e) * kDepth + 8 * n + own.column(e))];
        multiply_weights<P, R>(sums, w, Operand<T>{b, kPitch}, kDepth / 8, tiles, lane);
      }
    }
    if (!weights)
      multiply<P, L, R, kDepth>(sums, Operand<T>{a, kPitch}, Operand<T>{b, kPitch}, kDepth, tiles,
                                lane);
    for_each_logit(sums, 0, kMost, lane, [&](typename P::Sum x, int row, int column) {
      double exact = 0;
      for (int k = 0; k < kDepth && column < 8 * tiles; ++k)
        exact += left[size_t(row * kDepth + k)] * right[size_t(k * 8 * kMost + column)];
      largest = std::fmax(largest, std::fabs(double(x) - exact));
    });
  });
  return largest;
}

template <class P>
std::string products() {
  double largest = 0;
  for (int tiles : {1, 5, 6}) {
    constexpr Order kLast = Order::kDepthLast, kFirst = Order::kDepthFirst;
    for (double x :
         {product_difference<P, kLast, kLast>(tiles, false),
          product_difference<P, kLast, kFirst>(tiles, false),
          product_difference<P, kFirst, kLast>(tiles, false),
          product_difference<P, kFirst, kFirst>(tiles, false),
          P::kUnit == Unit::kHalf ? product_difference<P, kLast, kFirst>(tiles, true) : 0})
      largest = std::fmax(largest, x);
  }
  return std::to_string(largest);
}

// Every token of every window against a map that is padded, rolled and cut by plain loops, and
// every pair of tokens against the regions that Swin's img_mask has; how many of them differ.
int64_t geometry_differences(const Problem& p) {
  int64_t wrong = 0;
  const Axis* axis = p.axis;
  // what the map, rolled, holds at each place: a token's number or −1; its region
  std::vector<std::vector<int64_t>> source(kAxes), region(kAxes);
  for (int a = 0; a < kAxes; ++a) {
    std::vector<int64_t> line;
    for (int64_t i = 0; i < axis[a].size; ++i) line.push_back(i);
    const auto pad = [&] { line.resize(size_t(axis[a].padded()), -1); };
    if (!p.roll_then_pad) pad();
    std::vector<int64_t> rolled;
    for (size_t i = 0; i < line.size(); ++i)
      rolled.push_back(line[(i + size_t(axis[a].shift)) % line.size()]);
    line = rolled;
    pad();
    source[size_t(a)] = line;
    std::vector<int64_t>& regions = region[size_t(a)];
    regions.assign(line.size(), 0);
    if (axis[a].shift > 0 && !axis[a].wraps)
      for (size_t i = 0; i < line.size(); ++i)
        regions[i] = i < line.size() - size_t(axis[a].window)  ? 0
                     : i < line.size() - size_t(axis[a].shift) ? 1
                                                               : 2;
  }
  WindowPlace walked(p, 0);
  for (int64_t w = 0; w < p.batch * p.windows(); ++w, walked.next(p)) {
    const WindowPlace at(p, w);
    wrong += at.image != w / p.windows() || at.number(p) != w % p.windows();
    wrong += at.image != walked.image || at.number(p) != walked.number(p);
    for (int i = 0; i < int(p.tokens()); ++i) {
      const TokenPlace token(p, i);
      int64_t found[kAxes], place[kAxes];
      bool real = true;
      for (int a = 0; a < kAxes; ++a) {
        place[a] = at.place[a] * axis[a].window + token.place[a];
        real = real && source[size_t(a)][size_t(place[a])] >= 0;
      }
      wrong += source_of(p, at, token, found) != real;
      for (int a = 0; a < kAxes && real; ++a)
        wrong += found[a] != source[size_t(a)][size_t(place[a])];
      for (int j = 0; j < int(p.tokens()); ++j) {
        const TokenPlace other(p, j);
        bool apart = false;
        int64_t row = 0;
        for (int a = 0; a < kAxes; ++a) {
          const int64_t there = at.place[a] * axis[a].window + other.place[a];
          apart = apart || region[size_t(a)][size_t(place[a])] != region[size_t(a)][size_t(there)];
          row =
              row * (2 * axis[a].window - 1) + token.place[a] - other.place[a] + axis[a].window - 1;
        }
        wrong += (((token.sides(p) ^ other.sides(p)) & at.seams(p)) != 0) != apart;
        wrong += token.table_number(p) - other.table_number(p) + table_middle(p) != row;
      }
    }
  }
  return wrong;
}

std::string geometry() {
  std::mt19937 random(3);
  const auto upto = [&](int64_t n) { return int64_t(random() % uint64_t(n)) + 1; };
  int64_t wrong = 0, cases = 0;
  for (; cases < 300; ++cases) {
    Problem p;
    p.batch = upto(2);
    p.roll_then_pad = random() % 2 != 0;
    for (int a = int(random() % kAxes); a < kAxes; ++a) {
      const int64_t window = upto(5), shift = upto(window) - 1, size = upto(3 * window);
      p.axis[a] = Axis::of(size, window, shift, random() % 4 == 0);
    }
    wrong += geometry_differences(p);
  }
  return std::to_string(wrong) + " of " + std::to_string(cases) + " problems differ";
}

// A line for each kernel: its precision, the channels of its tiles, its bytes.
template <class P>
std::string shared_bytes(const std::string& precision) {
  std::string lines;
  const auto say = [&](const std::string& kernel, int channels, int64_t bytes) {
    lines += kernel + " " + precision + " " + std::to_string(channels) + " " +
             std::to_string(bytes) + "\n";
  };
  constexpr int kTiled = kTiledChannels<P>;
  for (int64_t channels : {1, 64})
    choose_channels<P>(channels, [&](auto chosen) {
      constexpr int kWhole = decltype(chosen)::value;
      say("single_tile_forward", kWhole, sizeof(SingleTileForwardMemory<P, kWhole>));
      say("single_tile_backward", kWhole, sizeof(SingleTileBackwardMemory<P, kWhole>));
    });
  say("tiled_forward", kTiled, sizeof(TiledForwardMemory<P, kTiled>));
  for (const char* kernel :
       {"tiled_statistics", "tiled_grad_query", "tiled_grad_key_value", "tiled_grad_bias"})
    say(kernel, kTiled, sizeof(TiledBackwardMemory<P, kTiled>));
  return lines;
}

// A line for each problem of standard input, (windows, programs of a run, programs at once): the
// length of its runs.
std::string run_lengths() {
  std::string lines;
  int64_t windows, programs, at_once;
  while (std::cin >> windows >> programs >> at_once)
    lines += std::to_string(run_length(windows, programs, at_once)) + "\n";
  return lines;
}

// One thread does something else than the others.
std::function<void()> apart(void (*one)(), void (*others)()) {
  return [=] { thread_index() == 3 ? one() : others(); };
}

// Kernels whose launch is or is not an error.
const std::map<std::string, std::function<void()>> kKernels = {
    {"a thread that leaves", apart([] {}, block_barrier)},
    {"a lane that leaves", apart([] {}, warp_barrier)},
    {"lanes apart", apart(warp_barrier, [] { shuffle_xor(1.0f, 1); })},
    {"a lane at the block's barrier", apart(block_barrier, warp_barrier)},
    {"a copy off its address", [] { copy_async(shared_memory() + 4, numbers); }},
    {"a matrix off its address",
     [] {
       uint32_t r[4];
       load_matrices(r, shared_memory() + 8);
     }},
    {"nothing wrong",
     [] {
       warp_barrier();
       block_barrier();
       shuffle_xor(1.0, 16);
     }},
};

const std::map<std::string, std::function<std::string()>> kChecks = {
    {"too much shared memory", [] { return error_of((99 << 10) + 1, kThreads, [] {}); }},
    {"half a warp", [] { return error_of(kBytes, 48, [] {}); }},
    {"copies", copies},
    {"with a barrier", [] { return neighbour(true); }},
    {"without a barrier", [] { return neighbour(false); }},
    {"overwritten after a barrier", [] { return overwritten(true); }},
    {"overwritten without", [] { return overwritten(false); }},
    {"products fp16", products<Fp16>},
    {"products bf16", products<Bf16>},
    {"products tf32", products<Tf32>},
    {"products fp32", products<Fp32>},
    {"products fp64", products<Fp64>},
    {"geometry", geometry},
    {"run lengths", run_lengths},
    {"shared memory",
     [] {
       return shared_bytes<Fp16>("fp16") + shared_bytes<Bf16>("bf16") + shared_bytes<Tf32>("tf32") +
              shared_bytes<Fp32>("fp32") + shared_bytes<Fp64>("fp64");
     }},
};

}  // namespace
}  // namespace swin_kernels::cuda

int main(int count, char** arguments) {
  using namespace swin_kernels::cuda;
  const std::string name = count == 2 ? arguments[1] : "";
  if (kKernels.contains(name)) {
    std::puts(error_of(kBytes, kThreads, kKernels.at(name)).c_str());
  } else if (kChecks.contains(name)) {
    std::puts(kChecks.at(name)().c_str());
  } else {
    std::fprintf(stderr, "expected one of the names in %s\n", __FILE__);
    return 2;
  }
  return 0;
}
