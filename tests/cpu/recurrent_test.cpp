// Decode: the same rule token by token.
#include <gtest/gtest.h>

#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

class CpuRecurrent : public ::testing::TestWithParam<int> {
 protected:
  static Case decode(DType dtype, bool v_first) {
    return {.name = "Decode", .T = GetParam(), .H = 2, .HV = 4, .K = 40, .V = 24, .dtype = dtype, .state_v_first = v_first};
  }
};

TEST_P(CpuRecurrent, HoldsTheContractInPlaceAndOutOfPlace) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const DType state : {DType::f32, dtype}) {
      for (const bool v_first : {false, true}) {
        Case c = decode(dtype, v_first);
        c.B = 3;
        c.state_dtype = state;
        Call call = make_call(c);
        const Tensors out = recurrent_forward(call);
        expect_contract(call, out);
        Call in_place = call;
        in_place.in_place = true;
        expect_same_bits(recurrent_forward(in_place), out);
      }
    }
  }
}

TEST_P(CpuRecurrent, TheScheduleOfBenchmarksHoldsTheContractToo) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool v_first : {false, true}) {
      Case c = decode(dtype, v_first);
      c.gate = Gate::in_kernel;
      c.beta = Beta::sigmoid;
      c.l2norm = true;
      Call call = make_call(c);
      expect_contract(call, separate_passes_forward(call));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, CpuRecurrent, ::testing::Values(0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 100),
                         [](const auto& param_info) { return "Tokens" + std::to_string(param_info.param); });

TEST(CpuRecurrentOnce, TakesEveryWidth) {
  for (const std::int64_t K : {1, 3, 16, 17, 100, 128, 256}) {
    for (const std::int64_t V : {1, 3, 16, 17, 100, 128, 256}) {
      for (const bool v_first : {false, true}) {
        Call call = make_call({.name = "Widths", .T = 2, .K = K, .V = V, .state_v_first = v_first});
        expect_contract(call, recurrent_forward(call));
      }
    }
  }
}

TEST(CpuRecurrentOnce, MixesFp32KeysWith16BitValues) {
  for (const DType v : {DType::bf16, DType::f16}) {
    for (const std::int64_t T : {1, 5, 16}) {
      Call call = make_call({.name = "Mixed", .B = 2, .T = T, .H = 2, .HV = 4, .K = 40, .V = 24, .dtype = DType::f32, .v_dtype = v});
      const Tensors out = recurrent_forward(call);
      EXPECT_EQ(out.at("o").dtype(), v);
      expect_contract(call, out);
    }
  }
}

TEST(CpuRecurrentOnce, TakesEveryFlagTheChunkedCallTakes) {
  for (const Gate gate : {Gate::absent, Gate::random, Gate::in_kernel, Gate::mixed, Gate::infinite}) {
    for (const Beta beta : {Beta::absent, Beta::zero, Beta::two, Beta::sigmoid, Beta::sigmoid_twice}) {
      for (const bool l2norm : {false, true}) {
        Call call = make_call({.name = "Flags",
                               .T = 6,
                               .H = 2,
                               .HV = 4,
                               .gate = gate,
                               .beta = beta,
                               .keys = l2norm ? Keys::raw : Keys::unit,
                               .l2norm = l2norm,
                               .scale = 0.4});
        expect_contract(call, recurrent_forward(call));
      }
    }
  }
}

TEST(CpuRecurrentOnce, PacksSequencesOfDifferentLengthsWithGaps) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Call call = make_call({.name = "Pack", .T = 40, .HV = 3, .cu_seqlens = {2, 3, 3, 7, 23, 30}, .dtype = dtype});
    const Tensors out = recurrent_forward(call);
    expect_contract(call, out);
    for (const double value : out.at("o").slice(1, 30, 40).values()) EXPECT_EQ(value, 0);
    EXPECT_EQ(out.at("final_state").slice(0, 1, 2).bits(), call.inputs["initial_state"].slice(0, 1, 2).bits());
  }
}

TEST(CpuRecurrentOnce, StartsFromZeroWithoutAState) {
  Call call = make_call({.name = "NoState", .T = 5, .initial_state = false});
  expect_contract(call, recurrent_forward(call));
}

TEST(CpuRecurrentOnce, ThreadsDoNotShowInTheBits) {
  Call call = make_call({.name = "Threads", .B = 4, .T = 3, .H = 2, .HV = 4});
  call.options.num_threads = 1;
  const Tensors one = recurrent_forward(call);
  for (const int threads : {2, 5, 64}) {
    call.options.num_threads = threads;
    expect_same_bits(recurrent_forward(call), one);
  }
}

TEST(CpuRecurrentOnce, TokensOneAtATimeGiveTheBitsOfOneCall) {
  Call call = make_call({.name = "Steps", .B = 2, .T = 6, .HV = 2});
  const Tensors whole = recurrent_forward(call);
  Tensors last;
  HostTensor state = call.inputs["initial_state"];
  for (std::int64_t t = 0; t < 6; ++t) {
    Call step = tokens_of(call, t, t + 1);
    step.inputs["initial_state"] = state;
    last = recurrent_forward(step);
    state = last.at("final_state");
    EXPECT_TRUE(last.at("o").bits() == whole.at("o").slice(1, t, t + 1).bits()) << "token " << t;
  }
  EXPECT_TRUE(state.bits() == whole.at("final_state").bits());
}

TEST(CpuRecurrentOnce, ContinuesAChunkedPrefill) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call whole = make_call({.name = "Prefill", .B = 2, .T = 155, .H = 2, .HV = 4, .K = 40, .V = 24, .dtype = dtype});
    const Tensors expected = oracle_forward(whole);
    Call prefill = tokens_of(whole, 0, 150);
    Call decode = tokens_of(whole, 150, 155);
    decode.inputs["initial_state"] = chunk_forward(prefill).at("final_state");
    expect_contract(decode, recurrent_forward(decode));
    const Tensors out = recurrent_forward(decode);
    const double allowed = dtype == DType::f32 ? 1e-5 : dtype == DType::bf16 ? 5e-3 : 1e-3;
    EXPECT_LE(relative_error(out.at("o"), expected.at("o").slice(1, 150, 155)), allowed);
    EXPECT_LE(relative_error(out.at("final_state"), expected.at("final_state")), allowed);
  }
}

TEST(CpuRecurrentOnce, AgreesWithTheChunkedCallOnLongInput) {
  Call call = make_call({.name = "Long", .T = 300, .HV = 2, .K = 40, .V = 24});
  const Tensors tokens = recurrent_forward(call);
  const Tensors chunks = chunk_forward(call);
  for (const char* name : {"o", "final_state"}) EXPECT_LE(relative_error(tokens.at(name), chunks.at(name)), 2e-5) << name;
}

}  // namespace
}  // namespace flashdelta::testing
