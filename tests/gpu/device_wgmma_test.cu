// The products of a warpgroup in src/cuda/device/wgmma.cuh, on tiles swizzled by hand, against sums on the host. All numbers are small
// integers, so that every product is exact.
#include <gtest/gtest.h>

#include "cuda/device/copy.cuh"
#include "cuda/device/wgmma.cuh"
#include "gpu/device_call.hpp"
#include "gpu/device_words.hpp"

namespace flashdelta::testing {
namespace {

namespace device = cuda::device;

constexpr int kThreads = 128;

class CudaWgmma : public GpuTest {};

// Where register i of thread t of an accumulator of 64 rows lies.
__host__ __device__ int row_of(int i, int t) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
__host__ __device__ int column_of(int i, int t) { return i / 4 * 8 + 2 * (t % 4) + i % 2; }

// k step `step` of a row-major [64][64] matrix, as an A operand in registers.
__device__ void load_a(std::uint32_t* f, const std::uint16_t* a, int step) {
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i) {
    const int at = row_of(2 * (i % 2), t) * 64 + step * 16 + 2 * (t % 4) + i / 2 * 8;
    f[i] = a[at] | static_cast<std::uint32_t>(a[at + 1]) << 16;
  }
}

template <int N>
__device__ void load_c(float (&d)[N], const float* c) {
  for (int i = 0; i < N; ++i) d[i] = c[row_of(i, threadIdx.x) * (2 * N) + column_of(i, threadIdx.x)];
}
template <int N>
__device__ void store_d(const float (&d)[N], float* to) {
  for (int i = 0; i < N; ++i) to[row_of(i, threadIdx.x) * (2 * N) + column_of(i, threadIdx.x)] = d[i];
}

__device__ void fill_shared(unsigned char* to, const unsigned char* from, int bytes) {
  for (int i = threadIdx.x; i < bytes; i += kThreads) to[i] = from[i];
  device::fence_shared_to_async();
  __syncthreads();
}

template <int N>
__device__ void finish_products(float (&d)[N]) {
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(d);
}

// fresh = a b^T, added = c + a b^T; b a tile by rows.
template <Operand Type>
__global__ void multiply_rows(const std::uint16_t* a, const unsigned char* b, const float* c, float* fresh, float* added) {
  __shared__ alignas(1024) unsigned char tile[kTileBytes];
  fill_shared(tile, b, kTileBytes);
  const std::uint64_t rows = device::describe_rows_128(tile);
  std::uint32_t f[16];
  for (int step = 0; step < 4; ++step) load_a(f + 4 * step, a, step);
  float d[32], sum[32];
  load_c(sum, c);
  device::hold(sum);
  device::wgmma_fence();
  device::wgmma_rs_n64<Type, true>(d, f, rows);
#pragma unroll
  for (int step = 1; step < 4; ++step) device::wgmma_rs_n64<Type, false>(d, f + 4 * step, device::advance(rows, step * 32));
  finish_products(d);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) device::wgmma_rs_n64<Type, false>(sum, f + 4 * step, device::advance(rows, step * 32));
  finish_products(sum);
  store_d(d, fresh), store_d(sum, added);
}

// The same with both tiles in shared memory.
template <Operand Type>
__global__ void multiply_shared(const unsigned char* a, const unsigned char* b, const float* c, float* fresh, float* added) {
  __shared__ alignas(1024) unsigned char left[kTileBytes], right[kTileBytes];
  fill_shared(left, a, kTileBytes);
  fill_shared(right, b, kTileBytes);
  const std::uint64_t x = device::describe_rows_128(left), y = device::describe_rows_128(right);
  float d[32], sum[32];
  load_c(sum, c);
  device::hold(sum);
  device::wgmma_fence();
  device::wgmma_ss_n64<Type, true>(d, x, y);
#pragma unroll
  for (int step = 1; step < 4; ++step) device::wgmma_ss_n64<Type, false>(d, device::advance(x, step * 32), device::advance(y, step * 32));
  finish_products(d);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) device::wgmma_ss_n64<Type, false>(sum, device::advance(x, step * 32), device::advance(y, step * 32));
  finish_products(sum);
  store_d(d, fresh), store_d(sum, added);
}

// The same with b as four panels of 64 rows, in products of 32 rows; and with a tile by rows, 32 of them.
template <Operand Type>
__global__ void multiply_panels(const std::uint16_t* a, const unsigned char* b, const unsigned char* b_tile, const float* c, float* fresh,
                                float* added) {
  constexpr int kPanelBytes = 64 * 32, kHalf = 32 * 32;
  __shared__ alignas(1024) unsigned char panels[4 * kPanelBytes], tile[kTileBytes];
  fill_shared(panels, b, 4 * kPanelBytes);
  fill_shared(tile, b_tile, kTileBytes);
  const std::uint64_t panel = device::describe_panel(panels), rows = device::describe_rows_128(tile);
  std::uint32_t f[16];
  for (int step = 0; step < 4; ++step) load_a(f + 4 * step, a, step);
  float d[32], sum[32];
  load_c(sum, c);
  device::hold(sum);
  device::wgmma_fence();
  device::wgmma_rs_n32<Type, true>(d, f, panel);
  device::wgmma_rs_n32<Type, true>(d + 16, f, device::advance(panel, kHalf));
#pragma unroll
  for (int step = 1; step < 4; ++step) {
    device::wgmma_rs_n32<Type, false>(d, f + 4 * step, device::advance(panel, step * kPanelBytes));
    device::wgmma_rs_n32<Type, false>(d + 16, f + 4 * step, device::advance(panel, step * kPanelBytes + kHalf));
  }
  finish_products(d);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    device::wgmma_rs_n32<Type, false>(sum, f + 4 * step, device::advance(rows, step * 32));
    device::wgmma_rs_n32<Type, false>(sum + 16, f + 4 * step, device::advance(rows, step * 32 + 32 * 128));
  }
  finish_products(sum);
  store_d(d, fresh), store_d(sum, added);
}

// added = c + a b, b [64][128] as two tiles of 64 columns, described by columns.
template <Operand Type>
__global__ void multiply_columns(const std::uint16_t* a, const unsigned char* b, const float* c, float* added) {
  __shared__ alignas(1024) unsigned char tiles[2 * kTileBytes];
  fill_shared(tiles, b, 2 * kTileBytes);
  const std::uint64_t columns = device::describe_columns_128(tiles, kTileBytes);
  std::uint32_t f[16];
  for (int step = 0; step < 4; ++step) load_a(f + 4 * step, a, step);
  float sum[64];
  load_c(sum, c);
  device::hold(sum);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) device::wgmma_rs_n128_columns<Type>(sum, f + 4 * step, device::advance(columns, step * 2048));
  finish_products(sum);
  store_d(sum, added);
}

// Tiles and panels of row-major numbers [rows][columns].
std::vector<std::uint8_t> tiles_of(Operand type, const std::vector<float>& x, int rows, int columns) {
  std::vector<std::uint8_t> bytes(rows * columns * 2);
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      put(bytes, column / 64 * rows * 128 + in_tile(row, column % 64), round_to(type, x[row * columns + column]));
    }
  }
  return bytes;
}

std::vector<std::uint8_t> panels_of(Operand type, const std::vector<float>& x) {
  std::vector<std::uint8_t> bytes(64 * 64 * 2);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      put(bytes, column / 16 * 64 * 32 + in_panel(row, column % 16), round_to(type, x[row * 64 + column]));
    }
  }
  return bytes;
}

// c + a b^T of [64][64] matrices.
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b, std::vector<float> c) {
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      for (int k = 0; k < 64; ++k) c[row * 64 + column] += a[row * 64 + k] * b[column * 64 + k];
    }
  }
  return c;
}

const std::vector<float>& left() {
  static const std::vector<float> values = small_integers(64 * 64, 1);
  return values;
}
const std::vector<float>& right() {
  static const std::vector<float> values = small_integers(64 * 64, 2);
  return values;
}
const std::vector<float>& start() {
  static const std::vector<float> values = small_integers(64 * 128, 3);
  return values;
}
std::vector<float> square_start() { return {start().begin(), start().begin() + 64 * 64}; }
const std::vector<float> kZeros(64 * 64, 0.F);

template <Operand Type>
void expect_rows() {
  const Numbers<std::uint16_t> a(round_to(Type, left()));
  const Numbers<std::uint8_t> b(tiles_of(Type, right(), 64, 64));
  const Numbers<float> c(square_start()), fresh(64 * 64), added(64 * 64);
  multiply_rows<Type><<<1, kThreads>>>(a.device(), b.device(), c.device(), fresh.device(), added.device());
  EXPECT_EQ(fresh.host(), product(left(), right(), kZeros));
  EXPECT_EQ(added.host(), product(left(), right(), square_start()));
}

template <Operand Type>
void expect_shared() {
  const Numbers<std::uint8_t> a(tiles_of(Type, left(), 64, 64)), b(tiles_of(Type, right(), 64, 64));
  const Numbers<float> c(square_start()), fresh(64 * 64), added(64 * 64);
  multiply_shared<Type><<<1, kThreads>>>(a.device(), b.device(), c.device(), fresh.device(), added.device());
  EXPECT_EQ(fresh.host(), product(left(), right(), kZeros));
  EXPECT_EQ(added.host(), product(left(), right(), square_start()));
}

template <Operand Type>
void expect_panels() {
  const Numbers<std::uint16_t> a(round_to(Type, left()));
  const Numbers<std::uint8_t> panels(panels_of(Type, right())), tile(tiles_of(Type, right(), 64, 64));
  const Numbers<float> c(square_start()), fresh(64 * 64), added(64 * 64);
  multiply_panels<Type><<<1, kThreads>>>(a.device(), panels.device(), tile.device(), c.device(), fresh.device(), added.device());
  EXPECT_EQ(fresh.host(), product(left(), right(), kZeros)) << "panels";
  EXPECT_EQ(added.host(), product(left(), right(), square_start())) << "32 rows of a tile";
}

template <Operand Type>
void expect_columns() {
  const std::vector<float> values = small_integers(64 * 128, 4);
  const Numbers<std::uint16_t> a(round_to(Type, left()));
  const Numbers<std::uint8_t> b(tiles_of(Type, values, 64, 128));
  const Numbers<float> c(start()), added(64 * 128);
  multiply_columns<Type><<<1, kThreads>>>(a.device(), b.device(), c.device(), added.device());
  std::vector<float> expected = start();
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 128; ++column) {
      for (int k = 0; k < 64; ++k) expected[row * 128 + column] += left()[row * 64 + k] * values[k * 128 + column];
    }
  }
  EXPECT_EQ(added.host(), expected);
}

TEST_F(CudaWgmma, TileByRowsBf16) { expect_rows<Operand::bf16>(); }
TEST_F(CudaWgmma, TileByRowsFp16) { expect_rows<Operand::f16>(); }
TEST_F(CudaWgmma, BothTilesInSharedMemoryBf16) { expect_shared<Operand::bf16>(); }
TEST_F(CudaWgmma, BothTilesInSharedMemoryFp16) { expect_shared<Operand::f16>(); }
TEST_F(CudaWgmma, PanelsBf16) { expect_panels<Operand::bf16>(); }
TEST_F(CudaWgmma, PanelsFp16) { expect_panels<Operand::f16>(); }
TEST_F(CudaWgmma, TilesByColumnsBf16) { expect_columns<Operand::bf16>(); }
TEST_F(CudaWgmma, TilesByColumnsFp16) { expect_columns<Operand::f16>(); }

}  // namespace
}  // namespace flashdelta::testing
