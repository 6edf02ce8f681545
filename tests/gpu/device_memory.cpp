#include "gpu/device_memory.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace flashdelta::testing {
namespace {

constexpr std::size_t kAlignment = 256;

}  // namespace

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

DeviceBuffer::DeviceBuffer(std::size_t size, std::optional<std::byte> content, std::byte guard, int device) : size_(size), guard_(guard) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  void* base = nullptr;
  check_cuda(cudaMalloc(&base, size + 2 * kGuardBytes), "cudaMalloc");
  base_ = static_cast<std::byte*>(base);
  for (std::byte* zone : {base_, base_ + kGuardBytes + size}) {
    check_cuda(cudaMemset(zone, std::to_integer<int>(guard), kGuardBytes), "cudaMemset");
  }
  if (content) fill(*content);
  check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  check_cuda(cudaSetDevice(current), "cudaSetDevice");
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), size_(std::exchange(other.size_, 0)), guard_(other.guard_) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(size_, other.size_);
  std::swap(guard_, other.guard_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() { cudaFree(base_); }

// Fills and uploads may run behind the caller's back, which streams that do not wait for the default one would not notice.
void DeviceBuffer::fill(std::byte content) {
  if (size_ > 0) check_cuda(cudaMemset(data(), std::to_integer<int>(content), size_), "cudaMemset");
  check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

void DeviceBuffer::upload(const void* from) {
  if (size_ > 0) check_cuda(cudaMemcpy(data(), from, size_, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

std::vector<std::byte> DeviceBuffer::download() const {
  std::vector<std::byte> bytes(size_);
  if (size_ > 0) check_cuda(cudaMemcpy(bytes.data(), data(), size_, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  return bytes;
}

bool DeviceBuffer::guards_intact() const {
  if (base_ == nullptr) return true;
  std::vector<std::byte> zone(kGuardBytes);
  for (const std::byte* from : {base_, base_ + kGuardBytes + size_}) {
    check_cuda(cudaMemcpy(zone.data(), from, kGuardBytes, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
    if (!std::all_of(zone.begin(), zone.end(), [&](std::byte b) { return b == guard_; })) return false;
  }
  return true;
}

DeviceTensor::DeviceTensor(HostTensor host, std::byte guard, int device) : host_(std::move(host)), device_(device) {
  const auto first = static_cast<std::size_t>(static_cast<std::byte*>(host_.dl()->data) - host_.buffer().data());
  lead_ = (kAlignment - first % kAlignment) % kAlignment;
  buffer_ = DeviceBuffer(lead_ + host_.buffer().size(), kGuardByte, guard, device);
  upload();
}

std::byte* DeviceTensor::host_bytes() const {
  auto* element0 = static_cast<std::byte*>(host_.dl()->data);
  return element0 - (element0 - host_.buffer().data());
}

void DeviceTensor::upload() {
  check_cuda(cudaMemcpy(buffer_.data() + lead_, host_bytes(), host_.buffer().size(), cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

DLTensor* DeviceTensor::dl() const {
  dl_ = *host_.dl();
  dl_.data = buffer_.data() + lead_ + (static_cast<std::byte*>(host_.dl()->data) - host_.buffer().data());
  dl_.device = {kDLCUDA, device_};
  return &dl_;
}

void DeviceTensor::write(const HostTensor& values) {
  host_.assign(values.values());
  upload();
}

const HostTensor& DeviceTensor::read() {
  check_cuda(cudaMemcpy(host_bytes(), buffer_.data() + lead_, host_.buffer().size(), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  return host_;
}

bool DeviceTensor::unchanged() const {
  const std::vector<std::byte> now = buffer_.download();
  return buffer_.guards_intact() &&
         std::equal(host_.buffer().begin(), host_.buffer().end(), now.begin() + static_cast<std::ptrdiff_t>(lead_));
}

DeviceOffsets::DeviceOffsets(const std::vector<std::int64_t>& values, bool is_int64, int device)
    : is_int64_(is_int64), device_(device), bytes_(values.size() * (is_int64 ? 8 : 4)), length_(static_cast<std::int64_t>(values.size())) {
  buffer_ = DeviceBuffer(bytes_.size(), kNaNByte, kNaNByte, device);
  write(values);
}

void DeviceOffsets::write(const std::vector<std::int64_t>& values) {
  const std::vector<std::int32_t> narrow(values.begin(), values.end());
  std::memcpy(bytes_.data(), is_int64_ ? static_cast<const void*>(values.data()) : narrow.data(), bytes_.size());
  buffer_.upload(bytes_.data());
}

DLTensor* DeviceOffsets::dl() const {
  if (bytes_.empty()) return nullptr;
  dl_ = {};
  dl_.data = buffer_.data();
  dl_.device = {kDLCUDA, device_};
  dl_.ndim = 1;
  dl_.dtype = {kDLInt, static_cast<std::uint8_t>(is_int64_ ? 64 : 32), 1};
  dl_.shape = &length_;
  return &dl_;
}

}  // namespace flashdelta::testing
