#include "cpu/cpu.hpp"

#include <fstream>
#include <numeric>
#include <vector>

#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

namespace flashdelta::cpu {

bool usable(flashdelta_instruction_set set) { return find_kernels(set) != nullptr; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  if (usable(FLASHDELTA_INSTRUCTION_SET_AVX512)) names.emplace_back("AVX512");
  if (usable(FLASHDELTA_INSTRUCTION_SET_AVX2)) names.emplace_back("AVX2");
#if defined(__aarch64__)
  names.emplace_back("NEON");
#else
  names.emplace_back("SSSE3");
#endif
  return names;
}

std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

double peak_gflops(flashdelta_instruction_set set, int threads) {
  constexpr double kMeasure = 0.2;  // seconds
  const Kernels* kernels = find_kernels(set);
  if (kernels == nullptr) return 0;
  op::Problem p;
  p.num_threads = threads;
  const int count = allowed_threads(p);
  // On every thread at once, as a call that fills them would.
  std::vector<double> macs(static_cast<std::size_t>(count));
  parallel_for(count, count, [&](std::int64_t i, int) { macs[static_cast<std::size_t>(i)] = kernels->peak_macs(kMeasure); });
  return 2e-9 * std::accumulate(macs.begin(), macs.end(), 0.0);
}

}  // namespace flashdelta::cpu
