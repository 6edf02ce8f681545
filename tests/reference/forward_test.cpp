#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

Call reference_call(const Case& c) {
  Call call = make_call(c);
  call.options.backend = FLASHDELTA_BACKEND_REFERENCE;
  return call;
}

void set(Call& call, const char* name, const std::vector<double>& values) {
  HostTensor& tensor = call.inputs[name];
  ASSERT_EQ(tensor.size(), static_cast<std::int64_t>(values.size()));
  tensor.assign(values);
}

// Two tokens of one key and one value channel, worked out on paper:
//   S0 = 2.  Token 0: decay 1/2, S = 1, u = 0.5 (3 - 1) = 1, S = 2, o = 2 * 2.  Token 1: decay 1, k = 2, u = 1 (1 - 4) = -3, S = -4, o =
//   -4.
Call two_tokens() {
  Call call = reference_call({.name = "TwoTokens", .T = 2, .K = 1, .V = 1, .dtype = DType::f64, .gate_dtype = DType::f64, .scale = 1});
  set(call, "q", {2, 1});
  set(call, "k", {1, 2});
  set(call, "v", {3, 1});
  set(call, "g", {std::log(0.5), 0});
  set(call, "beta", {0.5, 1});
  set(call, "initial_state", {2});
  return call;
}

TEST(ReferenceForward, TwoTokensWorkedOutByHand) {
  Call call = two_tokens();
  const Tensors out = chunk_forward(call);
  EXPECT_EQ(out.at("o").values(), (std::vector<double>{4, -4}));
  EXPECT_EQ(out.at("final_state").values(), (std::vector<double>{-4}));
}

TEST(ReferenceForward, CutsNothingWhateverTheOptionsSay) {
  Call call = reference_call({.name = "Counts", .B = 2, .T = 130, .HV = 3, .K = 2, .V = 2});
  call.options.num_segments = 2;
  call.segment_counts = true;
  EXPECT_EQ(chunk_forward(call).at("segment_counts").values(), (std::vector<double>{6, 0, 0, 0}));
}

TEST(ReferenceForward, ScaleIsAFactorOnO) {
  Call call = two_tokens();
  call.options.scale = 0.25;
  EXPECT_EQ(chunk_forward(call).at("o").values(), (std::vector<double>{1, -1}));
  call.options.scale = 0;
  EXPECT_EQ(chunk_forward(call).at("o").values(), (std::vector<double>{0, 0}));
}

TEST(ReferenceForward, DefaultScaleIsTheInverseRootOfK) {
  Call call = reference_call({.name = "Scale", .T = 5, .K = 9, .dtype = DType::f64});
  const Tensors by_default = chunk_forward(call);
  call.options.has_scale = 1;
  call.options.scale = 1.0 / 3;
  expect_same_bits(chunk_forward(call), by_default);
}

TEST(ReferenceForward, AbsentGateBetaAndStateMeanZeroOneAndZero) {
  Call call = reference_call({.name = "Absent", .T = 70, .HV = 2, .gate = Gate::zero, .beta = Beta::one});
  call.inputs["initial_state"].fill(0);
  const Tensors given = chunk_forward(call);
  for (const char* name : {"g", "beta", "initial_state"}) call.inputs.erase(name);
  expect_same_bits(chunk_forward(call), given);
}

TEST(ReferenceForward, AGateOfMinusInfinityForgetsTheStateAndNothingElse) {
  Call call = two_tokens();
  set(call, "g", {-std::numeric_limits<double>::infinity(), 0});
  const Tensors out = chunk_forward(call);  // S = 0.5 * 3 = 1.5, then u = 1 - 3 = -2 and S = -2.5
  EXPECT_EQ(out.at("o").values(), (std::vector<double>{3, -2.5}));
}

TEST(ReferenceForward, NormalisesQueriesAndKeysWithEpsilonInsideTheRoot) {
  Call call = two_tokens();
  call.options.use_qk_l2norm_in_kernel = 1;
  set(call, "q", {1e-3, 1});
  const Tensors out = chunk_forward(call);
  const double k0 = 1 / std::sqrt(1 + 1e-6);
  const double state = 1 + k0 * 0.5 * (3 - k0 * 1);
  EXPECT_NEAR(out.at("o")[0], std::sqrt(0.5) * state, 1e-14);
}

TEST(ReferenceForward, ActivatesGateAndBetaInTheKernel) {
  const Case c{.name = "Activations",
               .T = 3,
               .HV = 2,
               .dtype = DType::f64,
               .gate_dtype = DType::f64,
               .gate = Gate::in_kernel,
               .beta = Beta::sigmoid_twice};
  Call raw = reference_call(c);
  Call direct = raw;
  direct.options.use_gate_in_kernel = direct.options.use_beta_sigmoid_in_kernel = direct.options.allow_neg_eigval = 0;
  for (std::int64_t i = 0; i < direct.inputs["g"].size(); ++i) {
    const std::int64_t head = i % 2;
    const double x = raw.inputs["g"][i] + raw.inputs["dt_bias"][head];
    direct.inputs["g"].put(i, -std::exp(raw.inputs["A_log"][head]) * std::log(1 + std::exp(x)));
    direct.inputs["beta"].put(i, 2 / (1 + std::exp(-raw.inputs["beta"][i])));
  }
  direct.inputs.erase("A_log");
  direct.inputs.erase("dt_bias");
  const Tensors a = chunk_forward(raw);
  const Tensors b = chunk_forward(direct);
  EXPECT_LT(relative_error(a.at("o"), b.at("o")), 1e-13);
  EXPECT_LT(relative_error(a.at("final_state"), b.at("final_state")), 1e-13);
}

TEST(ReferenceForward, ActivationsOfHugeRawInputsStayFinite) {
  Call call = reference_call(
      {.name = "Huge", .T = 4, .dtype = DType::f64, .gate_dtype = DType::f64, .gate = Gate::in_kernel, .beta = Beta::sigmoid});
  set(call, "g", {1e4, -1e4, 800, -800});
  set(call, "beta", {1e4, -1e4, 800, -800});
  for (const auto& [name, tensor] : chunk_forward(call)) {
    if (name.starts_with("saved")) continue;
    for (const double value : tensor.values()) EXPECT_TRUE(std::isfinite(value)) << name;
  }
  for (const auto& [name, tensor] : chunk_backward(call, {})) {
    for (const double value : tensor.values()) EXPECT_TRUE(std::isfinite(value)) << name;
  }
}

TEST(ReferenceForward, IsLinearInValuesAndInitialState) {
  Call call = reference_call({.name = "Linear", .T = 70, .H = 2, .HV = 4, .dtype = DType::f64, .state_dtype = DType::f64});
  const Tensors both = chunk_forward(call);
  Call values_only = call;
  values_only.inputs.erase("initial_state");
  Call state_only = call;
  state_only.inputs["v"].fill(0);
  const Tensors a = chunk_forward(values_only);
  const Tensors b = chunk_forward(state_only);
  for (const char* name : {"o", "final_state"}) {
    HostTensor sum = a.at(name);
    for (std::int64_t i = 0; i < sum.size(); ++i) sum.put(i, sum[i] + b.at(name)[i]);
    EXPECT_LT(relative_error(sum, both.at(name)), 1e-13) << name;
  }
}

TEST(ReferenceForward, ValueHeadReadsTheKeyHeadOfItsGroup) {
  Call grouped = reference_call({.name = "Grouped", .T = 6, .H = 2, .HV = 6, .dtype = DType::f64});
  Call one_to_one = grouped;
  for (const char* name : {"q", "k"}) {
    HostTensor repeated(DType::f64, {1, 6, 6, 16});
    for (std::int64_t i = 0; i < repeated.size(); ++i) {
      const std::int64_t t = i / 96, head = i / 16 % 6;
      repeated.put(i, grouped.inputs[name].get({0, t, head / 3, i % 16}));
    }
    one_to_one.inputs[name] = repeated;
  }
  expect_same_bits(chunk_forward(one_to_one), chunk_forward(grouped));
}

TEST(ReferenceForward, TokensOfNoSequenceAreNeverReadAndGiveZero) {
  Call call = reference_call({.name = "Gaps", .T = 12, .cu_seqlens = {2, 5, 5, 9}});
  for (const char* name : {"q", "k", "v", "g", "beta"}) {
    const std::int64_t width = call.inputs[name].size() / 12;
    for (const std::int64_t t : {0, 1, 9, 10, 11}) {
      for (std::int64_t i = 0; i < width; ++i) call.inputs[name].put(t * width + i, std::nan(""));
    }
  }
  const Tensors out = chunk_forward(call);
  for (const double value : out.at("o").slice(1, 0, 2).values()) EXPECT_EQ(value, 0);
  for (const double value : out.at("o").slice(1, 9, 12).values()) EXPECT_EQ(value, 0);
  for (const double value : out.at("o").slice(1, 2, 9).values()) EXPECT_TRUE(std::isfinite(value));
  EXPECT_EQ(out.at("final_state").slice(0, 1, 2).bits(), call.inputs["initial_state"].slice(0, 1, 2).bits()) << "the empty sequence";
}

TEST(ReferenceForward, AnEmptySequenceWithoutAStateEndsAtZero) {
  Call call = reference_call({.name = "Empty", .T = 3, .cu_seqlens = {0, 0, 3, 3}, .initial_state = false});
  const Tensors out = chunk_forward(call);
  for (const std::int64_t n : {0, 2}) {
    for (const double value : out.at("final_state").slice(0, n, n + 1).values()) EXPECT_EQ(value, 0);
  }
}

TEST(ReferenceForward, StateLayoutChangesNothingElse) {
  Call k_first = reference_call({.name = "Layout", .B = 2, .T = 5, .HV = 2, .K = 3, .V = 4, .dtype = DType::f64});
  Call v_first = k_first;
  v_first.options.state_v_first = 1;
  for (const char* name : {"initial_state", "d_final_state"}) v_first.inputs[name] = v_first.inputs[name].swapped_last_two();
  Tensors a = results_only(forward_and_backward(k_first));
  Tensors b = results_only(forward_and_backward(v_first));
  for (const char* name : {"final_state", "d_initial_state"}) b[name] = b[name].swapped_last_two();
  expect_same_bits(a, b);
}

TEST(ReferenceForward, UpdatesTheStateInPlace) {
  Call call = reference_call({.name = "InPlace", .B = 3, .T = 4, .HV = 2, .state_dtype = DType::bf16});
  Call in_place = call;
  in_place.in_place = true;
  expect_same_bits(recurrent_forward(in_place), recurrent_forward(call));
}

TEST(ReferenceForward, SavesTheStateBeforeEveryNthChunkWhereTheHeaderSays) {
  for (const int every : {1, 2}) {
    Call call = reference_call({.name = "Saved", .T = 300, .K = 2, .V = 3, .cu_seqlens = {3, 3, 200, 300}, .dtype = DType::f64});
    call.options.checkpoint_chunks = every;
    const Tensors out = chunk_forward(call);
    for (const auto& [n, start, end] : {std::tuple{1, 3, 200}, {2, 200, 300}}) {
      for (int chunk = 0; start + 64 * chunk < end; chunk += every) {
        Call prefix = call;
        prefix.set_cu_seqlens({3, 3, n == 1 ? start + 64 * chunk : 200, n == 1 ? 200 : start + 64 * chunk});
        prefix.final_state_dtype = DType::f32;
        const std::int64_t slot = start / (64 * every) + n + chunk / every;
        EXPECT_EQ(out.at("saved_states").slice(0, slot, slot + 1).bits(), chunk_forward(prefix).at("final_state").slice(0, n, n + 1).bits())
            << "chunk " << chunk << " of sequence " << n << ", every " << every;
      }
    }
  }
}

TEST(ReferenceForward, SavedGateSumsRestartAtEveryChunk) {
  Call call = reference_call({.name = "SavedC", .T = 130, .gate = Gate::zero});
  call.inputs["g"].fill(-0.5);
  const HostTensor c = chunk_forward(call).at("saved_c");
  for (std::int64_t t = 0; t < 130; ++t) EXPECT_EQ(c[t], -0.5 * static_cast<double>(t % 64 + 1));
}

TEST(ReferenceForward, SavedTInvertsIPlusL) {
  Call call = reference_call({.name = "SavedT", .T = 66, .K = 4, .dtype = DType::f64, .gate_dtype = DType::f64});
  const HostTensor T = chunk_forward(call).at("saved_T");
  const auto L = [&](std::int64_t i, std::int64_t j) {
    double dot = 0, gate = 0;
    for (std::int64_t d = 0; d < 4; ++d) dot += call.inputs["k"].get({0, i, 0, d}) * call.inputs["k"].get({0, j, 0, d});
    for (std::int64_t t = j + 1; t <= i; ++t) gate += call.inputs["g"][t];
    return call.inputs["beta"][i] * dot * std::exp(gate);
  };
  for (std::int64_t i = 0; i < 66; ++i) {
    const std::int64_t start = i / 64 * 64;
    for (std::int64_t j = 0; j < 64; ++j) {
      double product = start + j < 66 ? T.get({0, i, 0, j}) : 0;
      for (std::int64_t m = start; m < i; ++m) product += L(i, m) * T.get({0, m, 0, j});
      EXPECT_NEAR(product, i - start == j ? 1 : 0, 1e-6) << i << ", " << j;
    }
  }
}

TEST(ReferenceForward, ThreadsDoNotShowInTheBits) {
  Call call = reference_call({.name = "Threads", .B = 3, .T = 20, .H = 2, .HV = 4});
  call.options.num_threads = 1;
  const Tensors one = forward_and_backward(call);
  call.options.num_threads = 5;
  expect_same_bits(forward_and_backward(call), one);
}

TEST(ReferenceForward, NoTokensAndNoSequencesAreLegal) {
  Call no_tokens = reference_call({.name = "NoTokens", .B = 2, .T = 0});
  const Tensors out = forward_and_backward(no_tokens);
  EXPECT_EQ(out.at("final_state").bits(), no_tokens.inputs["initial_state"].bits());
  EXPECT_EQ(out.at("d_initial_state").bits(), no_tokens.inputs["d_final_state"].bits());
  Call no_rows = reference_call({.name = "NoRows", .B = 0, .T = 5});
  EXPECT_EQ(forward_and_backward(no_rows).at("o").size(), 0);
}

}  // namespace
}  // namespace flashdelta::testing
