// Builds the kernels once per instruction set, and picks among the builds at run time.
#include "cpu/kernels.hpp"

#include <chrono>

#include "cpu/scratch.hpp"
#include "cpu/simd/targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file anew for each instruction set.
#include <hwy/highway.h>

#include "cpu/simd/forward-inl.h"
#include "cpu/simd/group-inl.h"
#include "cpu/simd/recurrent-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

double PeakMacs(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr std::int64_t kRounds = 1 << 16;
  const auto start = Clock::now();
  std::int64_t rounds = 0;
  volatile float sink = 0;
  double elapsed = 0;
  do {
    sink = SpinMacs(kRounds, sink);
    rounds += kRounds;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return static_cast<double>(rounds) * 12 * kLanes / elapsed;
}

extern const Kernels kKernels;
const Kernels kKernels = {Forward,    BackwardState,   Backward, Recurrent<OnePass>, Recurrent<SeparatePasses>, LoadState,
                          StoreState, ApplyTransition, PeakMacs};

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flashdelta::cpu {
namespace {

// What Highway's targets of these names may use; the compiler's run-time support also asks the operating system.
#if HWY_ARCH_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Kernels* find_kernels(flashdelta_instruction_set set) {
  [[maybe_unused]] const auto wanted = [set](flashdelta_instruction_set one) {
    return set == one || set == FLASHDELTA_INSTRUCTION_SET_BEST;
  };
#if HWY_TARGETS & HWY_AVX3
  if (wanted(FLASHDELTA_INSTRUCTION_SET_AVX512) && has_avx2() && has_avx512()) return &N_AVX3::kKernels;
#endif
#if HWY_TARGETS & HWY_AVX2
  if (wanted(FLASHDELTA_INSTRUCTION_SET_AVX2) && has_avx2()) return &N_AVX2::kKernels;
#endif
  if (set != FLASHDELTA_INSTRUCTION_SET_BEST && set != FLASHDELTA_INSTRUCTION_SET_BASELINE) return nullptr;
  return &HWY_STATIC_DISPATCH(kKernels);
}

std::int64_t forward_scratch(const op::Problem& p) { return ForwardScratch(p, nullptr).used; }
std::int64_t backward_scratch(const op::Problem& p) {
  const HeadGroups groups(p);
  const std::int64_t d_states = (groups.live ? groups.ratio : groups.size) * state_floats(p.K, p.V);
  return std::max(BackwardScratch(p, groups, nullptr).used + d_states, BackwardStateScratch(p, nullptr).used);
}
std::int64_t recurrent_scratch(const op::Problem& p) { return RecurrentScratch(p, nullptr).used; }

}  // namespace flashdelta::cpu
#endif
