// Values and sizes at the edge of what a call may hold.
#include <gtest/gtest.h>

#include <cmath>

#include "gpu/device_call.hpp"
#include "support/random.hpp"

namespace flashdelta::testing {
namespace {

constexpr DType kDTypes[] = {DType::bf16, DType::f16};

void multiply(HostTensor& tensor, double factor) {
  for (std::int64_t i = 0; i < tensor.size(); ++i) tensor.put(i, factor * tensor[i]);
}

class CudaEdges : public GpuTest, public ::testing::WithParamInterface<DType> {};
INSTANTIATE_TEST_SUITE_P(, CudaEdges, ::testing::ValuesIn(kDTypes), [](const auto& param_info) { return short_name(param_info.param); });

TEST_P(CudaEdges, ScaleOfZeroGivesZeroOutputAndAnUnchangedState) {
  Call call = cuda_call({.name = "Scale", .T = 100, .HV = 2, .dtype = GetParam(), .scale = 1});
  const Tensors with_scale = run_and_expect_contract(call);
  call.options.scale = 0;
  const Tensors without = run_and_expect_contract(call);
  ASSERT_FALSE(without.empty());
  for (const double value : without.at("o").values()) ASSERT_EQ(value, 0);
  EXPECT_TRUE(without.at("final_state").bits() == with_scale.at("final_state").bits());
}

TEST_P(CudaEdges, ScalesOfEverySizeAreHonoured) {
  for (const double scale : {-1.0, 0.3, 1.0, 40.0}) {
    run_and_expect_contract(cuda_call({.name = "Scale", .T = 100, .HV = 2, .dtype = GetParam(), .scale = scale}), std::to_string(scale));
  }
}

TEST_P(CudaEdges, LargeQueriesAreTakenAsTheyAre) {
  Call call = cuda_call({.name = "LargeQ", .T = 90, .HV = 2, .dtype = GetParam()});
  multiply(call.inputs["q"], 50);
  run_and_expect_contract(call);
}

// A step of beta |k|^2 in (0, 1) contracts the state whatever the norm: what large keys cost must be range, not stability.
TEST_P(CudaEdges, KeysNeedNotBeNormalised) {
  for (const double norm : {0.01, 0.3, 1.0, 5.0, 30.0}) {
    Call call = cuda_call({.name = "KeyNorm", .T = 150, .H = 2, .HV = 4, .dtype = GetParam()});
    multiply(call.inputs["k"], norm);
    if (norm > 1) multiply(call.inputs["beta"], 1 / (norm * norm));
    run_and_expect_contract(call, "|k| = " + std::to_string(norm));
  }
}

// |k|^2 = 90000 is beyond fp16's largest number, 65504, though every element of k is small.
TEST_P(CudaEdges, SquaredKeyNormsBeyondTheRangeOfFp16) {
  for (const bool l2norm : {false, true}) {
    Call call = cuda_call({.name = "HugeKeys", .T = 150, .H = 1, .HV = 2, .dtype = GetParam(), .l2norm = l2norm});
    multiply(call.inputs["k"], 300);
    if (!l2norm) multiply(call.inputs["beta"], 1 / 90000.0);
    run_and_expect_contract(call, l2norm ? "normalised" : "as they are");
  }
}

// Down to where the epsilon inside the root decides.
TEST_P(CudaEdges, NormalisesVectorsOfEverySize) {
  for (const double size : {1e-4, 1e-3, 1.0, 1e3}) {
    Call call = cuda_call({.name = "Sizes", .T = 70, .HV = 2, .dtype = GetParam(), .keys = Keys::raw, .l2norm = true});
    for (const char* name : {"q", "k"}) multiply(call.inputs[name], size);
    run_and_expect_contract(call, "size " + std::to_string(size));
  }
}

TEST_P(CudaEdges, ZeroVectorsUnderL2NormStayZero) {
  Call call = cuda_call({.name = "Zeros", .T = 70, .HV = 2, .dtype = GetParam(), .keys = Keys::zero, .l2norm = true});
  call.inputs["q"].fill(0);
  const Tensors out = run_and_expect_contract(call);
  ASSERT_FALSE(out.empty());
  for (const double value : out.at("o").values()) ASSERT_EQ(value, 0);
}

TEST_P(CudaEdges, RawGatesOfEverySizeDoNotOverflowSoftplus) {
  for (const bool with_bias : {false, true}) {
    for (const double size : {1.0, 30.0, 300.0}) {
      Call call = cuda_call({.name = "RawGates", .T = 100, .HV = 4, .dtype = GetParam(), .gate = Gate::in_kernel, .dt_bias = with_bias});
      multiply(call.inputs["g"], size);
      call.inputs["A_log"].assign({-6, -2, 0, 3});
      run_and_expect_contract(call, "size " + std::to_string(size));
    }
  }
}

// There `prepare` looks at the gates of all chunks first, two at a time; CTAs with an odd number of them have a last one alone.
TEST_P(CudaEdges, RawGatesOfCallsThatMayBeWorthACut) {
  for (const std::int64_t group : {1, 2, 3, 4, 5}) {
    for (const bool with_bias : {false, true}) {
      run_and_expect_contract(cuda_call(
          {.name = "RawGates", .T = 1435, .H = 1, .HV = group, .dtype = GetParam(), .gate = Gate::in_kernel, .dt_bias = with_bias}));
    }
  }
}

TEST_P(CudaEdges, LogitsOfEverySizeGiveBetasFromZeroToTwo) {
  for (const Beta kind : {Beta::sigmoid, Beta::sigmoid_twice}) {
    for (const double size : {1.0, 20.0, 200.0}) {
      Call call = cuda_call({.name = "Logits", .T = 100, .HV = 2, .dtype = GetParam(), .beta = kind});
      multiply(call.inputs["beta"], size);
      run_and_expect_contract(call, "size " + std::to_string(size));
    }
  }
}

TEST_P(CudaEdges, BetasBetweenZeroAndTwo) {
  for (const Keys keys : {Keys::unit, Keys::close, Keys::repeated}) {
    Call call = cuda_call({.name = "Betas", .T = 200, .HV = 4, .dtype = GetParam(), .keys = keys});
    Random random(3);
    HostTensor& beta = call.inputs["beta"];
    for (std::int64_t i = 0; i < beta.size(); ++i) beta.put(i, 2 * random.uniform());
    run_and_expect_contract(call, "keys " + std::to_string(static_cast<int>(keys)));
  }
}

// One token of -inf among ordinary ones: what is forgotten must not come back, and nothing of inf - inf may show.
TEST_P(CudaEdges, ASingleGateOfMinusInfinityAnywhereInAChunk) {
  for (const std::int64_t t : {0, 1, 15, 16, 62, 63, 64, 99}) {
    Call call = cuda_call({.name = "Forget", .T = 100, .HV = 2, .dtype = GetParam()});
    call.inputs["g"].part(1, t, t + 1).fill(-INFINITY);
    run_and_expect_contract(call, "at token " + std::to_string(t));
  }
}

TEST_P(CudaEdges, StrongAndAbsentForgettingSideBySide) {
  Call call = cuda_call({.name = "SideBySide", .T = 300, .H = 2, .HV = 8, .dtype = GetParam()});
  const double gates[] = {0, -1000, -INFINITY, -1e-6, -0.5, -20, -88, -1e30};
  for (std::int64_t head = 0; head < 8; ++head) call.inputs["g"].part(2, head, head + 1).fill(gates[head]);
  run_and_expect_contract(call);
}

TEST_P(CudaEdges, StatesOfEverySize) {
  for (const double size : {0.0, 1e-3, 30.0, 1000.0}) {
    Call call = cuda_call({.name = "States", .T = 100, .HV = 2, .dtype = GetParam()});
    multiply(call.inputs["initial_state"], size);
    run_and_expect_contract(call, "size " + std::to_string(size));
  }
}

TEST_P(CudaEdges, EitherStateMayBeAbsent) {
  for (const bool initial : {false, true}) {
    for (const bool final : {false, true}) {
      Call call =
          cuda_call({.name = "States", .T = 130, .HV = 4, .cu_seqlens = {0, 0, 70, 130}, .dtype = GetParam(), .initial_state = initial});
      if (!final) call.unwanted.insert("final_state");
      run_and_expect_contract(call);
    }
  }
}

TEST_P(CudaEdges, EmptySequencesLeaveTheirStateUntouched) {
  Call call = cuda_call({.name = "Empty", .T = 70, .HV = 4, .cu_seqlens = {3, 3, 3, 40, 40, 70, 70}, .dtype = GetParam()});
  const Tensors out = run_and_expect_contract(call);
  ASSERT_FALSE(out.empty());
  for (const std::int64_t n : {0, 1, 3, 5}) {
    EXPECT_TRUE(out.at("final_state").slice(0, n, n + 1).bits() == call.inputs["initial_state"].slice(0, n, n + 1).bits()) << n;
  }
}

TEST_P(CudaEdges, NoTokensAndNoRowsAreLegal) {
  for (const bool packed : {false, true}) {
    Case c{.name = "NoTokens", .B = packed ? 1 : 3, .T = 0, .HV = 2, .dtype = GetParam()};
    if (packed) c.cu_seqlens = {0, 0, 0};
    const Call call = cuda_call(c);
    const Tensors out = run_and_expect_contract(call);
    ASSERT_FALSE(out.empty());
    EXPECT_TRUE(out.at("final_state").bits() == call.inputs.at("initial_state").bits());
  }
  run_and_expect_contract(cuda_call({.name = "NoRows", .B = 0, .T = 10, .HV = 2, .dtype = GetParam()}));
  run_and_expect_contract(cuda_call({.name = "NoSequences", .T = 0, .HV = 2, .cu_seqlens = {0}, .dtype = GetParam()}));
}

}  // namespace
}  // namespace flashdelta::testing
