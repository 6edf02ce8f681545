// Every shape, dtype, flag and value of the operation stays inside the numerics contract, forward and backward.
#include <gtest/gtest.h>

#include <array>
#include <numbers>

#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

constexpr std::array kDTypes = {DType::f32, DType::bf16, DType::f16};
constexpr std::array kDTypeNames = {"F32", "Bf16", "F16"};

std::string number(std::int64_t value) { return std::to_string(value); }

std::vector<Case> lengths() {
  std::vector<Case> cases;
  for (const std::int64_t T : {0, 1, 2, 15, 63, 64, 65, 127, 128, 129, 200}) {
    for (std::size_t d = 0; d < kDTypes.size(); ++d) {
      cases.push_back({.name = "T" + number(T) + kDTypeNames[d], .T = T, .HV = 2, .K = 64, .V = 64, .dtype = kDTypes[d]});
    }
  }
  return cases;
}

// fp32 for every pair, where an indexing slip shows most, and the 16-bit dtypes in turn.
std::vector<Case> widths() {
  std::vector<Case> cases;
  std::size_t turn = 0;
  for (const std::int64_t K : {1, 3, 16, 17, 64, 72, 100, 128, 200, 256}) {
    for (const std::int64_t V : {1, 3, 16, 17, 64, 72, 100, 128, 200, 256}) {
      for (const std::size_t d : {std::size_t{0}, 1 + turn++ % 2}) {
        cases.push_back({.name = "K" + number(K) + "V" + number(V) + kDTypeNames[d], .T = 70, .K = K, .V = V, .dtype = kDTypes[d]});
      }
    }
  }
  return cases;
}

std::vector<Case> heads() {
  std::vector<Case> cases;
  for (const std::int64_t H : {1, 2, 3}) {
    for (const std::int64_t ratio : {1, 2, 3, 4}) {
      for (std::size_t d = 0; d < kDTypes.size(); ++d) {
        cases.push_back({.name = "H" + number(H) + "Ratio" + number(ratio) + kDTypeNames[d],
                         .B = 2,
                         .T = 80,
                         .H = H,
                         .HV = H * ratio,
                         .K = 24,
                         .V = 40,
                         .dtype = kDTypes[d]});
      }
    }
  }
  return cases;
}

std::vector<Case> packs() {
  std::vector<Case> cases;
  const std::pair<const char*, std::vector<std::int64_t>> packings[] = {
      {"Lengths0And1And63And64And65", {0, 0, 1, 64, 128, 193}},
      {"EmptyFirstAndLastAndManyInARow", {0, 0, 0, 0, 70, 70, 70, 193, 193, 193}},
      {"TokensOfNoSequence", {5, 70, 70, 100, 180}},
      {"OnlyEmptySequences", {90, 90, 90}},
      {"NoSequences", {7}},
      {"ManyShort", {0, 3, 4, 6, 11, 12, 13, 20, 22, 23, 40, 41, 60, 61, 62, 63, 65, 66, 100, 193}},
  };
  for (const auto& [name, offsets] : packings) {
    for (std::size_t d = 0; d < kDTypes.size(); ++d) {
      cases.push_back({.name = std::string(name) + kDTypeNames[d],
                       .T = 193,
                       .H = 2,
                       .HV = 4,
                       .K = 20,
                       .V = 36,
                       .cu_seqlens = offsets,
                       .dtype = kDTypes[d]});
    }
  }
  return cases;
}

// Every combination of the activations and the optional arguments; dtypes, layouts and scales take turns.
std::vector<Case> flags() {
  std::vector<Case> cases;
  const std::pair<const char*, Gate> gates[] = {{"NoGate", Gate::absent}, {"Gate", Gate::random}, {"RawGate", Gate::in_kernel}};
  const std::pair<const char*, Beta> betas[] = {
      {"NoBeta", Beta::absent}, {"Beta", Beta::random}, {"RawBeta", Beta::sigmoid}, {"RawBetaTwice", Beta::sigmoid_twice}};
  std::size_t turn = 0;
  for (const bool l2norm : {false, true}) {
    for (const auto& [gate_name, gate] : gates) {
      for (const auto& [beta_name, beta] : betas) {
        for (const bool initial_state : {false, true}) {
          ++turn;
          Case c{.name = std::string(gate_name) + beta_name + (l2norm ? "Normed" : "") + (initial_state ? "FromState" : ""),
                 .B = 2,
                 .T = 100,
                 .H = 2,
                 .HV = 4,
                 .K = 40,
                 .V = 24,
                 .dtype = kDTypes[turn / 2 % 3],
                 .gate_dtype = kDTypes[turn % 3],
                 .state_dtype = kDTypes[turn / 4 % 3],
                 .gate = gate,
                 .beta = beta,
                 .keys = l2norm ? Keys::raw : Keys::unit,
                 .initial_state = initial_state,
                 .dt_bias = turn % 4 != 1,
                 .d_o = turn % 5 != 0,
                 .d_final_state = turn % 5 != 1,
                 .l2norm = l2norm,
                 .state_v_first = turn % 3 == 0};
          if (turn % 4 == 0) c.scale = 0.3;
          cases.push_back(c);
        }
      }
    }
  }
  return cases;
}

std::vector<Case> values() {
  std::vector<Case> cases;
  const std::pair<const char*, Gate> gates[] = {{"Gate0", Gate::zero},
                                                {"GateMinus1000", Gate::strong},
                                                {"GateMinusInfinity", Gate::infinite},
                                                {"GatesMixed", Gate::mixed},
                                                {"GateBursts", Gate::bursts}};
  const std::pair<const char*, Beta> betas[] = {{"Beta0", Beta::zero}, {"Beta1", Beta::one}, {"Beta2", Beta::two}};
  const std::pair<const char*, Keys> keys[] = {
      {"UnitKeys", Keys::unit}, {"ZeroKeys", Keys::zero}, {"RepeatedKeys", Keys::repeated}, {"CloseKeys", Keys::close}};
  for (const auto& [gate_name, gate] : gates) {
    for (const auto& [beta_name, beta] : betas) {
      for (const auto& [keys_name, key] : keys) {
        for (std::size_t d = 0; d < kDTypes.size(); ++d) {
          cases.push_back({.name = std::string(gate_name) + beta_name + keys_name + kDTypeNames[d],
                           .T = 130,
                           .HV = 4,
                           .K = 32,
                           .V = 32,
                           .dtype = kDTypes[d],
                           .gate = gate,
                           .beta = beta,
                           .keys = key});
        }
      }
    }
  }
  return cases;
}

std::string name_of(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

class CpuContract : public ::testing::TestWithParam<Case> {};

TEST_P(CpuContract, HoldsForwardAndBackward) {
  Call call = make_call(GetParam());
  expect_contract(call, forward_and_backward(call));
}

INSTANTIATE_TEST_SUITE_P(Lengths, CpuContract, ::testing::ValuesIn(lengths()), name_of);
INSTANTIATE_TEST_SUITE_P(Widths, CpuContract, ::testing::ValuesIn(widths()), name_of);
INSTANTIATE_TEST_SUITE_P(Heads, CpuContract, ::testing::ValuesIn(heads()), name_of);
INSTANTIATE_TEST_SUITE_P(Packs, CpuContract, ::testing::ValuesIn(packs()), name_of);
INSTANTIATE_TEST_SUITE_P(Flags, CpuContract, ::testing::ValuesIn(flags()), name_of);
INSTANTIATE_TEST_SUITE_P(Values, CpuContract, ::testing::ValuesIn(values()), name_of);

TEST(CpuContractOnce, MoreThan65535SequencesTimesHeads) {
  std::vector<std::int64_t> offsets(33001);
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<std::int64_t>(i / 2 + i / 3);
  Call call = make_call({.name = "Many", .T = offsets.back(), .HV = 2, .K = 2, .V = 1, .cu_seqlens = offsets});
  expect_contract(call, forward_and_backward(call));
}

TEST(CpuContractOnce, ScaleOfZeroGivesZeroOutputAndAnUnchangedState) {
  Call call = make_call({.name = "Scale", .T = 100, .HV = 2, .scale = 1});
  const Tensors with_scale = forward_and_backward(call);
  call.options.scale = 0;
  const Tensors without = forward_and_backward(call);
  for (const double value : without.at("o").values()) EXPECT_EQ(value, 0);
  EXPECT_EQ(without.at("final_state").bits(), with_scale.at("final_state").bits());
  expect_contract(call, without);
}

TEST(CpuContractOnce, UnnormalisedQueriesAreNotTouched) {
  Call call = make_call({.name = "LargeQ", .T = 90, .HV = 2, .K = 33, .V = 20});
  for (std::int64_t i = 0; i < call.inputs["q"].size(); ++i) call.inputs["q"].put(i, 50 * call.inputs["q"][i]);
  expect_contract(call, forward_and_backward(call));
}

// q and k of any size under l2norm, down to where the epsilon inside the root decides.
TEST(CpuContractOnce, NormalisesVectorsOfEverySize) {
  for (const double size : {1e-4, 1e-3, 1.0, 1e3}) {
    Call call = make_call({.name = "Sizes", .T = 70, .HV = 2, .K = 33, .V = 20, .keys = Keys::raw, .l2norm = true});
    for (const char* name : {"q", "k"}) {
      for (std::int64_t i = 0; i < call.inputs[name].size(); ++i) call.inputs[name].put(i, size * call.inputs[name][i]);
    }
    expect_contract(call, forward_and_backward(call), "size " + std::to_string(size));
  }
}

TEST(CpuContractOnce, ZeroVectorsUnderL2NormStayZero) {
  Call call = make_call({.name = "Zeros", .T = 70, .HV = 2, .keys = Keys::zero, .l2norm = true});
  call.inputs["q"].fill(0);
  const Tensors out = forward_and_backward(call);
  for (const double value : out.at("o").values()) EXPECT_EQ(value, 0);
  expect_contract(call, out);
}

// Reflections by keys that come again: what one token rounds, all that follow with its key round as well, and nothing forgets it.
TEST(CpuContractOnce, RoundingsOfRepeatedKeysDoNotAddUp) {
  struct Repeats {
    std::int64_t K, directions;
    bool l2norm, sigmoid;
    double beta, gate, key_length;
  };
  for (const Repeats& r :
       {Repeats{128, 1, true, false, 2, 0, 3}, Repeats{239, 1, true, true, 9, 0, 1},
        Repeats{128, 1, false, false, 1, 0, std::numbers::sqrt2}, Repeats{128, 1, true, false, 1.99, -1e-3, 1},
        Repeats{64, 2, true, false, 2, 0, 1}, Repeats{128, 16, true, false, 2, 0, 1}, Repeats{8, 400, true, false, 2, 0, 1}}) {
    Call call = make_call({.name = "Repeats",
                           .T = 400,
                           .HV = 2,
                           .K = r.K,
                           .V = 20,
                           .gate = Gate::zero,
                           .beta = r.sigmoid ? Beta::sigmoid_twice : Beta::two,
                           .l2norm = r.l2norm});
    HostTensor& k = call.inputs["k"];
    for (std::int64_t i = 0; i < k.size(); ++i) {
      k.put(i, i / r.K < r.directions ? r.key_length * k[i] : k[i - r.directions * r.K]);
    }
    call.inputs["beta"].fill(r.beta);
    call.inputs["g"].fill(r.gate);
    for (const auto set : {FLASHDELTA_INSTRUCTION_SET_BEST, FLASHDELTA_INSTRUCTION_SET_BASELINE}) {
      const std::string which = "K " + number(r.K) + ", directions " + number(r.directions) + ", beta " + std::to_string(r.beta);
      call.options.instruction_set = set;
      expect_contract(call, forward_and_backward(call), which);
      expect_contract(call, recurrent_forward(call), which + ", token by token");
    }
  }
}

TEST(CpuContractOnce, OutputGradientsMayHaveADtypeOfTheirOwn) {
  for (const DType dtype : kDTypes) {
    Call call = make_call({.name = "Gradients", .T = 80, .HV = 2, .dtype = DType::bf16});
    for (const char* name : {"d_o", "d_final_state"}) call.inputs[name] = call.inputs[name].converted(dtype);
    expect_contract(call, forward_and_backward(call));
  }
}

}  // namespace
}  // namespace flashdelta::testing
