// Each instruction set of the build alone, where this processor has it.
#include <gtest/gtest.h>

#include "cpu/cpu.hpp"
#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

class CpuInstructionSet : public ::testing::TestWithParam<flashdelta_instruction_set> {
 protected:
  void SetUp() override {
    if (!cpu::usable(GetParam())) GTEST_SKIP() << "not built, or not on this processor";
  }
  [[nodiscard]] static Call call_of(const Case& c) {
    Call call = make_call(c);
    call.options.instruction_set = GetParam();
    return call;
  }
};

TEST_P(CpuInstructionSet, ForwardAndBackwardHoldTheContract) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const auto& [K, V] : {std::pair{1, 3}, {17, 16}, {64, 72}, {128, 128}, {200, 100}}) {
      Call call = call_of({.name = "Widths", .T = 140, .H = 1, .HV = 2, .K = K, .V = V, .dtype = dtype});
      expect_contract(call, forward_and_backward(call));
    }
  }
}

TEST_P(CpuInstructionSet, FlagsAndPacksHoldTheContract) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call call = call_of({.name = "Flags",
                         .T = 220,
                         .H = 2,
                         .HV = 4,
                         .K = 40,
                         .V = 24,
                         .cu_seqlens = {1, 1, 65, 130, 219},
                         .dtype = dtype,
                         .gate = Gate::in_kernel,
                         .beta = Beta::sigmoid_twice,
                         .keys = Keys::raw,
                         .l2norm = true});
    expect_contract(call, forward_and_backward(call));
  }
}

TEST_P(CpuInstructionSet, SegmentsHoldTheContract) {
  Call call = call_of({.name = "Segments", .T = 500, .HV = 2, .K = 40, .V = 24});
  call.options.num_segments = 3;
  call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_EXACT;
  expect_contract(call, forward_and_backward(call));
}

TEST_P(CpuInstructionSet, DecodeHoldsTheContract) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t width : {1, 17, 40, 128}) {
      Call call = call_of({.name = "Decode", .B = 2, .T = 3, .HV = 2, .K = width, .V = 72, .dtype = dtype});
      expect_contract(call, recurrent_forward(call));
      expect_contract(call, separate_passes_forward(call));
    }
  }
}

std::string name_of(const ::testing::TestParamInfo<flashdelta_instruction_set>& info) {
  constexpr const char* kNames[] = {"Best", "Baseline", "Avx2", "Avx512"};
  return kNames[info.param];
}

INSTANTIATE_TEST_SUITE_P(Sets, CpuInstructionSet,
                         ::testing::Values(FLASHDELTA_INSTRUCTION_SET_BEST, FLASHDELTA_INSTRUCTION_SET_BASELINE,
                                           FLASHDELTA_INSTRUCTION_SET_AVX2, FLASHDELTA_INSTRUCTION_SET_AVX512),
                         name_of);

}  // namespace
}  // namespace flashdelta::testing
