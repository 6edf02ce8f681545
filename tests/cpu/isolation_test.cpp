// What one sequence, one head, one call holds never shows in another.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

constexpr double kBad[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()};
const Case kPacked{.name = "Packed", .T = 230, .H = 2, .HV = 4, .K = 24, .V = 40, .cu_seqlens = {4, 44, 120, 120, 211}};

Case with_dtype(Case c, DType dtype) {
  c.dtype = dtype;
  return c;
}

bool is_state(const std::string& name) { return name.ends_with("_state"); }

TEST(CpuIsolation, ANaNOrInfInOneSequenceStaysThere) {
  constexpr std::int64_t kSick = 1;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call clean = make_call(with_dtype(kPacked, dtype));
    const Tensors expected = forward_and_backward(clean);
    for (const auto& [name, unused] : clean.inputs) {
      for (const double bad : kBad) {
        Call sick = clean;
        HostTensor& tensor = sick.inputs[name];
        (is_state(name) ? tensor.part(0, kSick, kSick + 1) : tensor.part(1, 44, 120)).fill(bad);
        const Tensors out = forward_and_backward(sick);
        for (const std::int64_t n : {0, 2, 3}) {
          expect_same_bits(results_of_sequence(clean, out, n), results_of_sequence(clean, expected, n), name + " of sequence 1 is bad");
        }
      }
    }
  }
}

TEST(CpuIsolation, ASingleBadTokenStaysInItsSequence) {
  Call clean = make_call(kPacked);
  const Tensors expected = forward_and_backward(clean);
  for (const std::int64_t t : {44, 64, 119}) {
    for (const char* name : {"q", "k", "v", "g", "beta", "d_o"}) {
      Call sick = clean;
      sick.inputs[name].part(1, t, t + 1).fill(kBad[0]);
      const Tensors out = forward_and_backward(sick);
      for (const std::int64_t n : {0, 2, 3}) {
        expect_same_bits(results_of_sequence(clean, out, n), results_of_sequence(clean, expected, n), name);
      }
    }
  }
}

TEST(CpuIsolation, TokensOfNoSequenceAreNeverReadAndGiveZeroRows) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call clean = make_call(with_dtype(kPacked, dtype));
    const Tensors expected = results_only(forward_and_backward(clean));
    for (const double bad : kBad) {
      Call sick = clean;
      for (auto& [name, tensor] : sick.inputs) {
        if (is_state(name)) continue;
        tensor.part(1, 0, 4).fill(bad);
        tensor.part(1, 211, 230).fill(bad);
      }
      const Tensors out = results_only(forward_and_backward(sick));
      expect_same_bits(out, expected);
      for (const auto& [name, tensor] : out) {
        if (is_state(name)) continue;
        for (const double value : tensor.slice(1, 0, 4).values()) ASSERT_EQ(value, 0) << name;
        for (const double value : tensor.slice(1, 211, 230).values()) ASSERT_EQ(value, 0) << name;
      }
    }
  }
}

// Results of value head `head`, and of its key head `key_head` where `whole_group`.
Tensors results_of_head(const Tensors& results, std::int64_t head, std::int64_t key_head, bool whole_group) {
  Tensors parts;
  for (const char* name : {"o", "dv", "dg", "dbeta"}) parts[name] = results.at(name).slice(2, head, head + 1);
  for (const char* name : {"final_state", "d_initial_state"}) parts[name] = results.at(name).slice(1, head, head + 1);
  if (whole_group) {
    for (const char* name : {"dq", "dk"}) parts[name] = results.at(name).slice(2, key_head, key_head + 1);
  }
  return parts;
}

TEST(CpuIsolation, ANaNOrInfInOneValueHeadStaysThere) {
  constexpr std::int64_t kSick = 1;  // shares key head 0 with value head 0
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Call clean = make_call(with_dtype(kPacked, dtype));
    const Tensors expected = forward_and_backward(clean);
    for (const char* name : {"v", "g", "beta", "initial_state", "d_o", "d_final_state"}) {
      for (const double bad : kBad) {
        Call sick = clean;
        sick.inputs[name].part(is_state(name) ? 1 : 2, kSick, kSick + 1).fill(bad);
        const Tensors out = forward_and_backward(sick);
        for (const std::int64_t head : {0, 2, 3}) {
          expect_same_bits(results_of_head(out, head, head / 2, head >= 2), results_of_head(expected, head, head / 2, head >= 2), name);
        }
      }
    }
  }
}

TEST(CpuIsolation, ANaNOrInfInOneKeyHeadStaysInItsGroup) {
  Call clean = make_call(kPacked);
  const Tensors expected = forward_and_backward(clean);
  for (const char* name : {"q", "k"}) {
    for (const double bad : kBad) {
      Call sick = clean;
      sick.inputs[name].part(2, 0, 1).fill(bad);
      const Tensors out = forward_and_backward(sick);
      for (const std::int64_t head : {2, 3}) {
        expect_same_bits(results_of_head(out, head, 1, true), results_of_head(expected, head, 1, true), name);
      }
    }
  }
}

TEST(CpuIsolation, ANaNReachesTheOutputsItBelongsTo) {
  Call call = make_call({.name = "Honest", .T = 100});
  call.inputs["v"].part(1, 70, 71).fill(kBad[0]);
  const HostTensor o = chunk_forward(call).at("o");
  for (const double value : o.slice(1, 0, 64).values()) EXPECT_TRUE(std::isfinite(value));
  for (const double value : o.slice(1, 70, 100).values()) EXPECT_TRUE(std::isnan(value));
}

TEST(CpuIsolation, TheSameCallGivesTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call call = make_call(with_dtype(kPacked, dtype));
    const Tensors first = forward_and_backward(call);
    for (int i = 0; i < 3; ++i) expect_same_bits(forward_and_backward(call), first);
  }
}

TEST(CpuIsolation, ThreadsDoNotShowInTheBitsOfAnUncutCall) {
  Call call = make_call(kPacked);
  call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
  call.options.num_threads = 1;
  const Tensors one = forward_and_backward(call);
  for (const int threads : {2, 3, 7, 64}) {
    call.options.num_threads = threads;
    expect_same_bits(forward_and_backward(call), one, std::to_string(threads) + " threads");
  }
}

TEST(CpuIsolation, BatchInvariantBitsDoNotDependOnThePack) {
  const Case c{.name = "Invariant", .T = 1300, .K = 24, .V = 40, .cu_seqlens = {0, 900, 930, 994, 994, 1123, 1300}};
  for (const auto mode : {FLASHDELTA_CONTEXT_PARALLEL_AUTO, FLASHDELTA_CONTEXT_PARALLEL_EXACT, FLASHDELTA_CONTEXT_PARALLEL_OFF}) {
    Call packed = make_call(c);
    packed.options.batch_invariant = 1;
    packed.options.context_parallel = mode;
    const Tensors together = forward_and_backward(packed);
    expect_contract(packed, together);
    for (std::int64_t n = 0; n < packed.sequences(); ++n) {
      Call alone = sequence_of(packed, n);
      Tensors out = results_only(forward_and_backward(alone));
      expect_same_bits(out, results_of_sequence(packed, together, n), "sequence " + std::to_string(n));
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
