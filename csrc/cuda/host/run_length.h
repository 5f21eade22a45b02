// How many windows a program of a head takes. Plain arithmetic, so that host tests check it.
#pragma once

#include <algorithm>

#include "window_geometry.h"

namespace swin_kernels::cuda {

// What a program does once, in windows: it gathers a head's bias; a backward writes the bias's sum.
constexpr int64_t kFixedCost = 1;
// More rounds of the device waste less where few runs fit one round, and pay the fixed cost again.
constexpr int64_t kMostRounds = 8;

// `programs` of every run work at once with those of others, `at_once` of all on the device: the
// rounds of equal runs that end first, as a round takes its longest run and the fixed cost. Mostly
// that is one round, with the longest runs that leave no multiprocessor idle. Where windows are few
// a run is one of them. No run is empty: rounded up, runs become fewer.
inline int64_t run_length(int64_t windows, int64_t programs, int64_t at_once) {
  const int64_t fewest = parts_of(programs, at_once);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t rounds = fewest; rounds < fewest + kMostRounds; ++rounds) {
    const int64_t runs = std::min(windows, rounds * at_once / programs);
    const int64_t length = parts_of(windows, std::max<int64_t>(1, runs));
    if (rounds * (length + kFixedCost) >= least) continue;
    least = rounds * (length + kFixedCost);
    best = std::max<int64_t>(1, length);
  }
  return best;
}

}  // namespace swin_kernels::cuda
