// A kernel of a few lines: shows that the toolchain, the carried program and the driver agree, before larger kernels are blamed.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/cuda.hpp"
#include "gpu/record.hpp"

namespace flashdelta {
namespace {

// state <- exp(g) state + k u^T for one head of K x V: one thread a value column.
__global__ void rank_one_update(float* state, const float* k, const float* u, float g, int K, int V) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= V) return;
  const float decay = expf(g);
  for (int row = 0; row < K; ++row) state[row * V + column] = fmaf(k[row], u[column], decay * state[row * V + column]);
}

class Buffer {
 public:
  explicit Buffer(const std::vector<float>& values) : size_(values.size() * sizeof(float)) {
    error_ = cudaMalloc(&data_, size_);
    if (error_ == cudaSuccess) error_ = cudaMemcpy(data_, values.data(), size_, cudaMemcpyHostToDevice);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  [[nodiscard]] float* data() const { return data_; }
  [[nodiscard]] cudaError_t error() const { return error_; }
  cudaError_t read(std::vector<float>& values) const { return cudaMemcpy(values.data(), data_, size_, cudaMemcpyDeviceToHost); }

 private:
  float* data_ = nullptr;
  std::size_t size_;
  cudaError_t error_;
};

TEST(Toolchain, SmallKernelMatchesDoublePrecision) {
  if (cuda::devices().empty()) GTEST_SKIP() << cuda::problem();
  constexpr int kKeys = 100, kValues = 300;
  constexpr float kGate = -0.25F;
  std::vector<float> state(kKeys * kValues), k(kKeys), u(kValues);
  for (int i = 0; i < kKeys * kValues; ++i) state[i] = std::sin(0.1F * static_cast<float>(i));
  for (int i = 0; i < kKeys; ++i) k[i] = std::cos(0.3F * static_cast<float>(i));
  for (int i = 0; i < kValues; ++i) u[i] = std::sin(0.7F * static_cast<float>(i) + 1.0F);

  const Buffer device_state(state), device_k(k), device_u(u);
  ASSERT_EQ(device_state.error(), cudaSuccess);
  ASSERT_EQ(device_k.error(), cudaSuccess);
  ASSERT_EQ(device_u.error(), cudaSuccess);
  rank_one_update<<<(kValues + 127) / 128, 128>>>(device_state.data(), device_k.data(), device_u.data(), kGate, kKeys, kValues);
  ASSERT_EQ(cudaGetLastError(), cudaSuccess);
  std::vector<float> result(state.size());
  ASSERT_EQ(device_state.read(result), cudaSuccess);

  double worst = 0;
  for (int row = 0; row < kKeys; ++row) {
    for (int column = 0; column < kValues; ++column) {
      const double expected = std::exp(double{kGate}) * state[row * kValues + column] + double{k[row]} * u[column];
      worst = std::fmax(worst, std::fabs(result[row * kValues + column] - expected));
    }
  }
  test::record_error("small_kernel", worst);
  // Values stay below 2, where one fp32 unit is 1.2e-7; exp, the product and the fused add may each lose one.
  EXPECT_LT(worst, 4e-7);
}

}  // namespace
}  // namespace flashdelta
