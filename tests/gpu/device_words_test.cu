// The words of one thread or one warp in src/cuda/device, each alone, against plain arithmetic on the host.
#include <gtest/gtest.h>

#include <limits>

#include "cuda/device/barrier.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/mma.cuh"
#include "gpu/device_call.hpp"
#include "gpu/device_words.hpp"

namespace flashdelta::testing {
namespace {

namespace device = cuda::device;

class CudaWords : public GpuTest {};

// Of every size; ties of both 16-bit types; what becomes infinite or subnormal in fp16 alone.
std::vector<float> numbers() {
  std::vector<float> values{0.F,     -0.F,    1.F,      -1.F,      1.F + 0x1p-8F, 1.F + 3 * 0x1p-8F, 1.F + 0x1p-11F, 1.F + 3 * 0x1p-11F,
                            65504.F, 65519.F, 65520.F,  -70000.F,  0x1p-14F,      0x1p-24F,          0x1p-25F,       3 * 0x1p-25F,
                            1e-30F,  -1e30F,  3.39e38F, 0x1p-126F, 1.F / 3,       -2.F / 3};
  values.push_back(std::numeric_limits<float>::infinity());
  values.push_back(-std::numeric_limits<float>::infinity());
  Random random(1);
  for (int i = 0; i < 1002; ++i) values.push_back(static_cast<float>(random.normal() * std::exp2(40 * random.uniform() - 30)));
  return values;
}

// A kernel of one block that gives thread i the i-th of several calls.
constexpr int kBlock = 128;

template <Operand Type>
__global__ void pack_all(const float* x, int pairs, std::uint32_t* packed, std::uint32_t* packed_here, float* unpacked) {
  for (int i = threadIdx.x; i < pairs; i += kBlock) {
    packed[i] = device::pack<Type>(x[2 * i], x[2 * i + 1]);
    packed_here[i] = device::pack_here<Type>(x[2 * i], x[2 * i + 1]);
    const float2 both = device::unpack<Type>(packed[i]);
    unpacked[2 * i] = both.x, unpacked[2 * i + 1] = both.y;
  }
}

template <Operand Type>
void expect_packing() {
  const std::vector<float> x = numbers();
  const int pairs = static_cast<int>(x.size() / 2);
  const Numbers<float> in(x), unpacked(x.size());
  const Numbers<std::uint32_t> packed(pairs), packed_here(pairs);
  pack_all<Type><<<1, kBlock>>>(in.device(), pairs, packed.device(), packed_here.device(), unpacked.device());
  const std::vector<std::uint32_t> bits = packed.host();
  const std::vector<float> back = unpacked.host();
  EXPECT_EQ(packed_here.host(), bits);
  for (int i = 0; i < pairs; ++i) {
    const std::uint16_t low = round_to(Type, x[2 * i]), high = round_to(Type, x[2 * i + 1]);
    EXPECT_EQ(bits[i], low | static_cast<std::uint32_t>(high) << 16) << x[2 * i] << ' ' << x[2 * i + 1];
    EXPECT_EQ(back[2 * i], widen(Type, low));
    EXPECT_EQ(back[2 * i + 1], widen(Type, high));
  }
}

TEST_F(CudaWords, PackAndUnpackBf16) { expect_packing<Operand::bf16>(); }
TEST_F(CudaWords, PackAndUnpackFp16) { expect_packing<Operand::f16>(); }

__global__ void pack_nan(std::uint32_t* packed) {
  packed[0] = device::pack<Operand::bf16>(__int_as_float(0x7f800001), 1.F);
  packed[1] = device::pack<Operand::f16>(1.F, __int_as_float(0x7f800001));
}

TEST_F(CudaWords, PackKeepsANaN) {
  const Numbers<std::uint32_t> packed(2);
  pack_nan<<<1, 1>>>(packed.device());
  const std::vector<std::uint32_t> bits = packed.host();
  EXPECT_TRUE(std::isnan(op::float_from_bf16(static_cast<std::uint16_t>(bits[0]))));
  EXPECT_EQ(op::float_from_bf16(static_cast<std::uint16_t>(bits[0] >> 16)), 1);
  EXPECT_EQ(op::float_from_f16(static_cast<std::uint16_t>(bits[1])), 1);
  EXPECT_TRUE(std::isnan(op::float_from_f16(static_cast<std::uint16_t>(bits[1] >> 16))));
}

__global__ void split_f16(const float* x, int pairs, std::uint32_t* packed, std::uint32_t* rest) {
  for (int i = threadIdx.x; i < pairs; i += kBlock) {
    packed[i] = device::pack_f16(x[2 * i], x[2 * i + 1]);
    rest[i] = device::pack_rest_f16(x[2 * i], x[2 * i + 1], packed[i]);
  }
}

TEST_F(CudaWords, APackAndItsRestHold22Bits) {
  std::vector<float> x;
  Random random(2);
  // Not smaller: the rest of a number below 1/4 is subnormal in fp16, and holds fewer bits.
  while (x.size() < 1000) x.push_back(static_cast<float>((random.uniform() < 0.5 ? -1 : 1) * std::exp2(17 * random.uniform() - 2)));
  const Numbers<float> in(x);
  const Numbers<std::uint32_t> packed(500), rest(500);
  split_f16<<<1, kBlock>>>(in.device(), 500, packed.device(), rest.device());
  const std::vector<std::uint32_t> held = packed.host(), lost = rest.host();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const int shift = i % 2 == 0 ? 0 : 16;
    const float high = op::float_from_f16(static_cast<std::uint16_t>(held[i / 2] >> shift));
    const auto low = static_cast<std::uint16_t>(lost[i / 2] >> shift);
    EXPECT_EQ(low, op::f16_from_float(x[i] - high)) << x[i];
    EXPECT_LE(std::fabs(static_cast<double>(x[i]) - high - op::float_from_f16(low)), std::fabs(x[i]) * 0x1p-22) << x[i];
  }
}

__global__ void multiply_all(const std::uint32_t* a, const std::uint32_t* b, int count, std::uint32_t* products) {
  for (int i = threadIdx.x; i < count; i += kBlock) products[i] = device::multiply_f16(a[i], b[i]);
}

TEST_F(CudaWords, MultiplyF16RoundsOnce) {
  std::vector<std::uint32_t> a, b;
  Random random(3);
  const auto draw = [&] { return op::f16_from_float(static_cast<float>(random.normal() * std::exp2(20 * random.uniform() - 14))); };
  for (int i = 0; i < 1000; ++i) {
    a.push_back(draw() | static_cast<std::uint32_t>(draw()) << 16);
    b.push_back(draw() | static_cast<std::uint32_t>(draw()) << 16);
  }
  const Numbers<std::uint32_t> first(a), second(b), products(a.size());
  multiply_all<<<1, kBlock>>>(first.device(), second.device(), 1000, products.device());
  const std::vector<std::uint32_t> found = products.host();
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (const int shift : {0, 16}) {
      // Exact in float32: 11 bits times 11 bits.
      const float x = op::float_from_f16(static_cast<std::uint16_t>(a[i] >> shift)),
                  y = op::float_from_f16(static_cast<std::uint16_t>(b[i] >> shift));
      EXPECT_EQ(static_cast<std::uint16_t>(found[i] >> shift), op::f16_from_float(x * y)) << x << " * " << y;
    }
  }
}

__global__ void exp2_all(const float* x, int count, float* found) {
  for (int i = threadIdx.x; i < count; i += kBlock) found[i] = device::exp2_fast(x[i]);
}

TEST_F(CudaWords, Exp2FastIsRightToTheLastBitsAndZeroFarBelow) {
  std::vector<float> x{0.F, -1.F, -126.F, 10.F, -126.5F, -127.F, -200.F, -1e30F, -std::numeric_limits<float>::infinity()};
  Random random(4);
  while (x.size() < 2000) x.push_back(static_cast<float>(250 * random.uniform() - 125));
  const Numbers<float> in(x), out(x.size());
  exp2_all<<<1, kBlock>>>(in.device(), static_cast<int>(x.size()), out.device());
  const std::vector<float> found = out.host();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double expected = x[i] < -126 ? 0 : std::exp2(static_cast<double>(x[i]));
    EXPECT_LE(std::fabs(found[i] - expected), 0x1p-21 * expected) << "2^" << x[i];
  }
}

// --- elements

__global__ void load_elements(const void* data, device::Type type, int count, float* found) {
  for (int i = threadIdx.x; i < count; i += kBlock) found[i] = device::load_element(data, type, i);
}
__global__ void store_elements(const float* x, void* data, device::Type type, int count) {
  for (int i = threadIdx.x; i < count; i += kBlock) device::store_element(data, type, i, x[i]);
}

TEST_F(CudaWords, ElementsOf16Bits) {
  const std::vector<float> x = numbers();
  const int count = static_cast<int>(x.size());
  for (const Operand type : {Operand::bf16, Operand::f16}) {
    const device::Type named = type == Operand::bf16 ? device::Type::bf16 : device::Type::f16;
    const Numbers<float> in(x), loaded(x.size());
    const Numbers<std::uint16_t> stored(x.size());
    store_elements<<<1, kBlock>>>(in.device(), stored.device(), named, count);
    load_elements<<<1, kBlock>>>(stored.device(), named, count, loaded.device());
    EXPECT_EQ(stored.host(), round_to(type, x));
    const std::vector<float> back = loaded.host();
    for (int i = 0; i < count; ++i) EXPECT_EQ(back[i], widen(type, round_to(type, x[i])));
  }
}

TEST_F(CudaWords, ElementsOfFloat32) {
  const std::vector<float> x = numbers();
  const int count = static_cast<int>(x.size());
  const Numbers<float> in(x), stored(x.size()), loaded(x.size());
  store_elements<<<1, kBlock>>>(in.device(), stored.device(), device::Type::f32, count);
  load_elements<<<1, kBlock>>>(stored.device(), device::Type::f32, count, loaded.device());
  EXPECT_EQ(stored.host(), x);
  EXPECT_EQ(loaded.host(), x);
}

// --- 8 x 8 matrices of a warp

struct Matrices {
  std::uint32_t loaded[4][32], transposed[4][32], moved[4][32];
  std::uint16_t stored[256], stored_if[256], stored_transposed[256];
};

__global__ void exchange_matrices(const std::uint16_t* from, Matrices* found) {
  __shared__ alignas(16) std::uint16_t in[256], out[256], out_if[256], out_transposed[256];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) in[i] = from[i];
  __syncwarp();
  // Row l % 8 of matrix l / 8: rows of 16 bytes one behind the other.
  std::uint32_t f[4], t[4];
  device::load_matrices(f, device::shared_address(in) + lane * 16);
  device::load_matrices_transposed(t, device::shared_address(in) + lane * 16);
  device::store_matrices(device::shared_address(out) + lane * 16, f[0], f[1], f[2], f[3]);
  device::store_matrices_if(device::shared_address(out_if) + lane * 16, f[0], f[1], f[2], f[3], true);
  device::store_matrices_if(device::shared_address(out_if) + lane * 16, f[3], f[2], f[1], f[0], false);
  device::store_matrices_transposed(device::shared_address(out_transposed) + lane * 16, f);
  for (int m = 0; m < 4; ++m) {
    found->loaded[m][lane] = f[m], found->transposed[m][lane] = t[m], found->moved[m][lane] = device::transpose_matrix(f[m]);
  }
  __syncwarp();
  for (int i = lane; i < 256; i += 32)
    found->stored[i] = out[i], found->stored_if[i] = out_if[i], found->stored_transposed[i] = out_transposed[i];
}

TEST_F(CudaWords, MatricesGoToRegistersAndBackAsTheyAreAndTransposed) {
  std::vector<std::uint16_t> x(256);
  for (int i = 0; i < 256; ++i) x[i] = static_cast<std::uint16_t>(257 * i + 3);
  const Numbers<std::uint16_t> in(x);
  const Numbers<Matrices> out(1);
  exchange_matrices<<<1, 32>>>(in.device(), out.device());
  const Matrices found = out.host()[0];
  for (int m = 0; m < 4; ++m) {
    const auto element = [&](int row, int column) -> std::uint32_t { return x[m * 64 + row * 8 + column]; };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const std::uint32_t own = element(row, column) | element(row, column + 1) << 16;
      const std::uint32_t mirrored = element(column, row) | element(column + 1, row) << 16;
      EXPECT_EQ(found.loaded[m][lane], own);
      EXPECT_EQ(found.transposed[m][lane], mirrored);
      EXPECT_EQ(found.moved[m][lane], mirrored);
    }
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        EXPECT_EQ(found.stored[m * 64 + row * 8 + column], element(row, column));
        EXPECT_EQ(found.stored_if[m * 64 + row * 8 + column], element(row, column));
        EXPECT_EQ(found.stored_transposed[m * 64 + row * 8 + column], element(column, row));
      }
    }
  }
}

__global__ void load_pairs(float* found) {
  __shared__ float in[64];
  in[2 * threadIdx.x] = threadIdx.x, in[2 * threadIdx.x + 1] = -0.5F * threadIdx.x;
  __syncwarp();
  const float2 pair = device::load_shared_pair(in + 2 * (31 - threadIdx.x));
  found[2 * threadIdx.x] = pair.x, found[2 * threadIdx.x + 1] = pair.y;
}

TEST_F(CudaWords, PairsAreReadFromSharedMemory) {
  const Numbers<float> out(64);
  load_pairs<<<1, 32>>>(out.device());
  const std::vector<float> found = out.host();
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(found[2 * i], 31.F - i);
    EXPECT_EQ(found[2 * i + 1], -0.5F * (31 - i));
  }
}

// --- products of one warp

__device__ std::uint32_t pair_at(const std::uint16_t* x, int first, int second) {
  return x[first] | static_cast<std::uint32_t>(x[second]) << 16;
}

// a [16][16], b [16][8], c [16][8], all row-major. Results of the fresh product, and of the product on top of c.
template <Operand Type>
__global__ void multiply_16x8x16(const std::uint16_t* a, const std::uint16_t* b, const float* c, float* fresh, float* added) {
  const int row = threadIdx.x / 4, pair = 2 * (threadIdx.x % 4), n = threadIdx.x / 4;
  std::uint32_t f[4];
  for (int i = 0; i < 4; ++i) {
    const int at = (row + i % 2 * 8) * 16 + pair + i / 2 * 8;
    f[i] = pair_at(a, at, at + 1);
  }
  const std::uint32_t b0 = pair_at(b, pair * 8 + n, (pair + 1) * 8 + n), b1 = pair_at(b, (pair + 8) * 8 + n, (pair + 9) * 8 + n);
  float d[4], sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(row + i / 2 * 8) * 8 + pair + i % 2];
  device::mma_16x8x16<Type, true>(d, f, b0, b1);
  device::mma_16x8x16<Type, false>(sum, f, b0, b1);
  for (int i = 0; i < 4; ++i) {
    const int at = (row + i / 2 * 8) * 8 + pair + i % 2;
    fresh[at] = d[i], added[at] = sum[i];
  }
}

// a [16][8], b [8][8], c [16][8].
__global__ void multiply_16x8x8(const std::uint16_t* a, const std::uint16_t* b, const float* c, float* fresh, float* added) {
  const int row = threadIdx.x / 4, pair = 2 * (threadIdx.x % 4), n = threadIdx.x / 4;
  const std::uint32_t a0 = pair_at(a, row * 8 + pair, row * 8 + pair + 1), a1 = pair_at(a, (row + 8) * 8 + pair, (row + 8) * 8 + pair + 1);
  const std::uint32_t b0 = pair_at(b, pair * 8 + n, (pair + 1) * 8 + n);
  float d[4], sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(row + i / 2 * 8) * 8 + pair + i % 2];
  device::mma_16x8x8<true>(d, a0, a1, b0);
  device::mma_16x8x8<false>(sum, a0, a1, b0);
  for (int i = 0; i < 4; ++i) {
    const int at = (row + i / 2 * 8) * 8 + pair + i % 2;
    fresh[at] = d[i], added[at] = sum[i];
  }
}

void expect_product(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c, int inner,
                    const std::vector<float>& fresh, const std::vector<float>& added) {
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < inner; ++k) sum += a[row * inner + k] * b[k * 8 + n];
      EXPECT_EQ(fresh[row * 8 + n], sum);
      EXPECT_EQ(added[row * 8 + n], sum + c[row * 8 + n]);
    }
  }
}

template <Operand Type>
void expect_mma() {
  const std::vector<float> a = small_integers(256, 5), b = small_integers(128, 6), c = small_integers(128, 7);
  const Numbers<std::uint16_t> left(round_to(Type, a)), right(round_to(Type, b));
  const Numbers<float> start(c), fresh(128), added(128);
  multiply_16x8x16<Type><<<1, 32>>>(left.device(), right.device(), start.device(), fresh.device(), added.device());
  expect_product(a, b, c, 16, fresh.host(), added.host());
}

TEST_F(CudaWords, Mma16x8x16Bf16) { expect_mma<Operand::bf16>(); }
TEST_F(CudaWords, Mma16x8x16Fp16) { expect_mma<Operand::f16>(); }

TEST_F(CudaWords, Mma16x8x8Fp16) {
  const std::vector<float> a = small_integers(128, 8), b = small_integers(64, 9), c = small_integers(128, 10);
  const Numbers<std::uint16_t> left(round_to(Operand::f16, a)), right(round_to(Operand::f16, b));
  const Numbers<float> start(c), fresh(128), added(128);
  multiply_16x8x8<<<1, 32>>>(left.device(), right.device(), start.device(), fresh.device(), added.device());
  expect_product(a, b, c, 8, fresh.host(), added.host());
}

}  // namespace
}  // namespace flashdelta::testing
