// What the forward leaves for a backward is what the CPU backend leaves: backward may not depend on where the forward ran.
#include <gtest/gtest.h>

#include <cmath>

#include "gpu/device_call.hpp"
#include "gpu/record.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

constexpr DType kDTypes[] = {DType::bf16, DType::f16};
// T leaves products of 16-bit operands, accumulated in fp32.
constexpr double kInverseTolerance = 4e-3;
// Sums of at most 64 fp32 numbers of one sign.
constexpr double kGateSumTolerance = 1e-5;

// Gate sums of one sign: |c| is itself the sum of |g|. From exp(-104) on fp32 knows no difference between forgetting and -inf.
void expect_gate_sums(const HostTensor& found, const HostTensor& expected, const std::string& context) {
  ASSERT_EQ(found.shape(), expected.shape());
  double worst = 0;
  for (std::int64_t i = 0; i < found.size(); ++i) {
    const double c = found[i], c64 = expected[i];
    if (std::isinf(c64)) {
      ASSERT_LT(c, -104) << "saved_c at " << i << ' ' << context;
      continue;
    }
    ASSERT_LE(std::fabs(c - c64), kGateSumTolerance * std::fabs(c64) + 1e-30) << "saved_c at " << i << ' ' << context;
    if (c64 != 0) worst = std::fmax(worst, std::fabs(c - c64) / std::fabs(c64));
  }
  test::record_error("saved_c", worst);
}

// What a forward on the CPU saves, and the oracle's results.
struct Expected {
  explicit Expected(const Call& call) : oracle(oracle_forward(call)) {
    Call on_cpu = call;
    on_cpu.options.backend = FLASHDELTA_BACKEND_CPU;
    on_cpu.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
    on_cpu.options.num_segments = 0;
    saved = chunk_forward(on_cpu);
  }
  Tensors oracle, saved;
};

void expect_saved(const Call& call, const Expected& all, const std::string& context) {
  const Tensors found = cuda_forward(call);
  ASSERT_FALSE(found.empty());
  expect_contract_recorded(call, found, all.oracle, context);
  const Tensors& expected = all.saved;
  if (found.contains("saved_c")) expect_gate_sums(found.at("saved_c"), expected.at("saved_c"), context);

  const DType dtype = call.made_from.dtype;
  if (found.contains("saved_T")) {
    const double error = relative_error(found.at("saved_T"), expected.at("saved_T"), 1e-30);
    test::record_error("saved_T_" + short_name(dtype), error);
    EXPECT_LE(error, kInverseTolerance) << "saved_T of " << call.made_from << ' ' << context;
  }
  if (found.contains("saved_states")) {
    const HostTensor& states = found.at("saved_states");
    const double narrowing = states.dtype() == DType::bf16 ? rounding(DType::bf16) : 0;
    const double error = relative_error(states, expected.at("saved_states"), 1e-30);
    if (narrowing == 0) test::record_error("saved_states_" + short_name(dtype), error);
    EXPECT_LE(error, contract(dtype).final_state + narrowing) << "saved_states of " << call.made_from << ' ' << context;
  }
}

void expect_saved(const Call& call, const std::string& context) { expect_saved(call, Expected(call), context); }

class CudaSaved : public GpuTest, public ::testing::WithParamInterface<DType> {};
INSTANTIATE_TEST_SUITE_P(, CudaSaved, ::testing::ValuesIn(kDTypes), [](const auto& param_info) { return short_name(param_info.param); });

TEST_P(CudaSaved, IsWhatTheCpuSaves) {
  for (const int every : {0, 1, 3}) {
    for (const bool packed : {false, true}) {
      Case c{.name = "Saved", .B = packed ? 1 : 2, .T = 500, .H = 2, .HV = 4, .dtype = GetParam()};
      if (packed) c.cu_seqlens = {3, 3, 70, 71, 199, 199, 460};
      Call call = cuda_call_saving(c);
      call.options.checkpoint_chunks = every;
      expect_saved(call, "every " + std::to_string(every) + (packed ? ", packed" : ""));
    }
  }
}

// Segments end where no checkpoint does, and checkpoints lie within warm-ups and right at the cuts.
TEST_P(CudaSaved, IsTheSameHoweverACallIsCut) {
  for (const Gate gate : {Gate::zero, Gate::mixed}) {
    for (const int every : {1, 3}) {
      Case c{.name = "SavedInSegments", .T = 700, .H = 1, .HV = 4, .dtype = GetParam(), .gate = gate};
      if (every == 1) c.cu_seqlens = {3, 3, 70, 71, 99, 99, 690};
      Call call = cuda_call_saving(c);
      call.options.checkpoint_chunks = every;
      const Expected expected(call);
      for (const int mode : {FLASHDELTA_CONTEXT_PARALLEL_AUTO, FLASHDELTA_CONTEXT_PARALLEL_EXACT}) {
        for (const int segments : {3, 64}) {
          call.options.context_parallel = mode;
          call.options.num_segments = segments;
          expect_saved(call, expected,
                       "mode " + std::to_string(mode) + ", segments " + std::to_string(segments) + ", every " + std::to_string(every) +
                           ", gate " + std::to_string(static_cast<int>(gate)));
        }
      }
    }
  }
}

TEST_P(CudaSaved, StatesMayBeStoredAsBf16) {
  Call call = cuda_call_saving({.name = "Bf16States", .T = 300, .H = 1, .HV = 3, .dtype = GetParam()});
  call.saved_states_dtype = DType::bf16;
  expect_saved(call, "states as bf16");
}

TEST_P(CudaSaved, HoldsForEveryKindOfGate) {
  for (const Gate gate : {Gate::absent, Gate::zero, Gate::strong, Gate::infinite, Gate::mixed, Gate::bursts, Gate::in_kernel}) {
    const Call call = cuda_call_saving({.name = "Gates", .T = 150, .H = 1, .HV = 4, .dtype = GetParam(), .gate = gate});
    expect_saved(call, "gate " + std::to_string(static_cast<int>(gate)));
  }
}

TEST_P(CudaSaved, HoldsForEveryKindOfKeyAndBeta) {
  for (const Keys keys : {Keys::unit, Keys::zero, Keys::repeated, Keys::close, Keys::raw}) {
    for (const Beta beta : {Beta::absent, Beta::random, Beta::zero, Beta::two, Beta::sigmoid_twice}) {
      const bool l2norm = keys == Keys::raw;
      const Call call =
          cuda_call_saving({.name = "Keys", .T = 150, .H = 1, .HV = 2, .dtype = GetParam(), .beta = beta, .keys = keys, .l2norm = l2norm});
      expect_saved(call, "keys " + std::to_string(static_cast<int>(keys)) + ", beta " + std::to_string(static_cast<int>(beta)));
    }
  }
}

TEST_P(CudaSaved, StatesAreKeyFirstWhateverTheOthersAre) {
  Call call = cuda_call_saving({.name = "VFirst", .T = 200, .HV = 2, .dtype = GetParam(), .state_v_first = true});
  expect_saved(call, "state_v_first");
}

// Any of them may be left out, and the others and the results are what they were, to the bit.
TEST_P(CudaSaved, EachMayBeAbsentAndChangesNothingElse) {
  const std::vector<std::string> names = {"saved_c", "saved_T", "saved_states"};
  Call call = cuda_call_saving({.name = "Absent", .T = 200, .H = 2, .HV = 4, .cu_seqlens = {0, 30, 30, 160, 200}, .dtype = GetParam()});
  const Tensors all = cuda_forward(call);
  ASSERT_FALSE(all.empty());
  for (unsigned mask = 0; mask < 7; ++mask) {
    call.unwanted.clear();
    Tensors expected = all;
    for (std::size_t i = 0; i < names.size(); ++i) {
      if ((mask >> i & 1) != 0) continue;
      call.unwanted.insert(names[i]);
      expected.erase(names[i]);
    }
    expect_same_bits(cuda_forward(call), expected, "mask " + std::to_string(mask));
  }
}

}  // namespace
}  // namespace flashdelta::testing
