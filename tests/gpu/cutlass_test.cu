// Shows that CUTLASS's headers compile with this nvcc and agree with the device.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cute/layout.hpp>
#include <cute/swizzle_layout.hpp>

#include "cuda/cuda.hpp"

namespace flashdelta {
namespace {

// The 128-byte swizzle of a 64 x 64 tile of 16-bit elements, the one that wgmma reads.
using Tile = decltype(cute::composition(cute::Swizzle<3, 3, 3>{},
                                        cute::Layout<cute::Shape<cute::_64, cute::_64>, cute::Stride<cute::_64, cute::_1>>{}));

__global__ void offsets_of_tile(int* offsets) { offsets[blockIdx.x * 64 + threadIdx.x] = Tile{}(blockIdx.x, threadIdx.x); }

// Within a row of 128 bytes, 16-byte units are permuted by the row's index modulo 8.
int expected_offset(int row, int column) { return row * 64 + (column ^ (row % 8 * 8)); }

TEST(Toolchain, SwizzledTileMatchesItsFormulaOnTheHost) {
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) ASSERT_EQ(Tile{}(row, column), expected_offset(row, column));
  }
}

TEST(Toolchain, SwizzledTileMatchesItsFormulaOnTheDevice) {
  if (cuda::devices().empty()) GTEST_SKIP() << cuda::problem();
  int* offsets = nullptr;
  ASSERT_EQ(cudaMallocManaged(&offsets, 64 * 64 * sizeof(int)), cudaSuccess);
  offsets_of_tile<<<64, 64>>>(offsets);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) ASSERT_EQ(offsets[row * 64 + column], expected_offset(row, column));
  }
  cudaFree(offsets);
}

}  // namespace
}  // namespace flashdelta
