// What a checked call becomes. What is refused: tests/c_api/bad_input*.cpp.
#include "op/check.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "c_api/call.hpp"
#include "op/error.hpp"

namespace flashdelta {
namespace {

using abi_test::Call;
using abi_test::Entry;
using op::Backend;
using op::DType;
using op::Operation;
using op::Problem;
using op::Tensor;
using Sizes = std::array<std::int64_t, 4>;

Problem checked(Call& call) {
  if (abi_test::is_backward(call.entry())) {
    const flashdelta_backward_args args = call.backward_args();
    return op::check_backward(&args, !abi_test::is_query(call.entry()));
  }
  const flashdelta_forward_args args = call.forward_args();
  const Operation operation = abi_test::is_recurrent(call.entry()) ? Operation::recurrent_forward : Operation::chunk_forward;
  return op::check_forward(&args, operation, !abi_test::is_query(call.entry()));
}

void expect_view(const Tensor& tensor, DType dtype, int rank, const Sizes& shape, const Sizes& stride) {
  EXPECT_TRUE(tensor.present);
  EXPECT_EQ(tensor.dtype, dtype);
  EXPECT_EQ(tensor.rank, rank);
  EXPECT_EQ(tensor.shape, shape);
  EXPECT_EQ(tensor.stride, stride);
}

TEST(Check, SizesComeFromQAndV) {
  Call call(Entry::chunk_forward);
  const Problem p = checked(call);
  EXPECT_EQ((std::array{p.B, p.T, p.H, p.HV, p.K, p.V, p.N}), (std::array{Call::B, Call::T, Call::H, Call::HV, Call::K, Call::V, Call::N}));
  EXPECT_EQ(p.operation, Operation::chunk_forward);
  EXPECT_EQ(op::sequence(p, 1).begin, 4);
  EXPECT_EQ(op::sequence(p, 1).end, 6);
}

TEST(Check, NullStridesAreRowMajor) {
  Call call(Entry::chunk_forward);
  const Problem p = checked(call);
  expect_view(p.q, DType::bf16, 4, {1, 6, 2, 3}, {1, 6, 3, 1});
  expect_view(p.g, DType::f32, 3, {1, 6, 4, 0}, {1, 4, 1, 0});
  expect_view(p.A_log, DType::f32, 1, {4, 0, 0, 0}, {1, 0, 0, 0});
  expect_view(p.initial_state, DType::f32, 4, {2, 4, 3, 5}, {60, 15, 5, 1});
}

TEST(Check, AbsentTensorsAreAbsent) {
  Call call(Entry::recurrent_forward);
  for (const char* name : {"dt_bias", "initial_state", "final_state"}) call.drop(name);
  const Problem p = checked(call);
  EXPECT_FALSE(p.dt_bias || p.initial_state || p.final_state || p.saved_c || p.saved_T || p.saved_states || p.segment_counts);
  EXPECT_TRUE(p.o && p.A_log);
}

TEST(Check, ZeroOptionsGiveTheDefaults) {
  Call call(Entry::chunk_forward);
  call.drop_gate_in_kernel();
  std::memset(&call.options, 0, sizeof(call.options));
  const Problem p = checked(call);
  EXPECT_DOUBLE_EQ(p.scale, 1 / std::sqrt(3.0));
  EXPECT_EQ(p.checkpoint_chunks, 1);
  EXPECT_EQ(p.backend, Backend::cpu);
  EXPECT_FALSE(p.qk_l2norm || p.gate_in_kernel || p.beta_sigmoid || p.neg_eigval || p.batch_invariant);
}

TEST(Check, TheDefaultToleranceIsThatOfTheInputsDtype) {
  for (const Entry entry : {Entry::chunk_forward, Entry::chunk_backward}) {
    for (const auto& [dtype, tolerance] :
         {std::pair{abi_test::kBF16, 1e-5}, {abi_test::kF16, 1e-5}, {abi_test::kF32, 1e-6}, {abi_test::kF64, 1e-6}}) {
      Call call(entry);
      for (const char* name : {"q", "k"}) call[name].reset(dtype, {1, 6, 2, 3}, Call::kInput);
      call["v"].reset(dtype, {1, 6, 4, 5}, Call::kInput);
      EXPECT_EQ(checked(call).tolerance, tolerance);
      call.options.context_parallel_tolerance = 1e-9;
      EXPECT_EQ(checked(call).tolerance, 1e-9);
    }
  }
}

TEST(Check, SegmentCountsAreFourIntegers) {
  Call call(Entry::chunk_forward);
  const Problem p = checked(call);
  expect_view(p.segment_counts, DType::i32, 1, {4, 0, 0, 0}, {1, 0, 0, 0});
  EXPECT_EQ(p.segment_counts.data, call["segment_counts"].dl.data);
}

TEST(Check, AScaleOfZeroIsZero) {
  Call call(Entry::chunk_forward);
  call.options.has_scale = 1;
  EXPECT_EQ(checked(call).scale, 0);
}

TEST(Check, AScaleWithoutHasScaleIsNotRead) {
  Call call(Entry::chunk_forward);
  call.options.scale = NAN;
  EXPECT_DOUBLE_EQ(checked(call).scale, 1 / std::sqrt(3.0));
}

TEST(Check, OptionsArePassedOn) {
  Call call(Entry::chunk_forward);
  call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_EXACT;
  call.options.num_segments = 64;
  call.options.num_threads = 1024;
  call.options.batch_invariant = 1;
  call.options.use_qk_l2norm_in_kernel = 1;
  call.options.instruction_set = FLASHDELTA_INSTRUCTION_SET_BASELINE;
  call.options.context_parallel_tolerance = 0.25;
  const Problem p = checked(call);
  EXPECT_EQ(p.context_parallel, FLASHDELTA_CONTEXT_PARALLEL_EXACT);
  EXPECT_EQ(p.instruction_set, FLASHDELTA_INSTRUCTION_SET_BASELINE);
  EXPECT_EQ(p.num_segments, 64);
  EXPECT_EQ(p.num_threads, 1024);
  EXPECT_EQ(p.tolerance, 0.25);
  EXPECT_TRUE(p.batch_invariant && p.qk_l2norm && p.gate_in_kernel && p.beta_sigmoid && p.neg_eigval);
}

TEST(Check, OneSegmentGoesWithContextParallelOff) {
  Call call(Entry::chunk_forward);
  call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
  call.options.num_segments = 1;
  EXPECT_EQ(checked(call).num_segments, 1);
}

TEST(Check, StatesAreIndexedKeyFirstInBothLayouts) {
  Call call(Entry::chunk_backward);
  call.options.state_v_first = 1;
  for (const char* name : {"initial_state", "d_final_state", "d_initial_state"}) call[name].shape = {2, 4, 5, 3};
  const Problem p = checked(call);
  for (const Tensor* state : {&p.initial_state, &p.d_final_state, &p.d_initial_state}) {
    expect_view(*state, DType::f32, 4, {2, 4, 3, 5}, {60, 15, 1, 3});
  }
  expect_view(p.saved_states, DType::f32, 4, {2, 4, 3, 5}, {60, 15, 5, 1});
}

TEST(Check, ByteOffsetMovesTheData) {
  Call call(Entry::chunk_forward);
  auto* const base = static_cast<std::byte*>(call["g"].dl.data);
  call["g"].dl.byte_offset = 12;
  EXPECT_EQ(checked(call).g.data, base + 12);
}

TEST(Check, InputsMayBeStridedBroadcastOrBackwards) {
  Call call(Entry::chunk_forward);
  call["q"].strides = {0, 0, 3, 1};
  call["g"].strides = {0, -4, 1};
  call["g"].dl.byte_offset = 5 * 4 * sizeof(float);
  call["beta"].strides = {0, 0, 0};
  const Problem p = checked(call);
  EXPECT_EQ(p.q.stride, (Sizes{1, 0, 3, 1}));
  EXPECT_EQ(p.g.stride, (Sizes{1, -4, 1, 0}));
  EXPECT_EQ(p.beta.stride, (Sizes{1, 0, 0, 0}));
}

TEST(Check, StridesOfAxesOfOneMeanNothing) {
  Call call(Entry::chunk_forward);
  call["q"].strides = {INT64_MIN, 6, 3, 1};
  call["o"].strides = {-1, 20, 5, 1};
  EXPECT_EQ(checked(call).o.stride, (Sizes{1, 20, 5, 1}));

  Call one(Entry::chunk_forward);
  one.drop_cu_seqlens();
  one.resize(1, 1, 1, 1, 1, 1);
  one["q"].strides = {7, 7, 7, 7};
  EXPECT_EQ(checked(one).q.stride[3], 1);
}

TEST(Check, OutputsMayBeSlicesOfOneBuffer) {
  Call call(Entry::chunk_backward);
  call["dv"].reset(abi_test::kBF16, {1, 6, 4, 32}, Call::kPoison);  // row of 128: dv 4 x 5, dq and dk 2 x 3 each
  auto* const packed = static_cast<std::byte*>(call["dv"].dl.data);
  call["dv"].shape = {1, 6, 4, 5};
  call["dv"].strides = {768, 128, 5, 1};
  for (const char* name : {"dq", "dk"}) {
    call[name].dl.data = packed;
    call[name].dl.byte_offset = name[1] == 'q' ? 40 : 52;
    call[name].strides = {768, 128, 3, 1};
  }
  EXPECT_NO_THROW(checked(call));
}

TEST(Check, OutputsMayBeTransposed) {
  Call call(Entry::chunk_forward);
  call["o"].strides = {120, 5, 30, 1};
  call["final_state"].strides = {1, 2, 8, 24};
  EXPECT_NO_THROW(checked(call));
}

TEST(Check, FinalStateMayBeInitialState) {
  for (const Entry entry : {Entry::chunk_forward, Entry::recurrent_forward}) {
    Call call(entry);
    call["final_state"].dl.data = call["initial_state"].dl.data;
    const Problem p = checked(call);
    EXPECT_EQ(p.final_state.data, p.initial_state.data);
  }
}

TEST(Check, CallsWithoutTokensOrSequencesAreLegal) {
  for (const Entry entry : {Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_backward}) {
    for (const auto& [b, t] : {std::pair{0, 6}, {2, 0}, {0, 0}}) {
      Call call(entry);
      call.drop_cu_seqlens();
      call.resize(b, t, 2, 4, 3, 5);
      for (const std::string& name : call.names()) {
        if (call[name].shape[0] * (call[name].shape.size() > 1 ? call[name].shape[1] : 1) == 0) call[name].dl.data = nullptr;
      }
      const Problem p = checked(call);
      EXPECT_EQ(p.N, b);
      EXPECT_TRUE(p.q.present);
      EXPECT_EQ(p.q.data, nullptr);
    }
  }
}

TEST(Check, CuSeqlensOfOneEntryIsNoSequence) {
  Call call(Entry::chunk_forward);
  call.resize(1, 6, 2, 4, 3, 5);
  for (const char* name : {"initial_state", "final_state", "saved_states"}) call[name].shape[0] = 0;
  call.add("cu_seqlens", abi_test::kInt32, {1});
  *call["cu_seqlens"].as<std::int32_t>() = 2;
  const Problem p = checked(call);
  EXPECT_EQ(p.N, 0);
  EXPECT_NE(p.cu_seqlens, nullptr);
}

TEST(Check, CuSeqlensMayBeInt64AndStrided) {
  Call call(Entry::chunk_forward);
  call["cu_seqlens"].reset(abi_test::kInt64, {6}, std::byte{0});
  auto* values = call["cu_seqlens"].as<std::int64_t>();
  values[0] = 1;
  values[2] = values[4] = 5;
  values[1] = values[3] = -1;
  call["cu_seqlens"].shape = {3};
  call["cu_seqlens"].strides = {2};
  const Problem p = checked(call);
  EXPECT_TRUE(p.cu_seqlens_int64);
  EXPECT_EQ(op::sequence(p, 0).begin, 1);
  EXPECT_EQ(op::sequence(p, 1).length(), 0);
}

TEST(Check, DecodeMixesFloat32QueriesWith16BitValues) {
  Call call(Entry::recurrent_forward, FLASHDELTA_BACKEND_CPU);
  for (const char* name : {"q", "k"}) call[name].reset(abi_test::kF32, {1, 6, 2, 3}, Call::kInput);
  EXPECT_EQ(checked(call).v.dtype, DType::bf16);
}

TEST(Check, TheOracleTakesFloat64AndAnyWidth) {
  Call call(Entry::chunk_forward);
  call.drop_cu_seqlens();
  call.resize(1, 2, 1, 1, 300, 400);
  for (const char* name : {"q", "k"}) call[name].reset(abi_test::kF64, {1, 2, 1, 300}, Call::kInput);
  for (const char* name : {"v", "o"}) call[name].reset(abi_test::kF64, {1, 2, 1, 400}, Call::kInput);
  EXPECT_EQ(checked(call).K, 300);
}

TEST(Check, TheOracleWritesGradientsOfAnyFloat) {
  Call call(Entry::chunk_backward);
  call["dq"].reset(abi_test::kF64, {1, 6, 2, 3}, Call::kPoison);
  call.drop("saved_states");
  EXPECT_EQ(checked(call).dq.dtype, DType::f64);
}

TEST(Check, PinnedHostMemoryCountsAsCpu) {
  Call call(Entry::chunk_forward, FLASHDELTA_BACKEND_AUTO);
  call["k"].dl.device = {kDLCUDAHost, 0};
  EXPECT_EQ(checked(call).backend, Backend::cpu);
}

// A call that the cuda backend takes, at addresses that nothing may read.
void make_cuda(Call& call, std::int64_t b = 1, std::int64_t t = 6) {
  if (call.has("cu_seqlens")) call.drop_cu_seqlens();
  call.resize(b, t, 2, 4, 128, 128);
  call.move_to_cuda(3);
  std::uintptr_t next = 0x7f0000000000;
  for (const std::string& name : call.names()) {
    call[name].dl.data = reinterpret_cast<void*>(next);
    call[name].dl.byte_offset = 0;
    next += std::uintptr_t{1} << 44;
  }
}

TEST(CheckCuda, TensorsGoToTheirDeviceAndNothingIsRead) {
  for (const Entry entry : {Entry::chunk_forward_workspace_size, Entry::recurrent_forward_workspace_size}) {
    Call call(entry);
    make_cuda(call);
    call.options.stream = reinterpret_cast<void*>(std::uintptr_t{77});
    call.add("cu_seqlens", abi_test::kInt64, {2});
    call["cu_seqlens"].dl.device = {kDLCUDA, 3};
    call["cu_seqlens"].dl.data = reinterpret_cast<void*>(std::uintptr_t{64});
    const Problem p = checked(call);
    EXPECT_EQ(p.backend, Backend::cuda);
    EXPECT_EQ(p.device_id, 3);
    EXPECT_EQ(p.N, 1);
    EXPECT_EQ(p.cu_seqlens, reinterpret_cast<const void*>(std::uintptr_t{64}));
    EXPECT_TRUE(p.cu_seqlens_int64);
    EXPECT_EQ(p.stream, reinterpret_cast<void*>(std::uintptr_t{77}));
  }
}

TEST(CheckCuda, StridesOfAxesOfOnePlaceAreFree) {
  Call call(Entry::chunk_forward_workspace_size);
  make_cuda(call);
  call["q"].strides = {3, 256, 128, 1};
  call["o"].strides = {-7, 512, 128, 1};
  EXPECT_EQ(checked(call).q.stride, (Sizes{1, 256, 128, 1}));
}

TEST(CheckCuda, StridesOfSixteenBytesAreTaken) {
  Call call(Entry::chunk_forward_workspace_size);
  make_cuda(call, 2);
  call["q"].strides = {10000, 8, 1000, 1};
  call["k"].strides = {0, 0, 0, 1};
  call["v"].strides = {(std::int64_t{1} << 39) - 8, 1032, 136, 1};
  call["o"].strides = {128, 256, 1536, 1};
  EXPECT_EQ(checked(call).v.stride, (Sizes{(std::int64_t{1} << 39) - 8, 1032, 136, 1}));
}

TEST(CheckCuda, GatesAndStatesKeepAnyStrideAndDtype) {
  Call call(Entry::chunk_forward_workspace_size);
  make_cuda(call);
  call["g"].strides = {1, -5, 7, 0};
  call["g"].strides.pop_back();
  call["beta"].strides = {1, 0, 3};
  call["initial_state"].dl.dtype = abi_test::kF16;
  call["initial_state"].strides = {65537, 16387, 1, 128};
  call["final_state"].dl.dtype = abi_test::kBF16;
  EXPECT_EQ(checked(call).beta.stride, (Sizes{1, 0, 3, 0}));
}

TEST(CheckCuda, TensorsWithoutElementsAreTaken) {
  Call call(Entry::chunk_forward_workspace_size);
  make_cuda(call, 1, 0);
  for (const char* name : {"q", "k", "v", "o"}) call[name].dl.data = nullptr;
  EXPECT_EQ(checked(call).T, 0);
}

TEST(CheckCuda, SegmentsAreTakenAsEverywhere) {
  for (const int segments : {0, 1, 2, 64}) {
    Call call(Entry::chunk_forward_workspace_size);
    make_cuda(call);
    call.options.num_segments = segments;
    const Problem p = checked(call);
    EXPECT_EQ(p.num_segments, segments);
    EXPECT_EQ(p.segment_counts.data, call["segment_counts"].dl.data);
  }
}

TEST(CheckCuda, WhatChoosesAmongCpuKernelsChangesNothing) {
  Call call(Entry::recurrent_forward_workspace_size);
  make_cuda(call);
  call.options.instruction_set = FLASHDELTA_INSTRUCTION_SET_AVX512;
  call.options.num_threads = 7;
  call.options.num_segments = 5;  // decode goes token by token whatever it says
  EXPECT_EQ(checked(call).backend, Backend::cuda);
}

TEST(Check, AQueryDoesNotLookAtTheWorkspace) {
  Call call(Entry::chunk_forward_workspace_size);
  call.workspace = reinterpret_cast<void*>(std::uintptr_t{3});
  call.workspace_size = 77;
  EXPECT_EQ(checked(call).workspace_size, 0U);
}

TEST(Check, ErrorsCarryTheirStatus) {
  Call call(Entry::chunk_forward);
  call["q"].dl.dtype = abi_test::kInt32;
  try {
    checked(call);
    FAIL() << "nothing was thrown";
  } catch (const op::Error& error) {
    EXPECT_EQ(error.status(), FLASHDELTA_TYPE_ERROR);
  }
}

}  // namespace
}  // namespace flashdelta
