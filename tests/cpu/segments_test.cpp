// Cutting a sequence into segments changes nothing beyond the contract.
#include <gtest/gtest.h>

#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

Case long_case(DType dtype, Gate gate = Gate::random) {
  return {.name = "Long", .T = 700, .HV = 2, .K = 40, .V = 24, .dtype = dtype, .gate = gate};
}

class CpuSegments : public ::testing::TestWithParam<int> {};

TEST_P(CpuSegments, ForcedExactSegmentsHoldTheContract) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call call = make_call(long_case(dtype));
    call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_EXACT;
    call.options.num_segments = GetParam();
    expect_contract(call, forward_and_backward(call));
  }
}

TEST_P(CpuSegments, ForcedSegmentsOfAPackHoldTheContract) {
  for (const auto mode : {FLASHDELTA_CONTEXT_PARALLEL_EXACT, FLASHDELTA_CONTEXT_PARALLEL_AUTO}) {
    Call call = make_call({.name = "Pack", .T = 600, .HV = 3, .K = 17, .V = 20, .cu_seqlens = {5, 5, 60, 190, 191, 590, 590}});
    call.options.context_parallel = mode;
    call.options.num_segments = GetParam();
    expect_contract(call, forward_and_backward(call));
  }
}

TEST_P(CpuSegments, HoldTheContractForEveryKindOfGate) {
  for (const Gate gate : {Gate::absent, Gate::zero, Gate::strong, Gate::infinite, Gate::bursts, Gate::in_kernel, Gate::mixed}) {
    Case c = long_case(DType::f32, gate);
    c.T = 400;
    c.HV = 4;
    Call call = make_call(c);
    call.options.num_segments = GetParam();
    const Tensors oracle = oracle_forward_and_backward(call);
    for (const auto mode : {FLASHDELTA_CONTEXT_PARALLEL_EXACT, FLASHDELTA_CONTEXT_PARALLEL_AUTO}) {
      call.options.context_parallel = mode;
      expect_contract(call, forward_and_backward(call), oracle, "gate " + std::to_string(static_cast<int>(gate)));
    }
  }
}

TEST_P(CpuSegments, WithoutAStateAtEitherEndHoldTheContract) {
  Case c = long_case(DType::f32);
  c.initial_state = c.d_final_state = false;
  Call call = make_call(c);
  call.options.num_segments = GetParam();
  expect_contract(call, forward_and_backward(call));
}

INSTANTIATE_TEST_SUITE_P(Forced, CpuSegments, ::testing::Values(1, 2, 3, 8, 64),
                         [](const auto& param_info) { return "Segments" + std::to_string(param_info.param); });

TEST(CpuSegmentsPlanned, AutoExactAndOffHoldTheContract) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Case c = long_case(dtype);
    c.T = 2100;
    c.HV = 1;
    Call call = make_call(c);
    const Tensors oracle = oracle_forward_and_backward(call);
    for (const int threads : {1, 8}) {
      for (const auto mode : {FLASHDELTA_CONTEXT_PARALLEL_AUTO, FLASHDELTA_CONTEXT_PARALLEL_EXACT, FLASHDELTA_CONTEXT_PARALLEL_OFF}) {
        call.options.context_parallel = mode;
        call.options.num_threads = threads;
        expect_contract(call, forward_and_backward(call), oracle, "mode " + std::to_string(mode));
      }
    }
  }
}

TEST(CpuSegmentsPlanned, KeysLongerThanOneAreNotTakenForContractions) {
  // beta |k|^2 = 2.2: every token's transition has a norm of 1.2, so nothing here may be cut off however strong the gate looks.
  Case c = long_case(DType::f32);
  c.T = 400;
  c.beta = Beta::two;
  Call call = make_call(c);
  for (std::int64_t i = 0; i < call.inputs["k"].size(); ++i) call.inputs["k"].put(i, 1.0488 * call.inputs["k"][i]);
  call.inputs["g"].fill(-0.19);
  call.options.num_segments = 4;
  expect_contract(call, forward_and_backward(call));
}

TEST(CpuSegmentsPlanned, TheSameCallGivesTheSameBits) {
  for (const int segments : {0, 2, 5}) {
    Call call = make_call(long_case(DType::bf16));
    call.options.num_segments = segments;
    call.options.num_threads = 4;
    const Tensors first = forward_and_backward(call);
    for (int i = 0; i < 3; ++i) expect_same_bits(forward_and_backward(call), first);
  }
}

TEST(CpuSegmentsPlanned, ForwardAndBackwardMayDifferInContextParallel) {
  const std::pair<flashdelta_context_parallel, int> ways[] = {{FLASHDELTA_CONTEXT_PARALLEL_OFF, 0},
                                                              {FLASHDELTA_CONTEXT_PARALLEL_EXACT, 3},
                                                              {FLASHDELTA_CONTEXT_PARALLEL_EXACT, 7},
                                                              {FLASHDELTA_CONTEXT_PARALLEL_AUTO, 0}};
  Call call = make_call(long_case(DType::f32));
  const Tensors oracle = oracle_forward_and_backward(call);
  for (const auto& [forward_mode, forward_segments] : ways) {
    call.options.context_parallel = forward_mode;
    call.options.num_segments = forward_segments;
    const Tensors out = chunk_forward(call);
    for (const auto& [backward_mode, backward_segments] : ways) {
      call.options.context_parallel = backward_mode;
      call.options.num_segments = backward_segments;
      expect_contract(call, chunk_backward(call, out), oracle, "");
    }
  }
}

using Counts = std::vector<double>;  // segments, boundaries warmed up, boundaries exact, warm-up chunks

Counts counts_of(Call& call, flashdelta_context_parallel mode, int segments) {
  call.segment_counts = true;
  call.options.context_parallel = mode;
  call.options.num_segments = segments;
  return chunk_forward(call).at("segment_counts").values();
}

TEST(CpuSegmentCounts, WithoutCutsEveryPairIsOneSegment) {
  Call call = make_call(long_case(DType::f32));
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_OFF, 0), (Counts{2, 0, 0, 0}));
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_EXACT, 1), (Counts{2, 0, 0, 0}));
}

TEST(CpuSegmentCounts, ExactBoundariesAreNeverWarmedUp) {
  Call call = make_call(long_case(DType::bf16, Gate::strong));
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_EXACT, 3), (Counts{6, 0, 4, 0}));
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_EXACT, 64), (Counts{22, 0, 20, 0}));  // 700 tokens are eleven chunks
}

TEST(CpuSegmentCounts, StrongGatesAreWarmedUpOverOneChunk) {
  Call call = make_call(long_case(DType::f32, Gate::strong));
  for (const int threads : {1, 4}) {
    call.options.num_threads = threads;
    EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_AUTO, 3), (Counts{6, 2, 2, 2}));  // the first segment runs whole
    EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_AUTO, 64), (Counts{22, 18, 2, 18}));
  }
}

TEST(CpuSegmentCounts, TheDefaultToleranceIsThatOfTheDtype) {
  // exp(-12) over a chunk lies between 1e-5 and 1e-6.
  for (const auto& [dtype, chunks] : {std::pair{DType::f32, 4.0}, {DType::bf16, 2.0}, {DType::f16, 2.0}}) {
    Call call = make_call(long_case(dtype));
    call.inputs["g"].fill(-12.0 / FLASHDELTA_CHUNK);
    EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_AUTO, 3), (Counts{6, 2, 2, chunks}));
    call.options.context_parallel_tolerance = 1e-5;
    EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_AUTO, 3), (Counts{6, 2, 2, 2}));
    call.options.context_parallel_tolerance = 1e-6;
    EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_AUTO, 3), (Counts{6, 2, 2, 4}));
  }
}

TEST(CpuSegmentCounts, SequencesOfAPackAreAddedUpEmptyOnesToo) {
  Case c{.name = "Pack", .T = 600, .HV = 3, .K = 17, .V = 20, .cu_seqlens = {5, 5, 60, 190, 191, 590, 590}};
  c.initial_state = false;
  Call call = make_call(c);
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_EXACT, 2), (Counts{24, 0, 6, 0}));
  call.set_cu_seqlens({7});
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_EXACT, 2), (Counts{0, 0, 0, 0}));
}

TEST(CpuSegmentCounts, CallsWithoutTokensReportTheirPairs) {
  Call call = make_call({.name = "Empty", .B = 3, .T = 0, .HV = 2});
  EXPECT_EQ(counts_of(call, FLASHDELTA_CONTEXT_PARALLEL_AUTO, 2), (Counts{6, 0, 0, 0}));
}

TEST(CpuSegmentCounts, AskingForThemChangesNoBit) {
  Call call = make_call(long_case(DType::bf16));
  call.options.num_segments = 4;
  const Tensors without = chunk_forward(call);
  call.segment_counts = true;
  Tensors with = chunk_forward(call);
  with.erase("segment_counts");
  expect_same_bits(with, without);
}

}  // namespace
}  // namespace flashdelta::testing
