// What the tests of src/cuda/device share: vectors that go to the GPU and back, and 16-bit operands as the host rounds them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/device/fragment.cuh"
#include "gpu/device_memory.hpp"
#include "op/float16.hpp"
#include "support/random.hpp"

namespace flashdelta::testing {

using cuda::device::Operand;

// Numbers in device memory; those that no one writes are all ones.
template <class T>
class Numbers {
 public:
  explicit Numbers(std::size_t size) : buffer_(size * sizeof(T), kNaNByte) {}
  explicit Numbers(const std::vector<T>& values) : Numbers(values.size()) { buffer_.upload(values.data()); }
  [[nodiscard]] T* device() const { return reinterpret_cast<T*>(buffer_.data()); }
  // After what was launched has run.
  [[nodiscard]] std::vector<T> host() const {
    check_cuda(cudaGetLastError(), "launching a kernel");
    check_cuda(cudaDeviceSynchronize(), "running a kernel");
    const std::vector<std::byte> bytes = buffer_.download();
    std::vector<T> values(bytes.size() / sizeof(T));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

 private:
  DeviceBuffer buffer_;
};

inline std::uint16_t round_to(Operand type, float x) { return type == Operand::bf16 ? op::bf16_from_float(x) : op::f16_from_float(x); }
inline float widen(Operand type, std::uint16_t x) { return type == Operand::bf16 ? op::float_from_bf16(x) : op::float_from_f16(x); }

inline std::vector<std::uint16_t> round_to(Operand type, const std::vector<float>& values) {
  std::vector<std::uint16_t> rounded;
  for (const float x : values) rounded.push_back(round_to(type, x));
  return rounded;
}

// -8 .. 8: products of up to 128 of them are exact in float32, in any order.
inline std::vector<float> small_integers(std::size_t size, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(size);
  for (float& x : values) x = static_cast<float>(std::floor(random.uniform() * 17) - 8);
  return values;
}

inline constexpr int kTileBytes = 64 * 128;
// Byte of an element of a tile of 64 columns whose rows are 128 bytes: 16-byte units change places by the row.
inline constexpr int in_tile(int row, int column) { return row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2; }
// The same for a panel of 16 columns, rows of 32 bytes.
inline constexpr int in_panel(int row, int column) { return row * 32 + ((column / 8) ^ (row / 4 % 2)) * 16 + column % 8 * 2; }

inline void put(std::vector<std::uint8_t>& bytes, int at, std::uint16_t x) { std::memcpy(bytes.data() + at, &x, 2); }
inline std::uint16_t get(const std::vector<std::uint8_t>& bytes, int at) {
  std::uint16_t x = 0;
  std::memcpy(&x, bytes.data() + at, 2);
  return x;
}

}  // namespace flashdelta::testing
