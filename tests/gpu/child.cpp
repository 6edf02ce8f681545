#include "gpu/child.hpp"

#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <stdexcept>

#include "gpu/device_call.hpp"

namespace flashdelta::testing {
namespace {

constexpr std::string_view kOption = "--child=";
constexpr std::string_view kNames[] = {"first_call", "checked_offsets"};

std::string this_program() {
  std::array<char, 4096> path{};
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size());
  if (length <= 0) throw std::runtime_error("this program does not find its own path");
  return {path.data(), static_cast<std::size_t>(length)};
}

// From before the call to the end of its work. The context exists by then: the caller's tensors stand in it.
int measure_first_call() {
  const Call call = cuda_call({.name = "FirstCall", .T = 200, .H = 2, .HV = 4, .dtype = DType::bf16});
  DeviceCall device(call);
  if (const std::string error = device.prepare(); !error.empty()) {
    std::printf("%s\n", error.c_str());
    return 1;
  }
  const auto start = std::chrono::steady_clock::now();
  const std::string error = device.launch();
  const cudaError_t finished = cudaStreamSynchronize(nullptr);
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  if (device.status() != FLASHDELTA_OK || finished != cudaSuccess) {
    std::printf("%s %s\n", error.c_str(), cudaGetErrorString(finished));
    return 1;
  }
  std::printf("%.3f\n", elapsed.count());
  return 0;
}

int call_with_offsets() {
  const Call call = cuda_call({.name = "Offsets", .T = 100, .HV = 2, .cu_seqlens = {0, 30, 100}, .dtype = DType::bf16});
  const std::pair<const char*, std::vector<std::int64_t>> lines[] = {
      {"good", {0, 30, 100}}, {"decreasing", {0, 70, 30}}, {"negative", {-1, 30, 100}}, {"beyond", {0, 30, 101}}};
  for (const auto& [name, offsets] : lines) {
    Call other = call;
    other.set_cu_seqlens(offsets);
    DeviceCall device(other);
    const std::string error = device.launch();
    std::printf("%s: %d %s\n", name, static_cast<int>(device.status()), error.c_str());
  }
  // A call that is being captured cannot be checked; it must not fail for that.
  const Stream stream;
  DeviceCall device(call);
  if (const std::string error = device.launch(stream.get()); !error.empty()) std::printf("%s\n", error.c_str());
  stream.synchronize();
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  const std::string error = device.launch(stream.get());
  check_cuda(cudaStreamEndCapture(stream.get(), &graph), "cudaStreamEndCapture");
  cudaGraphDestroy(graph);
  std::printf("captured: %d %s\n", static_cast<int>(device.status()), error.c_str());
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}

}  // namespace

std::string run_child(Child work, const std::string& environment) {
  const std::string command =
      environment + " '" + this_program() + "' " + std::string(kOption) + std::string(kNames[static_cast<std::size_t>(work)]) + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("popen failed: " + command);
  std::string output;
  std::array<char, 256> part{};
  while (std::fgets(part.data(), static_cast<int>(part.size()), pipe) != nullptr) output += part.data();
  const int status = pclose(pipe);
  if (status != 0) throw std::runtime_error("status " + std::to_string(status) + " of " + command + ": " + output);
  return output;
}

std::optional<Child> child_of(std::string_view argument) {
  for (std::size_t i = 0; i < std::size(kNames); ++i) {
    if (argument == std::string(kOption) + std::string(kNames[i])) return static_cast<Child>(i);
  }
  return std::nullopt;
}

int work_as_child(Child work) {
  try {
    return work == Child::first_call ? measure_first_call() : call_with_offsets();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}

}  // namespace flashdelta::testing
