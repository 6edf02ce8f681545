// How much memory a thread takes, and that value heads too many for it, which then go in groups, show that in nothing else.
#include <gtest/gtest.h>

#include "cpu/cpu.hpp"
#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

constexpr std::size_t kPerThread = 512 << 10;

op::Problem problem(std::int64_t K, std::int64_t V, std::int64_t ratio, op::DType dtype, int threads) {
  op::Problem p;
  p.B = p.N = p.H = 1;
  p.T = 1 << 14;
  p.HV = ratio;
  p.K = K;
  p.V = V;
  p.num_threads = threads;
  p.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
  for (op::Tensor* x : {&p.q, &p.k, &p.v, &p.o, &p.d_o, &p.dq, &p.dk, &p.dv}) {
    x->present = true;
    x->dtype = dtype;
  }
  return p;
}

TEST(CpuWorkspace, AThreadTakesLessThanHalfAMebibyte) {
  for (std::int64_t K = 16; K <= 256; K += 16) {
    for (std::int64_t V = 16; V <= 256; V += 16) {
      for (const std::int64_t ratio : {1, 2, 3, 4, 5, 8, 16, 64}) {
        for (const op::DType dtype : {op::DType::f32, op::DType::bf16}) {
          for (const int threads : {1, 4}) {
            const op::Problem p = problem(K, V, ratio, dtype, threads);
            const std::string which = "K " + std::to_string(K) + ", V " + std::to_string(V) + ", HV/H " + std::to_string(ratio);
            ASSERT_LT(cpu::chunk_forward_workspace(p), threads * kPerThread) << which;
            ASSERT_LT(cpu::recurrent_forward_workspace(p), threads * kPerThread) << which;
            ASSERT_LT(cpu::chunk_backward_workspace(p), threads * kPerThread) << which;
          }
        }
      }
    }
  }
}

TEST(CpuWorkspace, PlannedSegmentsStayWithinItTooWhereWidthsAre128) {
  for (const std::int64_t ratio : {1, 2, 3}) {
    for (const int threads : {1, 2, 8, 16, 64}) {
      op::Problem p = problem(128, 128, ratio, op::DType::bf16, threads);
      p.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_EXACT;
      EXPECT_LT(cpu::chunk_forward_workspace(p), threads * kPerThread);
      EXPECT_LT(cpu::chunk_backward_workspace(p), threads * kPerThread);
    }
  }
}

// Value heads of a key head that do not fit together: two or three groups, the first one smaller or not.
std::vector<Case> grouped() {
  const Case shapes[] = {
      {.name = "SixOf128", .T = 130, .H = 2, .HV = 12, .K = 128, .V = 128},
      {.name = "ElevenOf128", .T = 33, .HV = 11, .K = 128, .V = 128, .l2norm = true},
      {.name = "SixtyFourOf128", .T = 12, .HV = 64, .K = 128, .V = 128},
      {.name = "TwoOf256", .T = 70, .HV = 2, .K = 256, .V = 256, .gate = Gate::in_kernel},
      {.name = "Odd", .T = 107, .HV = 13, .K = 99, .V = 120, .cu_seqlens = {3, 3, 40, 105}, .l2norm = true, .scale = 0.3},
      {.name = "Mixed", .T = 66, .HV = 7, .K = 130, .V = 100, .gate = Gate::mixed, .beta = Beta::sigmoid_twice}};
  std::vector<Case> cases;
  std::size_t turn = 0;
  for (Case c : shapes) {
    const std::string name = c.name;
    for (const DType dtype : {DType::f32, turn++ % 2 == 0 ? DType::bf16 : DType::f16}) {
      c.name = name + (dtype == DType::f32 ? "F32" : dtype == DType::bf16 ? "Bf16" : "F16");
      c.dtype = dtype;
      cases.push_back(c);
    }
  }
  return cases;
}

class CpuGroups : public ::testing::TestWithParam<Case> {};

TEST_P(CpuGroups, HoldTheContract) {
  Call call = make_call(GetParam());
  expect_contract(call, forward_and_backward(call));
}

INSTANTIATE_TEST_SUITE_P(Widths, CpuGroups, ::testing::ValuesIn(grouped()), [](const auto& param_info) { return param_info.param.name; });

Call grouped_call(DType dtype) {
  return make_call(
      {.name = "Groups", .T = 100, .H = 2, .HV = 14, .K = 128, .V = 120, .dtype = dtype, .gate = Gate::in_kernel, .l2norm = true});
}

TEST(CpuGroupsOnce, OutputsOfAnyStrideGetTheSameBits) {
  for (const DType dtype : {DType::f32, DType::f16}) {
    Call call = grouped_call(dtype);
    const Tensors contiguous = forward_and_backward(call);
    for (const Layout layout : {Layout::padded, Layout::transposed}) {
      for (const auto& [name, tensor] : contiguous) call.layouts[name] = layout;
      expect_same_bits(forward_and_backward(call), contiguous);
    }
  }
}

// Without dq the sums of 16-bit gradients have no place between the groups.
TEST(CpuGroupsOnce, UnwantedOutputsChangeNoOther) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Call call = grouped_call(dtype);
    const Tensors all = forward_and_backward(call);
    for (const char* unwanted : {"dq", "dk", "dv", "dg"}) {
      call.unwanted = {unwanted};
      for (const auto& [name, tensor] : chunk_backward(call, all)) EXPECT_TRUE(tensor.bits() == all.at(name).bits()) << name;
    }
    for (const char* wanted : {"dq", "dk"}) {
      call.unwanted.clear();
      for (const auto& [name, unused] : all) {
        if (name != wanted) call.unwanted.insert(name);
      }
      EXPECT_TRUE(chunk_backward(call, all).at(wanted).bits() == all.at(wanted).bits()) << wanted;
    }
  }
}

TEST(CpuGroupsOnce, ThreadsDoNotShowInTheBits) {
  Call call = grouped_call(DType::bf16);
  call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
  call.options.num_threads = 1;
  const Tensors one = forward_and_backward(call);
  call.options.num_threads = 3;
  expect_same_bits(forward_and_backward(call), one);
  expect_same_bits(forward_and_backward(call), one);
}

TEST(CpuGroupsOnce, SegmentsAndCheckpointsHoldTheContract) {
  Call call = make_call({.name = "Long", .T = 300, .HV = 6, .K = 128, .V = 128, .dtype = DType::bf16});
  const Tensors oracle = oracle_forward_and_backward(call);
  for (const int every : {1, 3}) {
    for (const int segments : {0, 2}) {
      call.options.checkpoint_chunks = every;
      call.options.num_segments = segments;
      expect_contract(call, forward_and_backward(call), oracle, "every " + std::to_string(every));
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
