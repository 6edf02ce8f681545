// Every shape, dtype, flag and value of the forward pass stays inside the numerics contract on the GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "gpu/device_call.hpp"

namespace flashdelta::testing {
namespace {

constexpr std::array kDTypes = {DType::bf16, DType::f16};
constexpr std::array kNarrowAndWide = {DType::f32, DType::bf16, DType::f16};
constexpr std::array kLengths = {0, 1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 1000};

std::string suffix(DType dtype) { return dtype == DType::bf16 ? "Bf16" : "Fp16"; }
std::string number(std::int64_t value) { return std::to_string(value); }

// A line of a table in both dtypes.
void add(std::vector<Case>& cases, Case c) {
  const std::string name = c.name;
  for (const DType dtype : kDTypes) {
    c.dtype = dtype;
    c.name = name + suffix(dtype);
    c.seed = cases.size() + 1;
    cases.push_back(c);
  }
}

std::vector<Case> lengths() {
  std::vector<Case> cases;
  for (const std::int64_t T : kLengths) add(cases, {.name = "T" + number(T), .T = T, .HV = 2});
  return cases;
}

std::vector<Case> heads() {
  std::vector<Case> cases;
  const std::pair<int, int> layouts[] = {{1, 1}, {2, 4}, {1, 3}, {2, 8}, {1, 8}, {3, 3}, {1, 5}, {1, 16}, {2, 12}, {1, 7}};
  for (const auto& [H, HV] : layouts) {
    add(cases, {.name = "H" + number(H) + "HV" + number(HV), .B = 2, .T = 150, .H = H, .HV = HV});
    add(cases,
        {.name = "H" + number(H) + "HV" + number(HV) + "Packed", .T = 150, .H = H, .HV = HV, .cu_seqlens = {0, 0, 37, 101, 102, 150}});
  }
  for (const std::int64_t B : {3, 7}) add(cases, {.name = "B" + number(B), .B = B, .T = 97, .H = 2, .HV = 4});
  // More chunks than prepare has CTAs, so that each has several.
  const std::pair<int, int> many[] = {{700, 700}, {700, 1400}, {500, 1500}, {300, 1200}};
  for (const auto& [H, HV] : many) add(cases, {.name = "Many" + number(HV / H), .T = 66, .H = H, .HV = HV});
  return cases;
}

// Sequences of all lengths, one behind the other, so that no chunk starts where the tensor's rows would suggest.
std::vector<std::int64_t> offsets_of_all_lengths(std::int64_t first) {
  std::vector<std::int64_t> offsets{first};
  for (std::size_t i = 0; i < kLengths.size(); ++i) offsets.push_back(offsets.back() + kLengths[i * 7 % kLengths.size()]);
  return offsets;
}

std::vector<Case> packs() {
  std::vector<Case> cases;
  const std::pair<const char*, std::vector<std::int64_t>> packings[] = {
      {"Lengths0And1And63And64And65", {0, 0, 1, 64, 128, 193}},
      {"EmptyFirstAndLastAndManyInARow", {0, 0, 0, 0, 70, 70, 70, 193, 193, 193}},
      {"TokensOfNoSequence", {5, 70, 70, 100, 180}},
      {"NothingBeforeButMuchBehind", {0, 3}},
      {"MuchBeforeAndNothingBehind", {190, 193}},
      {"OnlyEmptySequences", {90, 90, 90}},
      {"NoSequences", {7}},
      {"ManyShort", {0, 3, 4, 6, 11, 12, 13, 20, 22, 23, 40, 41, 60, 61, 62, 63, 65, 66, 100, 193}},
      {"OneOfAllTokens", {0, 193}},
  };
  for (const auto& [name, offsets] : packings) {
    for (const bool int64 : {false, true}) {
      add(cases, {.name = std::string(name) + (int64 ? "Int64" : "Int32"),
                  .T = 193,
                  .H = 2,
                  .HV = 4,
                  .cu_seqlens = offsets,
                  .int64_offsets = int64});
    }
  }
  for (const std::int64_t first : {0, 9}) {
    const std::vector<std::int64_t> offsets = offsets_of_all_lengths(first);
    add(cases, {.name = "AllLengthsFrom" + number(first),
                .T = offsets.back() + first,
                .HV = 3,
                .cu_seqlens = offsets,
                .int64_offsets = first == 0});
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
                 .gate_dtype = kNarrowAndWide[turn % 3],
                 .state_dtype = kNarrowAndWide[turn / 4 % 3],
                 .gate = gate,
                 .beta = beta,
                 .keys = l2norm ? Keys::raw : Keys::unit,
                 .initial_state = initial_state,
                 .dt_bias = turn % 4 != 1,
                 .l2norm = l2norm,
                 .state_v_first = turn % 3 == 0};
          if (turn % 4 == 0) c.scale = 0.3;
          add(cases, c);
        }
      }
    }
  }
  return cases;
}

// Gates and betas at their edges, over keys of the given kinds.
std::vector<Case> values(const std::vector<std::pair<const char*, Keys>>& keys) {
  std::vector<Case> cases;
  const std::pair<const char*, Gate> gates[] = {{"Gate0", Gate::zero},
                                                {"GateMinus1000", Gate::strong},
                                                {"GateMinusInfinity", Gate::infinite},
                                                {"GatesMixed", Gate::mixed},
                                                {"GateBursts", Gate::bursts}};
  const std::pair<const char*, Beta> betas[] = {{"Beta0", Beta::zero}, {"Beta1", Beta::one}, {"Beta2", Beta::two}};
  for (const auto& [gate_name, gate] : gates) {
    for (const auto& [beta_name, beta] : betas) {
      for (const auto& [keys_name, key] : keys) {
        add(cases, {.name = std::string(gate_name) + beta_name + keys_name, .T = 130, .HV = 4, .gate = gate, .beta = beta, .keys = key});
      }
    }
  }
  return cases;
}

std::vector<Case> similar_keys() {
  std::vector<Case> cases;
  const std::pair<const char*, Keys> keys[] = {{"Similar", Keys::similar}, {"Alike", Keys::alike}};
  const std::pair<const char*, Gate> gates[] = {{"Gate0", Gate::zero}, {"GatesRandom", Gate::random}};
  for (const auto& [keys_name, key] : keys) {
    for (const auto& [gate_name, gate] : gates) {
      for (const std::int64_t T : {15, 64, 190}) {
        add(cases, {.name = std::string(keys_name) + gate_name + "T" + number(T), .T = T, .HV = 8, .gate = gate, .keys = key});
      }
    }
  }
  return cases;
}

// Every pair of dtypes of the gates and of the states, in both layouts of the states.
std::vector<Case> dtypes() {
  std::vector<Case> cases;
  for (const DType gate : kNarrowAndWide) {
    for (const DType state : kNarrowAndWide) {
      for (const bool v_first : {false, true}) {
        add(cases, {.name = "Gates_" + short_name(gate) + "_States_" + short_name(state) + (v_first ? "_VFirst" : "_KFirst"),
                    .T = 90,
                    .HV = 4,
                    .cu_seqlens = {0, 20, 90},
                    .gate_dtype = gate,
                    .state_dtype = state,
                    .gate = Gate::in_kernel,
                    .beta = Beta::sigmoid,
                    .state_v_first = v_first});
      }
    }
  }
  return cases;
}

// Every seventh of the cases with so many heads that none is taken as two halves.
std::vector<Case> with_many_heads(std::vector<Case> cases) {
  std::vector<Case> many;
  for (std::size_t i = 0; i < cases.size(); i += 7) {
    Case c = std::move(cases[i]);
    const std::int64_t sequences = c.cu_seqlens.empty() ? c.B : static_cast<std::int64_t>(c.cu_seqlens.size()) - 1;
    const std::int64_t times = 70 / std::max<std::int64_t>(1, sequences * c.HV) + 1;
    c.H *= times, c.HV *= times;
    many.push_back(std::move(c));
  }
  return many;
}

// fp16: strong gates behind the last key that is not zero leave a state of small numbers.
std::vector<Case> small_writes() {
  std::vector<Case> cases;
  for (const bool l2norm : {false, true}) {
    add(cases, {.name = l2norm ? "Normed" : "Plain", .T = 64, .HV = 8, .gate = Gate::steady, .keys = Keys::ended, .l2norm = l2norm});
  }
  return cases;
}

std::string name_of(const ::testing::TestParamInfo<Case>& param_info) { return param_info.param.name; }

class CudaContract : public GpuTest, public ::testing::WithParamInterface<Case> {};

TEST_P(CudaContract, Holds) { run_and_expect_contract(cuda_call(GetParam())); }

INSTANTIATE_TEST_SUITE_P(Lengths, CudaContract, ::testing::ValuesIn(lengths()), name_of);
INSTANTIATE_TEST_SUITE_P(Heads, CudaContract, ::testing::ValuesIn(heads()), name_of);
INSTANTIATE_TEST_SUITE_P(Packs, CudaContract, ::testing::ValuesIn(packs()), name_of);
INSTANTIATE_TEST_SUITE_P(Flags, CudaContract, ::testing::ValuesIn(flags()), name_of);
INSTANTIATE_TEST_SUITE_P(Values, CudaContract, ::testing::ValuesIn(values({{"UnitKeys", Keys::unit}, {"ZeroKeys", Keys::zero}})), name_of);
// Keys that are equal or nearly so make (I + L)^-1 large, and what is summed cancel: the hardest case for 16-bit operands.
INSTANTIATE_TEST_SUITE_P(CorrelatedKeys, CudaContract,
                         ::testing::ValuesIn(values({{"RepeatedKeys", Keys::repeated}, {"CloseKeys", Keys::close}})), name_of);
// Between those and unlike ones: where chunks begin to be taken token by token. Few tokens, whose mean error is not yet that of many.
INSTANTIATE_TEST_SUITE_P(SimilarKeys, CudaContract, ::testing::ValuesIn(similar_keys()), name_of);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaContract, ::testing::ValuesIn(dtypes()), name_of);
INSTANTIATE_TEST_SUITE_P(SmallWrites, CudaContract, ::testing::ValuesIn(small_writes()), name_of);
INSTANTIATE_TEST_SUITE_P(LengthsWhole, CudaContract, ::testing::ValuesIn(with_many_heads(lengths())), name_of);
INSTANTIATE_TEST_SUITE_P(HeadsWhole, CudaContract, ::testing::ValuesIn(with_many_heads(heads())), name_of);
INSTANTIATE_TEST_SUITE_P(PacksWhole, CudaContract, ::testing::ValuesIn(with_many_heads(packs())), name_of);
INSTANTIATE_TEST_SUITE_P(FlagsWhole, CudaContract, ::testing::ValuesIn(with_many_heads(flags())), name_of);
INSTANTIATE_TEST_SUITE_P(ValuesWhole, CudaContract,
                         ::testing::ValuesIn(with_many_heads(values({{"UnitKeys", Keys::unit}, {"RepeatedKeys", Keys::repeated}}))),
                         name_of);
INSTANTIATE_TEST_SUITE_P(DTypesWhole, CudaContract, ::testing::ValuesIn(with_many_heads(dtypes())), name_of);

// recurrent_forward is the same rule for a few tokens: decode.
class CudaDecode : public GpuTest, public ::testing::WithParamInterface<int> {};

TEST_P(CudaDecode, HoldsTheContractInAndOutOfPlace) {
  for (const DType dtype : kDTypes) {
    for (const DType state : kNarrowAndWide) {
      Call call = cuda_call({.name = "Decode",
                             .B = 5,
                             .T = GetParam(),
                             .H = 2,
                             .HV = 8,
                             .dtype = dtype,
                             .state_dtype = state,
                             .gate = Gate::in_kernel,
                             .beta = Beta::sigmoid,
                             .keys = Keys::raw,
                             .l2norm = true});
      const Tensors oracle = oracle_forward(call);
      const Tensors out_of_place = cuda_forward(call, Operation::recurrent_forward);
      expect_contract_recorded(call, out_of_place, oracle, "decode");
      call.in_place = true;
      expect_same_bits(cuda_forward(call, Operation::recurrent_forward), out_of_place, "in place");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, CudaDecode, ::testing::Values(1, 2, 3, 66),
                         [](const auto& param_info) { return "T" + std::to_string(param_info.param); });

}  // namespace
}  // namespace flashdelta::testing
