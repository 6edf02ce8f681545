// However sequences are cut into segments, the results are those of the whole: every mode and number of segments stays inside the contract.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <sstream>

#include "gpu/device_call.hpp"
#include "gpu/long_call.hpp"
#include "gpu/record.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

constexpr auto kAuto = FLASHDELTA_CONTEXT_PARALLEL_AUTO;
constexpr auto kExact = FLASHDELTA_CONTEXT_PARALLEL_EXACT;
constexpr auto kOff = FLASHDELTA_CONTEXT_PARALLEL_OFF;

// `off` comes first: it is what `exact` is held against. Of eleven chunks, 64 segments are one for every chunk.
const Cut kCuts[] = {{kOff}, {kAuto, 2}, {kAuto, 3}, {kAuto, 64}, {kExact, 5}, {kExact, 64}};
// Of long sequences, which the plan itself cuts too.
const Cut kLongCuts[] = {{kOff}, {kAuto}, {kExact}, {kAuto, 3}, {kAuto, 64}, {kExact, 2}, {kExact, 5}, {kExact, 16}, {kAuto, 0, true}};

std::string text(const Cut& cut) {
  std::ostringstream out;
  out << cut;
  return out.str();
}

// Two roundings of one call may stand on opposite sides of the truth. Where the uncut call is better than its kind, a quarter of the
// contract stands for its rounding: transitions are rounded even where the uncut call has nothing to round.
double twice_the_rounding(double error_of_off, double allowed) { return 2 * std::max(error_of_off, allowed / 4); }

// --- eleven chunks of one or two key heads, in calls of every flag, against the reference backend

struct Small {
  Case made_from;
  std::function<void(Call&)> change = nullptr;
};
std::ostream& operator<<(std::ostream& out, const Small& c) { return out << c.made_from; }

void multiply(HostTensor& tensor, double factor) {
  for (std::int64_t i = 0; i < tensor.size(); ++i) tensor.put(i, factor * tensor[i]);
}

// beta |k|^2 stays below 1, so that the state does not grow.
void lengthen_keys(Call& call, double length) {
  multiply(call.inputs["k"], length);
  if (length > 1) multiply(call.inputs["beta"], 1 / (length * length));
}

std::vector<Small> small_cases() {
  constexpr std::int64_t T = 700;
  const std::vector<std::int64_t> pack{3, 3, 70, 71, 134, 198, 263, 263, 900, 960};
  const std::vector<Small> lines = {
      {{.name = "Plain", .T = T, .H = 2, .HV = 4}},
      {{.name = "Gate0", .T = T, .HV = 2, .gate = Gate::zero}},
      {{.name = "GateMinus5", .T = T, .HV = 2}, [](Call& call) { call.inputs["g"].fill(-5); }},
      {{.name = "GateMinus1000", .T = T, .HV = 2, .gate = Gate::strong}},
      {{.name = "GateMinusInfinity", .T = T, .HV = 2, .gate = Gate::infinite}},
      {{.name = "GatesMixed", .T = T, .HV = 4, .gate = Gate::mixed}},
      {{.name = "GateBursts", .T = T, .HV = 2, .gate = Gate::bursts}},
      {{.name = "GateOneBurst", .T = T, .HV = 2, .gate = Gate::zero}, [](Call& call) { call.inputs["g"].part(1, 500, 503).fill(-50); }},
      {{.name = "GateForgetsInTheSecondHalf", .T = T, .HV = 2, .gate = Gate::zero},
       [](Call& call) { call.inputs["g"].part(1, T / 2, T).fill(-1); }},
      {{.name = "RawGateAndBetaNormed",
        .T = T,
        .HV = 2,
        .gate = Gate::in_kernel,
        .beta = Beta::sigmoid_twice,
        .keys = Keys::raw,
        .l2norm = true}},
      {{.name = "NoGateNoBetaNoState", .T = T, .HV = 2, .gate = Gate::absent, .beta = Beta::absent, .initial_state = false}},
      {{.name = "Beta0", .T = T, .HV = 2, .gate = Gate::zero, .beta = Beta::zero}},
      {{.name = "Beta1", .T = T, .HV = 2, .gate = Gate::zero, .beta = Beta::one}},
      {{.name = "Beta2", .T = T, .HV = 2, .gate = Gate::zero, .beta = Beta::two}},
      {{.name = "RepeatedKeys", .T = T, .HV = 2, .gate = Gate::zero, .keys = Keys::repeated}},
      {{.name = "RepeatedKeysBeta2", .T = T, .HV = 2, .beta = Beta::two, .keys = Keys::repeated}},
      {{.name = "CloseKeys", .T = T, .HV = 2, .gate = Gate::zero, .keys = Keys::close}},
      {{.name = "CloseKeysBeta2", .T = T, .HV = 2, .beta = Beta::two, .keys = Keys::close}},
      {{.name = "KeysOfLength0Point1", .T = T, .HV = 2}, [](Call& call) { lengthen_keys(call, 0.1); }},
      {{.name = "KeysOfLength8", .T = T, .HV = 2}, [](Call& call) { lengthen_keys(call, 8); }},
      // Each token multiplies what a key reads by up to 63; the gates hold it down all the same, and the bound says so.
      {{.name = "KeysOfLength8HeldDown", .T = T, .HV = 2, .beta = Beta::one},
       [](Call& call) {
         multiply(call.inputs["k"], 8);
         call.inputs["g"].fill(-5);
       }},
      {{.name = "StatesBf16VFirst", .T = T, .HV = 2, .state_dtype = DType::bf16, .state_v_first = true}},
      {{.name = "StatesFp16", .T = T, .HV = 2, .state_dtype = DType::f16, .gate = Gate::zero}},
      {{.name = "GatesBf16", .T = T, .HV = 2, .gate_dtype = DType::bf16}},
      {{.name = "InPlace", .T = T, .H = 2, .HV = 4, .gate = Gate::mixed}, [](Call& call) { call.in_place = true; }},
      {{.name = "Strided", .T = T, .HV = 2, .scale = 0.3},
       [](Call& call) {
         for (auto& [name, tensor] : call.inputs) tensor = tensor.with_layout(Layout::padded);
         call.layouts["o"] = Layout::padded;
         call.layouts["final_state"] = Layout::transposed;
       }},
      {{.name = "Packed", .T = 1000, .HV = 2, .cu_seqlens = pack, .int64_offsets = false}},
      {{.name = "PackedInPlaceGate0", .T = 1000, .HV = 2, .cu_seqlens = pack, .gate = Gate::zero},
       [](Call& call) { call.in_place = true; }},
      {{.name = "Rows", .B = 3, .T = 330, .H = 1, .HV = 3}},
  };
  std::vector<Small> cases;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (Small c : lines) {
      c.made_from.dtype = dtype;
      c.made_from.name += dtype == DType::bf16 ? "Bf16" : "Fp16";
      c.made_from.seed = cases.size() + 1;
      cases.push_back(std::move(c));
    }
  }
  return cases;
}

class CudaSegments : public GpuTest, public ::testing::WithParamInterface<Small> {};
INSTANTIATE_TEST_SUITE_P(, CudaSegments, ::testing::ValuesIn(small_cases()),
                         [](const auto& param_info) { return param_info.param.made_from.name; });

TEST_P(CudaSegments, HoldTheContractHoweverACallIsCut) {
  Call call = cuda_call(GetParam().made_from);
  if (GetParam().change) GetParam().change(call);
  const Tensors oracle = oracle_forward(call);
  const DType dtype = call.made_from.dtype;
  const std::pair<const char*, double> outputs[] = {{"o", contract(dtype).o}, {"final_state", contract(dtype).final_state}};
  Tensors uncut;
  std::map<std::string, double> allowed_difference, smallest;
  for (const Cut& cut : kCuts) {
    set_cut(call.options, cut);
    const Tensors got = cuda_forward(call);
    ASSERT_FALSE(got.empty()) << text(cut);
    if (cut.mode == kOff) expect_contract_recorded(call, got, oracle, text(cut));
    if (cut.mode != kOff) expect_contract(call, got, oracle, text(cut));
    for (const auto& [name, allowed] : outputs) {
      const HostTensor& x = got.at(name);
      if (cut.mode == kOff) {
        const double stored = rounding(x.dtype()) > rounding(dtype) ? 2 * rounding(x.dtype()) : 0;
        smallest[name] = underflow(x.dtype()) * std::sqrt(static_cast<double>(x.size())) / allowed;
        allowed_difference[name] = twice_the_rounding(relative_error(x, oracle.at(name), smallest[name]), allowed) + stored;
      } else if (cut.mode == kExact) {
        EXPECT_LE(relative_error(x, uncut.at(name), smallest[name]), allowed_difference[name])
            << name << ", against the uncut call; " << call.made_from << ' ' << text(cut);
      }
    }
    if (cut.mode == kOff) uncut = got;
  }
}

// --- long sequences of few heads, where the plan itself cuts, against the oracle on the GPU

// Lengths 1..65, each once, among two long ones; tokens of nobody at both ends.
std::vector<std::int64_t> short_among_long() {
  std::vector<std::int64_t> offsets{10, 1510};
  for (std::int64_t length = 1; length <= 65; ++length) offsets.push_back(offsets.back() + length * 29 % 66);
  offsets.push_back(offsets.back() + 1501);
  return offsets;
}

const LongCase kLong[] = {
    {.name = "Heads8Row1Of8192", .T = 8192, .H = 2, .HV = 8},
    {.name = "Heads8Row1Of8192Fp16", .T = 8192, .H = 2, .HV = 8, .dtype = DType::f16},
    {.name = "Gate0", .T = 8192, .gates = Gates::zero},
    {.name = "Gate0Fp16", .T = 8192, .dtype = DType::f16, .gates = Gates::zero},
    {.name = "GateMinus5", .T = 8192, .gates = Gates::minus_5},
    {.name = "GateMinus1000", .T = 4000, .gates = Gates::minus_1000},
    {.name = "Gate0For10000TokensThenABurst", .T = 12000, .gates = Gates::burst},
    {.name = "GateInTurns", .T = 8192, .gates = Gates::turns},
    {.name = "GateInTurnsFp16", .T = 8192, .dtype = DType::f16, .gates = Gates::turns},
    {.name = "RawGateAndBetaNormed", .T = 5000, .gates = Gates::raw, .beta = Strength::raw, .key_length = 3, .l2norm = true},
    {.name = "Rows2Of3000", .B = 2, .T = 3000, .H = 2, .HV = 4, .dtype = DType::f16},
    {.name = "Rows3Of1000", .B = 3, .T = 1000, .H = 1, .HV = 3, .gates = Gates::zero},
    {.name = "Uneven28672And4096", .T = 32768, .cu_seqlens = {0, 28672, 32768}, .gates = Gates::turns},
    {.name = "ShortAmongLong", .T = 5200, .cu_seqlens = short_among_long()},
    {.name = "ShortAmongLongGate0", .T = 5200, .cu_seqlens = short_among_long(), .gates = Gates::zero},
    {.name = "EmptySequencesAndTokensOfNobody", .T = 8000, .cu_seqlens = {100, 100, 3100, 3100, 3100, 6000, 6001, 7900, 7900}},
    {.name = "Beta0To2Gate0", .T = 4000, .gates = Gates::zero, .beta = Strength::twice_sigmoid},
    {.name = "Beta0", .T = 4000, .gates = Gates::zero, .beta = Strength::zero},
    {.name = "Beta2", .T = 4000, .gates = Gates::turns, .beta = Strength::two},
    {.name = "RepeatedKeys", .T = 4000, .gates = Gates::turns, .beta = Strength::one, .key_cosine = 1},
    {.name = "CloseKeys", .T = 4000, .gates = Gates::turns, .key_cosine = 0.99},
    {.name = "CloseKeysGate0Fp16", .T = 4000, .dtype = DType::f16, .gates = Gates::zero, .key_cosine = 0.99},
    {.name = "Beta0To2SimilarKeysGate0", .T = 4000, .gates = Gates::zero, .beta = Strength::twice_sigmoid, .key_cosine = 0.3},
    {.name = "Beta0To2SimilarKeysGate0Fp16",
     .T = 4000,
     .dtype = DType::f16,
     .gates = Gates::zero,
     .beta = Strength::twice_sigmoid,
     .key_cosine = 0.3},
    {.name = "Beta0To2CloserKeysGate0", .T = 4000, .gates = Gates::zero, .beta = Strength::twice_sigmoid, .key_cosine = 0.5},
    {.name = "Beta0To2CloserKeysGate0Fp16",
     .T = 4000,
     .dtype = DType::f16,
     .gates = Gates::zero,
     .beta = Strength::twice_sigmoid,
     .key_cosine = 0.5},
    {.name = "Beta1Gate0", .T = 4000, .gates = Gates::zero, .beta = Strength::one},
    {.name = "ReflectsOneKeyOfEight", .T = 4096, .gates = Gates::zero, .beta = Strength::eighth_two, .key_period = 8},
    {.name = "ReflectsOneKeyOfEightFp16",
     .T = 4096,
     .dtype = DType::f16,
     .gates = Gates::zero,
     .beta = Strength::eighth_two,
     .key_period = 8},
    {.name = "ReflectsOneKeyOfSixteen", .T = 4096, .gates = Gates::zero, .beta = Strength::eighth_two, .key_period = 16},
    {.name = "ReflectsOneKeyOfSixteenFp16",
     .T = 4096,
     .dtype = DType::f16,
     .gates = Gates::zero,
     .beta = Strength::eighth_two,
     .key_period = 16},
    {.name = "KeysOfLength0Point1", .T = 4000, .key_length = 0.1},
    {.name = "KeysOfLength8", .T = 4000, .gates = Gates::turns, .key_length = 8},
    {.name = "KeysOfLength8HeldDown", .T = 4000, .gates = Gates::minus_5, .beta = Strength::one, .key_length = 8, .beta_by_length = false},
    {.name = "NoInitialState", .T = 6000, .H = 1, .HV = 4, .initial_state = false},
    {.name = "InPlace", .T = 6000, .H = 1, .HV = 4, .in_place = true},
    {.name = "InPlacePacked", .T = 6000, .cu_seqlens = {0, 2500, 2500, 6000}, .gates = Gates::zero, .in_place = true},
    {.name = "StatesBf16VFirst", .T = 6000, .v_first = true, .state = DType::bf16},
};

class CudaLongSegments : public GpuTest, public ::testing::WithParamInterface<LongCase> {};
INSTANTIATE_TEST_SUITE_P(, CudaLongSegments, ::testing::ValuesIn(kLong), [](const auto& param_info) { return param_info.param.name; });

TEST_P(CudaLongSegments, HoldTheContractHoweverACallIsCut) {
  const LongCase& c = GetParam();
  LongCall call(c);
  std::optional<Results> uncut;
  DeviceErrors of_uncut;
  for (const Cut& cut : kLongCuts) {
    call.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(call.run()) << text(cut);
    const DeviceErrors errors = call.expect_contract(text(cut));
    if (cut.mode == kOff) uncut.emplace(call), of_uncut = errors;
    if (cut.mode != kExact) continue;
    const double stored = rounding(c.state) > rounding(c.dtype) ? 2 * rounding(c.state) : 0;
    EXPECT_LE(relative_difference(call.tensor("o"), uncut->o()), twice_the_rounding(of_uncut.o, contract(c.dtype).o)) << text(cut);
    EXPECT_LE(relative_difference(call.tensor("final_state"), uncut->final_state()),
              twice_the_rounding(of_uncut.final_state, contract(c.dtype).final_state) + stored)
        << text(cut);
  }
}

// One key, always with beta 2, and next to no gates: nothing is forgotten, and what is rounded of the key's length, or of a gate, is the
// same at each token. So is what a scan rounds of the same transition, segment for segment: exact differs from off by more than these err.
const LongCase kReflections[] = {
    {.name = "ReflectionsByOneKey",
     .T = 8192,
     .gates = Gates::zero,
     .beta = Strength::two,
     .key_length = 3,
     .key_cosine = 1,
     .beta_by_length = false,
     .l2norm = true},
    {.name = "ReflectionsByOneKeyFp16",
     .T = 8192,
     .dtype = DType::f16,
     .gates = Gates::zero,
     .beta = Strength::two,
     .key_length = 3,
     .key_cosine = 1,
     .beta_by_length = false,
     .l2norm = true},
    {.name = "ReflectionsByOneKeySlightGatesFp16",
     .T = 8192,
     .dtype = DType::f16,
     .gates = Gates::slight,
     .beta = Strength::two,
     .key_length = 3,
     .key_cosine = 1,
     .beta_by_length = false,
     .l2norm = true},
    {.name = "ReflectionsByOneUnitKeyFp16", .T = 8192, .dtype = DType::f16, .gates = Gates::slight, .beta = Strength::two, .key_cosine = 1},
};

class CudaLongReflections : public GpuTest, public ::testing::WithParamInterface<LongCase> {};
INSTANTIATE_TEST_SUITE_P(, CudaLongReflections, ::testing::ValuesIn(kReflections),
                         [](const auto& param_info) { return param_info.param.name; });

TEST_P(CudaLongReflections, HoldTheContractHoweverACallIsCut) {
  LongCall call(GetParam());
  for (const Cut& cut : kLongCuts) {
    call.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(call.run()) << text(cut);
    call.expect_contract(text(cut));
  }
}

// Calls so large that the plan looks at more: pairs that are cut at the same places as others of their key head, pairs on lines of their
// own, and pairs without gates as two halves among them, or cut late (those two, and GangsOfTwoAndOthers).
const LongCase kLarge[] = {
    {.name = "HalvesAmongGangsOfThree", .T = 8192, .H = 16, .HV = 64, .cu_seqlens = {0, 6144, 8192}},
    {.name = "HalvesShortestFirst", .T = 8192, .H = 16, .HV = 64, .cu_seqlens = {0, 1000, 1065, 2100, 8192}, .gates = Gates::turns},
    {.name = "GangsOfTwoAndOthers", .T = 16384, .H = 16, .HV = 48},
    {.name = "GangsOfTwoFp16", .T = 12288, .H = 16, .HV = 32, .dtype = DType::f16},
    {.name = "GangsOfFourPackedInPlace",
     .T = 12300,
     .H = 8,
     .HV = 32,
     .cu_seqlens = {0, 1, 66, 66, 9000, 12290},
     .gates = Gates::minus_5,
     .in_place = true},
    {.name = "LateInPlace", .T = 8192, .H = 12, .HV = 48, .cu_seqlens = {0, 6144, 8192}, .in_place = true},
    {.name = "LateWhole", .T = 9470, .H = 10, .HV = 40, .cu_seqlens = {0, 8190, 9470}, .dtype = DType::f16},
    {.name = "GangsOfFourOfTen", .T = 20480, .H = 4, .HV = 40, .gates = Gates::minus_5},
};

class CudaLargeSegments : public GpuTest, public ::testing::WithParamInterface<LongCase> {};
INSTANTIATE_TEST_SUITE_P(, CudaLargeSegments, ::testing::ValuesIn(kLarge), [](const auto& param_info) { return param_info.param.name; });

TEST_P(CudaLargeSegments, HoldTheContractHoweverACallIsCut) {
  LongCall call(GetParam());
  for (const Cut& cut : {Cut{kOff}, Cut{kAuto}, Cut{kExact}}) {
    call.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(call.run()) << text(cut);
    call.expect_contract(text(cut));
    const Results first(call);
    ASSERT_NO_FATAL_FAILURE(call.run());
    first.expect_same_bits(call, text(cut));
  }
}

// --- a million tokens

flashdelta_forward_args with_tokens(const flashdelta_forward_args& args, std::deque<Part>& parts, std::int64_t begin, std::int64_t end) {
  flashdelta_forward_args some = args;
  const auto part = [&](const DLTensor* of) { return parts.emplace_back(*of, 1, begin, end).dl(); };
  some.q = part(args.q), some.k = part(args.k), some.v = part(args.v), some.g = part(args.g), some.beta = part(args.beta);
  some.o = part(args.o);
  return some;
}

// The oracle does not go over all of it: it goes on from the state that an uncut call over the tokens before has left. That state's own
// rounding is forgotten within the first thousand of the last tokens (a unit key with beta = 1/2 removes 1/256 of an average direction).
class CudaMillion : public GpuTest {};

TEST_F(CudaMillion, TokensEndAsTheOracleSays) {
  constexpr std::int64_t kTokens = 1 << 20, kLast = 16384, kFirst = 8192;
  LongCall call({.name = "Million", .T = kTokens, .H = 1, .HV = 4}, {kOff});
  Array before(DType::f32, {1, 4, 128, 128});
  std::deque<Part> parts;
  {
    flashdelta_forward_args first = with_tokens(call.args(), parts, 0, kTokens - kLast);
    first.final_state = before.dl();
    std::size_t bytes = 0;
    ASSERT_EQ(flashdelta_chunk_forward_workspace_size(&first, &bytes), FLASHDELTA_OK) << flashdelta_last_error();
    const DeviceBuffer workspace(bytes, kNaNByte);
    first.workspace = workspace.data();
    first.workspace_size = bytes;
    ASSERT_EQ(flashdelta_chunk_forward(&first), FLASHDELTA_OK) << flashdelta_last_error();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  flashdelta_forward_args last = with_tokens(call.args(), parts, kTokens - kLast, kTokens);
  last.initial_state = before.dl();
  std::optional<Results> uncut;
  for (const Cut& cut : {Cut{kOff}, Cut{kAuto}, Cut{kExact}, Cut{kAuto, 64}, Cut{kAuto, 0, true}}) {
    call.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(call.run()) << text(cut);
    const Contract allowed = contract(DType::bf16);
    const DeviceErrors at_the_end = device_errors(last), at_the_start = device_errors(call.args(), kFirst);
    EXPECT_GT(at_the_end.o_norm, 0);
    EXPECT_LE(at_the_end.o, allowed.o) << text(cut);
    EXPECT_LE(at_the_end.final_state, allowed.final_state) << text(cut);
    EXPECT_LE(at_the_start.o, allowed.o) << text(cut);
    EXPECT_EQ(count_not_finite(call.tensor("o")), 0) << text(cut);
    test::record_error("o_bf16", std::max(at_the_end.o, at_the_start.o));
    test::record_error("final_state_bf16", at_the_end.final_state);
    if (cut.mode == kOff) uncut.emplace(call);
    EXPECT_LE(relative_difference(call.tensor("o"), uncut->o()), twice_the_rounding(at_the_end.o, allowed.o)) << text(cut);
  }
}

}  // namespace
}  // namespace flashdelta::testing
