// The chunked adjoint: what it works from, and that it is the forward's derivative.
#include <gtest/gtest.h>

#include "support/case.hpp"
#include "support/central_differences.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

const Case kCase{.name = "Backward", .T = 230, .H = 2, .HV = 4, .K = 24, .V = 40, .cu_seqlens = {4, 44, 180, 180, 230}};

class CpuBackward : public ::testing::TestWithParam<Case> {};

// No adjoint in between: the derivative of the oracle's forward itself.
TEST_P(CpuBackward, AgreesWithCentralDifferencesOfTheOracle) {
  Call call = make_call(GetParam());
  const Tensors got = chunk_backward(call, chunk_forward(call));
  const Tensors differences = central_differences(call);
  ASSERT_EQ(got.size(), differences.size());
  const Contract allowed = contract(DType::f32);
  for (const auto& [name, gradient] : got) {
    EXPECT_LE(relative_error(gradient, differences.at(name), 1e-2), allowed.scalars) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Small, CpuBackward,
                         ::testing::Values(Case{.name = "OneToken", .T = 1, .K = 3, .V = 2},
                                           Case{.name = "OneChunk", .T = 9, .K = 5, .V = 3},
                                           Case{.name = "TwoChunks", .T = 67, .K = 3, .V = 2},
                                           Case{.name = "Grouped", .T = 12, .H = 2, .HV = 4, .K = 3, .V = 2},
                                           Case{.name = "Everything",
                                                .T = 75,
                                                .HV = 2,
                                                .K = 3,
                                                .V = 2,
                                                .cu_seqlens = {1, 4, 4, 74},
                                                .gate = Gate::in_kernel,
                                                .beta = Beta::sigmoid_twice,
                                                .keys = Keys::raw,
                                                .l2norm = true,
                                                .state_v_first = true,
                                                .scale = 0.7},
                                           Case{.name = "GatesMixed", .T = 66, .HV = 4, .K = 3, .V = 2, .gate = Gate::mixed},
                                           Case{.name = "BetaZero", .T = 66, .K = 3, .V = 2, .beta = Beta::zero}),
                         [](const auto& param_info) { return param_info.param.name; });

TEST(CpuBackwardOnce, TwiceGivesTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Case c = kCase;
    c.dtype = dtype;
    Call call = make_call(c);
    const Tensors saved = chunk_forward(call);
    expect_same_bits(chunk_backward(call, saved), chunk_backward(call, saved));
  }
}

TEST(CpuBackwardOnce, NeedsOnlyTheSavedStates) {
  Call call = make_call(kCase);
  const Tensors saved = chunk_forward(call);
  for (const std::set<std::string>& absent : {std::set<std::string>{"saved_c"}, {"saved_T"}, {"saved_c", "saved_T"}}) {
    Tensors fewer = saved;
    for (const std::string& name : absent) fewer.erase(name);
    expect_contract(call, chunk_backward(call, fewer));
  }
}

TEST(CpuBackwardOnce, HoldsTheContractFromEveryNthState) {
  Call call = make_call({.name = "Checkpoints", .T = 900, .HV = 2, .K = 17, .V = 24, .cu_seqlens = {0, 10, 700, 899}});
  const Tensors oracle = oracle_forward_and_backward(call);
  for (const int every : {1, 2, 4, 8, 64}) {
    for (const int segments : {0, 3}) {
      call.options.checkpoint_chunks = every;
      call.options.num_segments = segments;
      expect_contract(call, forward_and_backward(call), oracle, "every " + std::to_string(every));
    }
  }
}

TEST(CpuBackwardOnce, HoldsTheContractFromStatesSavedAsBf16) {
  Case c = kCase;
  c.dtype = DType::bf16;
  Call call = make_call(c);
  call.saved_states_dtype = DType::bf16;
  expect_contract(call, forward_and_backward(call));
}

TEST(CpuBackwardOnce, UnwantedOutputsChangeNoOther) {
  Case c = kCase;
  c.gate = Gate::in_kernel;
  Call call = make_call(c);
  const Tensors all = forward_and_backward(call);
  const Tensors saved = all;
  for (const char* wanted : {"dq", "dk", "dv", "dg", "dbeta", "d_initial_state", "dA_log", "d_dt_bias"}) {
    call.unwanted.clear();
    for (const auto& [name, unused] : all) {
      if (name != wanted) call.unwanted.insert(name);
    }
    EXPECT_TRUE(chunk_backward(call, saved).at(wanted).bits() == all.at(wanted).bits()) << wanted;
  }
  call.unwanted = {"final_state", "saved_c", "saved_T", "saved_states"};
  EXPECT_TRUE(chunk_forward(call).at("o").bits() == all.at("o").bits());
}

TEST(CpuBackwardOnce, AnEmptySequencePassesTheStatesGradientThrough) {
  Call call = make_call(kCase);
  const Tensors out = forward_and_backward(call);
  EXPECT_EQ(out.at("d_initial_state").slice(0, 2, 3).bits(), call.inputs["d_final_state"].slice(0, 2, 3).bits());
  EXPECT_EQ(out.at("final_state").slice(0, 2, 3).bits(), call.inputs["initial_state"].slice(0, 2, 3).bits());
}

// The saved tensors are a format, not a secret: another backend, or the caller, may write or read them.
TEST(CpuBackwardOnce, SavedTensorsHoldWhatTheHeaderSays) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call call = make_call({.name = "Saved", .T = 200, .HV = 2, .dtype = dtype});
    Call reference = call;
    reference.options.backend = FLASHDELTA_BACKEND_REFERENCE;
    const Tensors got = chunk_forward(call);
    const Tensors expected = chunk_forward(reference);
    EXPECT_LE(relative_error(got.at("saved_c"), expected.at("saved_c")), 1e-5);
    EXPECT_LE(relative_error(got.at("saved_states"), expected.at("saved_states")), contract(dtype).final_state);
    // Columns beyond a short last chunk mean nothing.
    const auto columns = [](const Tensors& out) { return out.at("saved_T").part(1, 192, 200).part(3, 0, 8); };
    EXPECT_LE(relative_error(got.at("saved_T").part(1, 0, 192), expected.at("saved_T").part(1, 0, 192)), contract(dtype).o);
    EXPECT_LE(relative_error(columns(got), columns(expected)), contract(dtype).o);
  }
}

TEST(CpuBackwardOnce, WorksFromWhatTheReferenceSaved) {
  Call call = make_call(kCase);
  Call reference = call;
  reference.options.backend = FLASHDELTA_BACKEND_REFERENCE;
  expect_contract(call, chunk_backward(call, chunk_forward(reference)));
}

}  // namespace
}  // namespace flashdelta::testing
