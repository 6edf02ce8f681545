// Threads without an item of their own take value columns of others' items, or, backward, what slower ones have left.
#include <gtest/gtest.h>

#include <thread>
#include <utility>

#include "cpu/sharing.hpp"
#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

TEST(CpuSharing, DoesNotShowInTheBits) {
  for (const std::int64_t HV : {1, 5}) {
    Call call = make_call({.name = "Sharing", .T = 700, .HV = HV, .K = 40, .V = 120, .dtype = DType::bf16});
    call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
    call.options.num_threads = 1;
    const Tensors one = chunk_forward(call);
    expect_contract(call, one);
    for (const int threads : {2, 4, 9}) {
      call.options.num_threads = threads;
      for (int repeat = 0; repeat < 2; ++repeat) expect_same_bits(chunk_forward(call), one, std::to_string(threads) + " threads");
    }
  }
}

TEST(CpuSharing, DoesNotShowInTheBitsOfSegmentsAndPacks) {
  Call call = make_call({.name = "Sharing", .T = 1500, .HV = 2, .K = 24, .V = 72, .cu_seqlens = {0, 3, 1000, 1000, 1490}});
  call.options.num_segments = 2;
  call.options.num_threads = 1;
  const Tensors one = chunk_forward(call);
  for (const int threads : {2, 5, 16}) {
    call.options.num_threads = threads;
    for (int repeat = 0; repeat < 2; ++repeat) expect_same_bits(chunk_forward(call), one, std::to_string(threads) + " threads");
  }
}

TEST(CpuSharing, DoesNotShowInTheBitsOfGradients) {
  for (const auto& [HV, every] : {std::pair{3, 1}, std::pair{3, 3}, std::pair{12, 3}}) {  // 12: in groups of value heads
    Call call = make_call({.name = "Sharing", .T = 500, .H = 3, .HV = HV, .K = 40, .V = 72, .gate = Gate::in_kernel});
    call.options.checkpoint_chunks = every;
    call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
    call.options.num_threads = 1;
    const Tensors one = forward_and_backward(call);
    for (const int threads : {2, 8}) {
      call.options.num_threads = threads;
      expect_same_bits(forward_and_backward(call), one, std::to_string(threads) + " threads");
    }
  }
}

TEST(CpuSharing, NobodyIsAskedWhoHasNothingOrIsNotSlower) {
  cpu::Sharing<int> sharing(2);
  int part = 0;
  EXPECT_FALSE(sharing.ask(1, false, &part));
  sharing.open(0, 0);
  EXPECT_FALSE(sharing.ask(1, false, &part));
  sharing.set_left(0, 10);
  sharing.set_pace(0, 124);
  sharing.set_pace(1, 100);
  EXPECT_FALSE(sharing.ask(1, true, &part));
  sharing.close(0);
  EXPECT_FALSE(sharing.ask(1, false, &part));
}

TEST(CpuSharing, WhoAsksGetsAnAnswer) {
  enum class Way : std::uint8_t { give, refuse, close };
  for (const bool slower : {false, true}) {
    for (const Way way : {Way::give, Way::refuse, Way::close}) {
      cpu::Sharing<int> sharing(2);
      sharing.set_pace(0, 125);
      sharing.set_pace(1, 100);
      sharing.open(0, 100);
      int part = 0;
      bool got = false;
      std::thread asker([&] { got = sharing.ask(1, slower, &part); });
      while (sharing.asking(0) < 0) std::this_thread::yield();
      EXPECT_EQ(sharing.asking(0), 1);
      if (way == Way::give) sharing.give(0, 1, 7);
      if (way == Way::refuse) {
        sharing.set_left(0, 0);
        sharing.refuse(0, 1);
      }
      sharing.close(0);
      asker.join();
      EXPECT_EQ(got, way == Way::give);
      EXPECT_EQ(part, way == Way::give ? 7 : 0);
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
