#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/case.hpp"
#include "support/central_differences.hpp"

namespace flashdelta::testing {
namespace {

// By hand: S0 = 2, decay 1/2, k = 1, v = 3, beta = 1/2, q = 2, scale 1, d_o = 1 (tests/reference/forward_test.cpp has the forward).
//   dS = 2, dq = S = 2, du = 2, dk = u dS - S' dr = 2 - 1, dbeta = du r = 4, dv = dr = 1, dS' = 2 - 1, dg = decay S0 dS' = 1, dS0 = 1/2
TEST(ReferenceBackward, OneTokenWorkedOutByHand) {
  Call call = oracle_call(make_call({.name = "OneToken", .T = 1, .K = 1, .V = 1, .d_final_state = false, .scale = 1}));
  const std::pair<const char*, double> inputs[] = {{"q", 2},  {"k", 1}, {"v", 3}, {"g", std::log(0.5)}, {"beta", 0.5}, {"initial_state", 2},
                                                   {"d_o", 1}};
  for (const auto& [name, value] : inputs) call.inputs[name].fill(value);
  const Tensors out = chunk_backward(call, {});
  const std::pair<const char*, double> gradients[] = {{"dq", 2}, {"dk", 1}, {"dv", 1}, {"dg", 1}, {"dbeta", 4}, {"d_initial_state", 0.5}};
  for (const auto& [name, value] : gradients) EXPECT_EQ(out.at(name)[0], value) << name;
}

class ReferenceAdjoint : public ::testing::TestWithParam<Case> {};

TEST_P(ReferenceAdjoint, AgreesWithCentralDifferences) {
  const Call call = make_call(GetParam());
  const Tensors adjoint = oracle_backward(call);
  const Tensors differences = central_differences(call);
  ASSERT_EQ(adjoint.size(), differences.size());
  for (const auto& [name, gradient] : adjoint) EXPECT_LT(relative_error(gradient, differences.at(name), 1e-2), 1e-7) << name;
}

INSTANTIATE_TEST_SUITE_P(
    Flags, ReferenceAdjoint,
    ::testing::Values(
        Case{.name = "Plain", .B = 2, .T = 7, .K = 3, .V = 2}, Case{.name = "WiderThanTall", .T = 6, .K = 2, .V = 5},
        Case{.name = "OverSixtyFourTokens", .T = 67, .K = 2, .V = 1}, Case{.name = "Grouped", .T = 5, .H = 2, .HV = 6, .K = 3, .V = 2},
        Case{.name = "L2Norm", .T = 6, .HV = 2, .K = 3, .V = 2, .keys = Keys::raw, .l2norm = true},
        Case{.name = "GateInKernel", .T = 6, .HV = 2, .K = 3, .V = 2, .gate = Gate::in_kernel},
        Case{.name = "GateInKernelWithoutBias", .T = 6, .K = 3, .V = 2, .gate = Gate::in_kernel, .dt_bias = false},
        Case{.name = "BetaSigmoid", .T = 6, .K = 3, .V = 2, .beta = Beta::sigmoid},
        Case{.name = "NegativeEigenvalues", .T = 6, .K = 3, .V = 2, .beta = Beta::sigmoid_twice},
        Case{.name = "Everything",
             .T = 9,
             .H = 2,
             .HV = 4,
             .K = 3,
             .V = 2,
             .cu_seqlens = {1, 4, 4, 8},
             .gate = Gate::in_kernel,
             .beta = Beta::sigmoid_twice,
             .keys = Keys::raw,
             .l2norm = true,
             .state_v_first = true,
             .scale = 0.7},
        Case{.name = "NoGateNoBetaNoState", .T = 6, .K = 3, .V = 2, .gate = Gate::absent, .beta = Beta::absent, .initial_state = false},
        Case{.name = "OnlyThroughO", .T = 6, .K = 3, .V = 2, .d_final_state = false},
        Case{.name = "OnlyThroughTheFinalState", .T = 6, .K = 3, .V = 2, .d_o = false},
        Case{.name = "PackedWithGaps", .T = 14, .K = 3, .V = 2, .cu_seqlens = {2, 5, 5, 6, 12}},
        Case{.name = "GateMinusInfinity", .T = 9, .K = 3, .V = 2, .gate = Gate::infinite},
        Case{.name = "GatesMixed", .T = 9, .HV = 4, .K = 3, .V = 2, .gate = Gate::mixed},
        Case{.name = "BetaZero", .T = 6, .K = 3, .V = 2, .beta = Beta::zero},
        Case{.name = "BetaTwo", .T = 6, .K = 3, .V = 2, .beta = Beta::two}, Case{.name = "ScaleZero", .T = 6, .K = 3, .V = 2, .scale = 0},
        Case{.name = "ZeroKeys", .T = 6, .K = 3, .V = 2, .keys = Keys::zero},
        Case{.name = "RepeatedKeysNormed", .T = 6, .K = 3, .V = 2, .beta = Beta::random, .keys = Keys::repeated, .l2norm = true}),
    [](const auto& param_info) { return param_info.param.name; });

TEST(ReferenceBackward, GradientOfAnInfiniteGateIsZeroInTheKernelsActivationToo) {
  Call call = oracle_call(make_call({.name = "InfiniteRaw", .T = 3, .gate = Gate::in_kernel}));
  call.inputs["g"].put(1, std::numeric_limits<double>::infinity());
  const Tensors out = chunk_backward(call, {});
  EXPECT_EQ(out.at("dg")[1], 0);
  EXPECT_NE(out.at("dg")[2], 0);
  for (const char* name : {"dA_log", "d_dt_bias"}) EXPECT_TRUE(std::isfinite(out.at(name)[0])) << name;
}

TEST(ReferenceBackward, TokensOfNoSequenceHaveZeroGradients) {
  Call call = oracle_call(make_call({.name = "Gaps", .T = 9, .cu_seqlens = {2, 5}}));
  for (const auto& [name, gradient] : chunk_backward(call, {})) {
    if (name == "d_initial_state") continue;
    for (const double value : gradient.slice(1, 0, 2).values()) EXPECT_EQ(value, 0) << name;
    for (const double value : gradient.slice(1, 5, 9).values()) EXPECT_EQ(value, 0) << name;
  }
}

TEST(ReferenceBackward, AnEmptySequencePassesTheStatesGradientThrough) {
  Call call = oracle_call(make_call({.name = "Empty", .T = 4, .cu_seqlens = {0, 4, 4}}));
  EXPECT_EQ(chunk_backward(call, {}).at("d_initial_state").slice(0, 1, 2).bits(), call.inputs["d_final_state"].slice(0, 1, 2).bits());
  call.inputs.erase("d_final_state");
  for (const double value : chunk_backward(call, {}).at("d_initial_state").slice(0, 1, 2).values()) EXPECT_EQ(value, 0);
}

TEST(ReferenceBackward, UnwantedGradientsChangeNoOther) {
  Call call = oracle_call(make_call({.name = "Unwanted", .T = 9, .H = 2, .HV = 4}));
  const Tensors all = chunk_backward(call, {});
  for (const auto& [wanted, gradient] : all) {
    for (const auto& [name, unused] : all) {
      if (name != wanted) call.unwanted.insert(name);
    }
    EXPECT_EQ(chunk_backward(call, {}).at(wanted).bits(), gradient.bits()) << wanted;
    call.unwanted.clear();
  }
}

}  // namespace
}  // namespace flashdelta::testing
