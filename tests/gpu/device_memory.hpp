// Device memory that knows every byte around it, and the twins of host tensors there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "support/host_tensor.hpp"

namespace flashdelta::testing {

// Throws std::runtime_error with CUDA's name of the error; GoogleTest shows it as the test's failure.
void check_cuda(cudaError_t error, const char* what);

// A NaN in every dtype, and what the host tensors' guards hold.
inline constexpr std::byte kNaNByte{0xff};
inline constexpr std::byte kGuardByte{0xa5};

// Device memory, 256-byte aligned, between two guard zones.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  // Without a content: as the driver gives it, for tools that track what was written.
  DeviceBuffer(std::size_t size, std::optional<std::byte> content, std::byte guard = kNaNByte, int device = 0);
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  [[nodiscard]] std::byte* data() const { return size_ == 0 ? nullptr : base_ + kGuardBytes; }
  [[nodiscard]] std::size_t size() const { return size_; }
  void fill(std::byte content);
  void upload(const void* from);
  [[nodiscard]] std::vector<std::byte> download() const;
  [[nodiscard]] bool guards_intact() const;

 private:
  // More than the widest thing a kernel stores at once, a TMA box of 64 rows.
  static constexpr std::size_t kGuardBytes = 32768;

  std::byte* base_ = nullptr;
  std::size_t size_ = 0;
  std::byte guard_{};
};

// A host tensor's whole buffer on a device: strides, padding and guards included.
class DeviceTensor {
 public:
  DeviceTensor() = default;
  explicit DeviceTensor(HostTensor host, std::byte guard = kNaNByte, int device = 0);

  [[nodiscard]] DLTensor* dl() const;
  // What was uploaded last, or what read() found.
  [[nodiscard]] const HostTensor& host() const { return host_; }
  void write(const HostTensor& values);
  // Copies the device's bytes into host().
  const HostTensor& read();
  // Around the tensor, and between its elements as far as read() saw.
  [[nodiscard]] bool guards_intact() const { return buffer_.guards_intact() && host_.guards_intact(); }
  // Whether the device still holds what was uploaded, byte for byte, and nothing was written around it.
  [[nodiscard]] bool unchanged() const;

 private:
  [[nodiscard]] std::byte* host_bytes() const;
  void upload();

  HostTensor host_;
  DeviceBuffer buffer_;
  std::size_t lead_ = 0;  // bytes before the host buffer's copy, so that element 0 is aligned as allocations are
  int device_ = 0;
  mutable DLTensor dl_{};
};

// cu_seqlens and the like, of any values.
class DeviceOffsets {
 public:
  DeviceOffsets() = default;
  DeviceOffsets(const std::vector<std::int64_t>& values, bool is_int64, int device = 0);

  [[nodiscard]] DLTensor* dl() const;
  // As many values as before.
  void write(const std::vector<std::int64_t>& values);
  [[nodiscard]] bool unchanged() const { return buffer_.guards_intact() && buffer_.download() == bytes_; }

 private:
  bool is_int64_ = true;
  int device_ = 0;
  std::vector<std::byte> bytes_;
  DeviceBuffer buffer_;
  mutable std::int64_t length_ = 0;
  mutable DLTensor dl_{};
};

class Stream {
 public:
  Stream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  [[nodiscard]] cudaStream_t get() const { return stream_; }
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace flashdelta::testing
