#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace swin_kernels::cuda {
namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  State state = State::kReady;
  bool entered = false;
  ucontext_t start;
  jmp_buf paused;
  std::vector<char> stack;
  const char* what = nullptr;  // the warp's operation it waits in
  void* arguments = nullptr;
  void (*compute)(const Warp&) = nullptr;
  std::vector<std::vector<Copy>> groups;  // of copies under way, the last not yet committed
};

struct Block {
  std::vector<Thread> threads;
  std::vector<char> shared;
  char* memory = nullptr;
  int64_t index = 0;
  int current = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
  jmp_buf scheduler;
};

// looked up with every step of a thread
[[gnu::tls_model("initial-exec")]] thread_local Block* block = nullptr;

Thread& self() { return block->threads[size_t(block->current)]; }

// Back to the scheduler; returns when the thread is ready again.
void pause(State state) {
  Thread& own = self();
  own.state = state;
  if (_setjmp(own.paused) == 0) _longjmp(block->scheduler, 1);
  if (!block->error.empty()) throw std::runtime_error(block->error);
}

void enter() {
  try {
    (*block->body)();
  } catch (const std::exception& error) {
    if (block->error.empty()) block->error = error.what();
  }
  self().state = State::kDone;
  _longjmp(block->scheduler, 1);
}

void resume(int index) {
  block->current = index;
  Thread& thread = self();
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.entered) _longjmp(thread.paused, 1);
  thread.entered = true;
  setcontext(&thread.start);
}

void finish_warp(int first) {
  Warp arguments;
  const Thread* lanes = &block->threads[size_t(first)];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane].state != State::kInWarp) return;
    const char *own = lanes[lane].what, *first_lane = lanes[0].what;
    if (own != first_lane && std::strcmp(own, first_lane) != 0) {
      block->error = std::string("lanes of a warp wait in ") + first_lane + " and in " + own;
      break;
    }
    arguments[lane] = lanes[lane].arguments;
  }
  if (block->error.empty()) lanes[0].compute(arguments);
  for (int lane = 0; lane < kWarp; ++lane)
    block->threads[size_t(first + lane)].state = State::kReady;
}

void run_block() {
  const int threads = int(block->threads.size());
  const bool reversed = block->index % 2 != 0;
  for (;;) {
    bool ran = false;
    // a warp goes as far as it can before the next begins, so that none waits for another unasked
    for (int w = 0; w < threads / kWarp; ++w) {
      const int first = (reversed ? threads / kWarp - 1 - w : w) * kWarp;
      for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (int i = 0; i < kWarp; ++i) {
          const int index = first + (reversed ? kWarp - 1 - i : i);
          if (block->threads[size_t(index)].state != State::kReady) continue;
          resume(index);
          ran = goes_on = true;
          finish_warp(first);
        }
      }
    }
    if (ran) continue;
    const auto is = [](State state) {
      return [state](const Thread& t) { return t.state == state; };
    };
    auto& all = block->threads;
    if (std::all_of(all.begin(), all.end(), is(State::kDone))) return;
    const bool together = std::all_of(all.begin(), all.end(), is(State::kAtBarrier));
    if (!together && block->error.empty())
      block->error = "threads of a block wait for each other at different places";
    for (Thread& t : all)
      if (t.state != State::kDone) t.state = State::kReady;
  }
}

// A number of a register that holds one float or two numbers of 2 bytes.
template <class T>
float number(uint32_t word, int which) {
  if constexpr (sizeof(T) == 2)
    return float(T(uint16_t(word >> (16 * which)), T::from_bits()));
  else
    return std::bit_cast<float>(word);
}

struct Product {
  float* c;
  uint32_t a[4], b[2];
};

// PTX ISA, "Matrix fragments for mma.m16n8k16" (two numbers a register) and "for mma.m16n8k8" with
// .tf32 (one): A is (16, kDepth), B (kDepth, 8).
template <class T>
void multiply_warp(const Warp& warp) {
  constexpr int kEach = 4 / sizeof(T), kDepth = 8 * kEach;
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* own = static_cast<const Product*>(warp[lane]);
    const int group = lane >> 2, member = lane & 3;
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < kEach; ++e)
        a[group + (i & 1) * 8][member * kEach + e + (i >> 1) * 4 * kEach] = number<T>(own->a[i], e);
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < kEach; ++e)
        b[member * kEach + e + i * 4 * kEach][group] = number<T>(own->b[i], e);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* own = static_cast<Product*>(warp[lane]);
    const int group = lane >> 2, member = lane & 3;
    for (int i = 0; i < 4; ++i) {
      double sum = own->c[i];
      for (int k = 0; k < kDepth; ++k)
        sum += double(a[group + (i >> 1) * 8][k]) * double(b[k][member * 2 + (i & 1)]);
      own->c[i] = float(sum);
    }
  }
}

struct Load {
  uint32_t* r;
  const char* row;
  bool transposed;
};

void load_warp(const Warp& warp) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* own = static_cast<const Load*>(warp[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        int row = lane / 4, column = lane % 4 * 2 + e;
        if (own->transposed) std::swap(row, column);
        const auto* from = static_cast<const Load*>(warp[8 * matrix + row]);
        std::memcpy(&pair[e], from->row + 2 * column, 2);
      }
      own->r[matrix] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
    }
  }
}

}  // namespace

void together(const char* what, void* arguments, void (*compute)(const Warp&)) {
  Thread& own = self();
  own.what = what;
  own.arguments = arguments;
  own.compute = compute;
  pause(State::kInWarp);
}

void wait_for_copies(int left) {
  auto& groups = self().groups;  // the last is not committed
  while (int(groups.size()) - 1 > left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

void load_matrices(const char* what, uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw std::runtime_error("a row of a matrix is not aligned to 16 bytes");
  Load own{r, static_cast<const char*>(row), transposed};
  together(what, &own, load_warp);
}

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
  if (threads <= 0 || threads % kWarp != 0 || threads > 1024)
    throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > 99 << 10)  // what every GPU from sm_80 on has
    throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory");
  static thread_local Block storage;  // its stacks are used again
  Block* const outer = block;
  block = &storage;
  storage.threads.resize(size_t(threads));
  storage.shared.resize(size_t(shared_bytes) + 128);
  storage.memory = reinterpret_cast<char*>(
      (reinterpret_cast<uintptr_t>(storage.shared.data()) + 127) / 128 * 128);
  storage.body = &thread;
  storage.error.clear();
  for (int64_t index = 0; index < blocks && storage.error.empty(); ++index) {
    storage.index = index;
    std::fill(storage.shared.begin(), storage.shared.end(), char(0xFF));
    for (Thread& t : storage.threads) {
      t.state = State::kReady;
      t.entered = false;
      t.groups.assign(1, {});
      t.stack.resize(kStack);
      getcontext(&t.start);
      t.start.uc_stack.ss_sp = t.stack.data();
      t.start.uc_stack.ss_size = t.stack.size();
      t.start.uc_link = nullptr;
      makecontext(&t.start, enter, 0);
    }
    run_block();
  }
  block = outer;
  if (!storage.error.empty()) throw std::runtime_error("emulated kernel: " + storage.error);
}

}  // namespace emulator

using namespace emulator;

int thread_index() { return block->current; }
int block_threads() { return int(block->threads.size()); }
int64_t block_index() { return block->index; }
char* shared_memory() { return block->memory; }
void block_barrier() { pause(State::kAtBarrier); }

void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    throw std::runtime_error("a copy of 16 bytes is not aligned to them");
  std::memset(to, 0xFF, 16);
  self().groups.back().push_back({to, from});
}

void commit_copies() { self().groups.emplace_back(); }

template <class T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product own{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  together("multiply_fragments", &own, multiply_warp<T>);
}
template void multiply_fragments<Half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_fragments<BFloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_fragments<float>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

}  // namespace swin_kernels::cuda
