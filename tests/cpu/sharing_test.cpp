// Threads without an item of their own take value columns of others' items.
#include <gtest/gtest.h>

#include "cpu/sharing.hpp"
#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

TEST(CpuSharing, DoesNotShowInTheBits) {
  for (const std::int64_t HV : {1, 2, 5}) {
    Call call = make_call({.name = "Sharing", .T = 700, .HV = HV, .K = 40, .V = 120, .dtype = DType::bf16});
    call.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
    call.options.num_threads = 1;
    const Tensors one = chunk_forward(call);
    expect_contract(call, one);
    for (const int threads : {2, 3, 4, 9, 16}) {
      call.options.num_threads = threads;
      for (int repeat = 0; repeat < 5; ++repeat) expect_same_bits(chunk_forward(call), one, std::to_string(threads) + " threads");
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
    for (int repeat = 0; repeat < 5; ++repeat) expect_same_bits(chunk_forward(call), one, std::to_string(threads) + " threads");
  }
}

TEST(CpuSharing, NobodyIsAskedWhoHasTooLittle) {
  cpu::Sharing sharing(2);
  cpu::Part part;
  EXPECT_FALSE(sharing.ask(1, &part));
  sharing.open(0, {0, 32}, 100);  // one block of columns
  EXPECT_FALSE(sharing.ask(1, &part));
  sharing.close(0);
  sharing.open(0, {0, 128}, 1);
  EXPECT_FALSE(sharing.ask(1, &part));
  sharing.close(0);
  EXPECT_EQ(cpu::Sharing::shares({0, 128}, 100), 4);
  EXPECT_EQ(cpu::Sharing::shares({0, 128}, 1), 1);
}

TEST(CpuSharing, WhoAsksGetsAnAnswer) {
  cpu::Sharing sharing(2);
  for (const bool gives : {true, false}) {
    sharing.open(0, {0, 128}, 100);
    cpu::Part part;
    bool got = false;
    std::thread thief([&] { got = sharing.ask(1, &part); });
    while (sharing.asking(0) < 0) std::this_thread::yield();
    EXPECT_EQ(sharing.asking(0), 1);
    if (gives) sharing.give(0, 1, {7, 3, {64, 128}});
    sharing.close(0);
    thief.join();
    EXPECT_EQ(got, gives);
    if (gives) {
      EXPECT_EQ(part.item, 7);
      EXPECT_EQ(part.chunk, 3);
      EXPECT_EQ(part.columns.first, 64);
      EXPECT_EQ(part.columns.last, 128);
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
