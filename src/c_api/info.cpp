#include "c_api/info.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sched.h>

#include <algorithm>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/cpu.hpp"
#include "cuda/cuda.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta {
namespace {

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string array_of(const std::vector<std::string>& items) { return fmt::format("[{}]", fmt::join(items, ", ")); }

std::vector<std::string> quoted(std::vector<std::string> items) {
  std::transform(items.begin(), items.end(), items.begin(), [](const std::string& item) { return quoted(std::string_view(item)); });
  return items;
}

// What num_threads = 0 stands for: the processors this process may run on.
int usable_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

std::string device_json(const cuda::Device& d) {
  return fmt::format(R"({{"name": {}, "compute_capability": "{}.{}", "multiprocessors": {}, "memory": {}}})",
                     quoted(std::string_view(d.name)), d.major, d.minor, d.multiprocessors, d.memory);
}

// One look at the devices answers for all: each look wakes the driver.
struct Cuda {
  std::vector<cuda::Device> devices = cuda::devices();
  std::string problem = devices.empty() ? cuda::problem() : "";
};

std::string cuda_json(const Cuda& found) {
  std::vector<std::string> devices(found.devices.size());
  std::transform(found.devices.begin(), found.devices.end(), devices.begin(), device_json);
  return fmt::format(R"({{"built": {}, "devices": {}, "problem": {}}})", cuda::built(), array_of(devices),
                     quoted(std::string_view(found.problem)));
}

std::string cpu_json() {
  return fmt::format(R"({{"processor": {}, "instruction_sets": {}, "threads": {}}})", quoted(std::string_view(cpu::processor())),
                     array_of(quoted(cpu::instruction_sets())), usable_threads());
}

}  // namespace

std::string info_json() {
  const Cuda found;
  std::vector<std::string> backends{"cpu", "reference"};
  if (!found.devices.empty()) backends.emplace_back("cuda");
  return fmt::format(R"({{"version": {}, "backends": {}, "cpu": {}, "cuda": {}}})", quoted(std::string_view(flashdelta_version())),
                     array_of(quoted(std::move(backends))), cpu_json(), cuda_json(found));
}

}  // namespace flashdelta
