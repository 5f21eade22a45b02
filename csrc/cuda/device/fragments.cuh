// Which lane of a warp holds which element of the operands and sums of a matrix product: the
// layouts of mma.m16n8k16 and mma.m16n8k8 (PTX ISA, "Matrix fragments"). Plain arithmetic, so that
// host tests multiply by it.
#pragma once

#include "cuda/device/ptx.cuh"
#include "window_geometry.h"

namespace swin_kernels::cuda {

constexpr int kWarp = 32;
constexpr int kRows = 16;    // of a warp's sums
constexpr int kColumns = 8;  // of one fragment of sums
constexpr int kTile = 64;    // tokens of a tile
constexpr int kKeyTiles = kTile / kColumns;

// Sums over lanes that differ in the bits from First up to below Last, in each of them.
template <int First, int Last, class Sum>
SWIN_DEVICE Sum sum_over_lanes(Sum x) {
#pragma unroll
  for (int lanes = First; lanes < Last; lanes *= 2) x += shuffle_xor(x, lanes);
  return x;
}

struct Lane {
  int group, member;  // of eight groups of four lanes

  SWIN_HOST_DEVICE explicit Lane(int lane) : group(lane / 4), member(lane % 4) {}

  // A lane's sums 0 to 3 are two neighbours in each of two rows.
  SWIN_HOST_DEVICE int row(int sum) const { return group + 8 * (sum / 2); }
  SWIN_HOST_DEVICE int column(int sum) const { return 2 * member + sum % 2; }

  // Where it reads operands of 4 bytes for m16n8k8: a[0..3] (row, k), b[0..1] (k, column).
  SWIN_HOST_DEVICE int left_row(int i) const { return group + 8 * (i % 2); }
  SWIN_HOST_DEVICE int left_depth(int i) const { return member + 4 * (i / 2); }
  SWIN_HOST_DEVICE int right_depth(int i) const { return member + 4 * i; }
  SWIN_HOST_DEVICE int right_column() const { return group; }
};

// For `load_matrices`: the row and first column that a lane names of a 16×16 block, so that the
// four registers are those of an operand of m16n8k16.
struct BlockPlace {
  int row, column;
};
// The left operand, stored (rows, depth); transposed, the right one stored (depth, columns), whose
// registers 0, 1 and 2, 3 are those of columns 0 to 7 and 8 to 15.
SWIN_HOST_DEVICE inline BlockPlace rows_first(int lane) { return {lane % 16, lane / 16 * 8}; }
// The right operand stored (columns, depth); transposed, the left one stored (depth, rows).
SWIN_HOST_DEVICE inline BlockPlace columns_first(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}

}  // namespace swin_kernels::cuda
