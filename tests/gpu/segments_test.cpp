// What cutting a call into segments must not change: bits from run to run, other sequences' results, graphs, and streams beside one
// another; what batch_invariant promises; and what segment_counts tells.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <sstream>
#include <thread>

#include "gpu/device_call.hpp"
#include "gpu/graph.hpp"
#include "gpu/long_call.hpp"
#include "gpu/occupied.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

constexpr auto kAuto = FLASHDELTA_CONTEXT_PARALLEL_AUTO;
constexpr auto kExact = FLASHDELTA_CONTEXT_PARALLEL_EXACT;
constexpr auto kOff = FLASHDELTA_CONTEXT_PARALLEL_OFF;

const Cut kCuts[] = {{kOff},      {kAuto},     {kExact},    {kAuto, 2},   {kAuto, 3},   {kAuto, 5},       {kAuto, 16},      {kAuto, 64},
                     {kExact, 2}, {kExact, 3}, {kExact, 5}, {kExact, 16}, {kExact, 64}, {kAuto, 0, true}, {kExact, 0, true}};

std::string text(const Cut& cut) {
  std::ostringstream out;
  out << cut;
  return out.str();
}

class CudaSegmentBits : public GpuTest {};

TEST_F(CudaSegmentBits, AreTheSameFromRunToRun) {
  const LongCase cases[] = {{.name = "Heads", .T = 8192, .H = 2, .HV = 8},
                            {.name = "Turns", .T = 8192, .dtype = DType::f16, .gates = Gates::turns},
                            {.name = "Gate0", .T = 8192, .gates = Gates::zero},
                            {.name = "Rows", .B = 3, .T = 3000, .H = 1, .HV = 3},
                            {.name = "Pack", .T = 9000, .cu_seqlens = {0, 1, 65, 65, 6000, 8900}, .in_place = true}};
  for (const LongCase& c : cases) {
    LongCall call(c);
    for (const Cut& cut : kCuts) {
      call.set_cut(cut);
      ASSERT_NO_FATAL_FAILURE(call.run()) << c << ' ' << text(cut);
      const Results first(call);
      for (int i = 0; i < 3; ++i) {
        ASSERT_NO_FATAL_FAILURE(call.run());
        first.expect_same_bits(call, "run " + std::to_string(i + 2) + ", " + text(cut));
      }
    }
  }
}

// The segment that writes the final state may end before another has begun to read the initial one.
TEST_F(CudaSegmentBits, AreTheSameInPlace) {
  LongCase two_chunks{.name = "TwoChunks", .gates = Gates::minus_5};
  for (int n = 0; n <= 150; ++n) two_chunks.cu_seqlens.push_back(128 * n);
  two_chunks.T = two_chunks.cu_seqlens.back();
  const LongCase cases[] = {two_chunks,
                            {.name = "Heads", .T = 8192, .H = 2, .HV = 8, .gates = Gates::minus_5},
                            {.name = "Turns", .T = 6000, .gates = Gates::turns, .v_first = true},
                            {.name = "Gate0", .T = 6000, .gates = Gates::zero, .state = DType::bf16},
                            {.name = "Pack", .T = 9000, .cu_seqlens = {0, 1, 65, 65, 6000, 8900}}};
  for (LongCase c : cases) {
    LongCall apart(c);
    c.in_place = true;
    LongCall in_place(c);
    for (const Cut& cut : kCuts) {
      apart.set_cut(cut), in_place.set_cut(cut);
      ASSERT_NO_FATAL_FAILURE(apart.run()) << c << ' ' << text(cut);
      const Results expected(apart);
      for (int i = 0; i < 5; ++i) {
        ASSERT_NO_FATAL_FAILURE(in_place.run());
        expected.expect_same_bits(in_place, "in place, " + text(cut));
      }
    }
  }
}

// The same with segments of one chunk, in a call that is small enough for racecheck.
TEST_F(CudaSegmentBits, OfOneChunkAreTheSameInPlace) {
  LongCase c{.name = "OneChunk", .gates = Gates::minus_5};
  for (int n = 0; n <= 12; ++n) c.cu_seqlens.push_back(128 * n);
  c.T = c.cu_seqlens.back();
  LongCall apart(c);
  c.in_place = true;
  LongCall in_place(c);
  for (const Cut& cut : {Cut{kAuto, 2}, Cut{kExact, 2}}) {
    apart.set_cut(cut), in_place.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(apart.run()) << text(cut);
    const Results expected(apart);
    ASSERT_NO_FATAL_FAILURE(in_place.run());
    expected.expect_same_bits(in_place, "in place, " + text(cut));
  }
}

// --- isolation

const LongCase kPack{.name = "Pack", .T = 7200, .H = 2, .HV = 4, .cu_seqlens = {50, 2000, 4500, 4500, 7100}};
constexpr const char* kInputs[] = {"q", "k", "v", "g", "beta", "initial_state"};
constexpr double kBad[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()};

// Where others' gates decide how a call is cut, its results may round otherwise, but no more than that.
bool plan_looks_at_gates(const Cut& cut) { return cut.mode == kAuto && cut.segments == 0 && !cut.batch_invariant; }

void expect_clean(const DLTensor& found, const DLTensor& expected, double allowed, const Cut& cut, const std::string& context) {
  if (plan_looks_at_gates(cut)) {
    EXPECT_EQ(count_not_finite(found), 0) << context << ", " << text(cut);
    EXPECT_LE(relative_difference(found, expected), 2 * allowed) << context << ", " << text(cut);
  } else {
    EXPECT_EQ(count_different(found, expected), 0) << context << ", " << text(cut);
  }
}

void expect_other_sequences_clean(const LongCall& call, const Results& clean, int sick, const Cut& cut, const std::string& context) {
  const auto& offsets = call.made_from().cu_seqlens;
  const Contract allowed = contract(call.made_from().dtype);
  for (int n = 0; n < call.made_from().sequences(); ++n) {
    if (n == sick) continue;
    const Part o(call.tensor("o"), 1, offsets[n], offsets[n + 1]), clean_o(clean.o(), 1, offsets[n], offsets[n + 1]);
    const Part state(call.tensor("final_state"), 0, n, n + 1), clean_state(clean.final_state(), 0, n, n + 1);
    expect_clean(o.tensor(), clean_o.tensor(), allowed.o, cut, "o of sequence " + std::to_string(n) + "; " + context);
    expect_clean(state.tensor(), clean_state.tensor(), allowed.final_state, cut, "state of sequence " + std::to_string(n) + "; " + context);
  }
}

const Cut kIsolationCuts[] = {{kAuto}, {kExact}, {kAuto, 3}, {kAuto, 64}, {kExact, 5}, {kAuto, 0, true}};

class CudaSegmentIsolation : public GpuTest, public ::testing::WithParamInterface<Gates> {};
// Boundaries that are exact, warmed up, and both; with gates of 0 a NaN travels as far as it can.
INSTANTIATE_TEST_SUITE_P(, CudaSegmentIsolation, ::testing::Values(Gates::zero, Gates::minus_5, Gates::turns));

TEST_P(CudaSegmentIsolation, ABadSequenceIsAlone) {
  LongCase c = kPack;
  c.gates = GetParam();
  LongCall call(c);
  for (const Cut& cut : kIsolationCuts) {
    call.refill(c);
    call.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(call.run());
    const Results clean(call);
    for (const char* name : kInputs) {
      for (const double bad : kBad) {
        call.refill(c);
        const bool state = std::string(name) == "initial_state";
        const Part sick(call.tensor(name), state ? 0 : 1, state ? 1 : c.cu_seqlens[1], state ? 2 : c.cu_seqlens[2]);
        fill_constant(sick.tensor(), bad);
        ASSERT_NO_FATAL_FAILURE(call.run());
        expect_other_sequences_clean(call, clean, 1, cut, std::string(name) + " of sequence 1 is " + std::to_string(bad));
      }
    }
    // One token, in the middle and next to the sequences on either side.
    for (const std::int64_t t : {c.cu_seqlens[1], std::int64_t{3000}, c.cu_seqlens[2] - 1}) {
      call.refill(c);
      for (const char* name : {"q", "k", "v", "g", "beta"}) fill_constant(Part(call.tensor(name), 1, t, t + 1).tensor(), kBad[0]);
      ASSERT_NO_FATAL_FAILURE(call.run());
      expect_other_sequences_clean(call, clean, 1, cut, "token " + std::to_string(t) + " is bad");
    }
  }
}

TEST_P(CudaSegmentIsolation, ABadHeadIsAlone) {
  LongCase c = kPack;
  c.gates = GetParam();
  LongCall call(c);
  const Contract allowed = contract(c.dtype);
  for (const Cut& cut : kIsolationCuts) {
    call.refill(c);
    call.set_cut(cut);
    ASSERT_NO_FATAL_FAILURE(call.run());
    const Results clean(call);
    for (const std::string name : kInputs) {
      // Value heads 0 and 1 share key head 0.
      const bool of_key_head = name == "q" || name == "k";
      for (const double bad : kBad) {
        call.refill(c);
        const std::int64_t head = of_key_head ? 0 : 1;
        fill_constant(Part(call.tensor(name.c_str()), name == "initial_state" ? 1 : 2, head, head + 1).tensor(), bad);
        ASSERT_NO_FATAL_FAILURE(call.run());
        const std::string context = name + " of a head is " + std::to_string(bad);
        for (const std::int64_t other : {0, 2, 3}) {
          if (of_key_head && other == 0) continue;
          const Part o(call.tensor("o"), 2, other, other + 1), clean_o(clean.o(), 2, other, other + 1);
          expect_clean(o.tensor(), clean_o.tensor(), allowed.o, cut, "o of head " + std::to_string(other) + "; " + context);
          const Part state(call.tensor("final_state"), 1, other, other + 1), clean_state(clean.final_state(), 1, other, other + 1);
          expect_clean(state.tensor(), clean_state.tensor(), allowed.final_state, cut,
                       "state of head " + std::to_string(other) + "; " + context);
        }
      }
    }
  }
}

// What a sequence's own first tokens held reaches the end of it through boundaries of either kind.
TEST_F(CudaSegmentBits, CarryANaNToTheEndOfItsSequence) {
  const LongCase c{.name = "Honest", .T = 6000, .gates = Gates::zero};
  LongCall call(c);
  for (const Cut& cut : kCuts) {
    call.set_cut(cut);
    call.refill(c);
    fill_constant(Part(call.tensor("v"), 1, 100, 101).tensor(), kBad[0]);
    ASSERT_NO_FATAL_FAILURE(call.run());
    const DLTensor& o = call.tensor("o");
    EXPECT_EQ(count_not_finite(Part(o, 1, 0, 64).tensor()), 0) << text(cut);
    EXPECT_EQ(count_not_finite(Part(o, 1, 100, 6000).tensor()), 5900 * 2 * 128) << text(cut);
    EXPECT_EQ(count_not_finite(call.tensor("final_state")), 2 * 128 * 128) << text(cut);
  }
}

// --- graphs

struct Replay {
  std::vector<std::int64_t> cu_seqlens;
  Gates gates;
};

// Other lengths of the same total, and gates that turn warmed-up boundaries into exact ones and back.
const Replay kReplays[] = {{{0, 2000, 4000, 6000, 8000}, Gates::minus_5},
                           {{0, 2000, 4000, 6000, 8000}, Gates::zero},
                           {{0, 0, 0, 8000, 8000}, Gates::zero},
                           {{0, 8000, 8000, 8000, 8000}, Gates::minus_5},
                           {{0, 1, 65, 7000, 8000}, Gates::turns},
                           {{64, 128, 192, 256, 320}, Gates::benchmark},
                           {{0, 0, 0, 0, 0}, Gates::zero},
                           {{7, 70, 7900, 7900, 7990}, Gates::benchmark},
                           {{0, 2000, 4000, 6000, 8000}, Gates::minus_5}};

TEST_F(CudaSegmentBits, OfReplayedGraphsAreThoseOfFreshCalls) {
  for (const Cut& cut : {Cut{kAuto}, Cut{kExact}, Cut{kAuto, 5}, Cut{kAuto, 64}, Cut{kAuto, 0, true}, Cut{kOff}}) {
    LongCase c{.name = "Graph", .T = 8000, .cu_seqlens = kReplays[0].cu_seqlens, .gates = kReplays[0].gates};
    LongCall call(c, cut);
    const Stream stream;
    ASSERT_EQ(call.launch(stream.get()), "");
    stream.synchronize();
    const Graph graph(call, stream.get());
    ASSERT_EQ(graph.error(), "");
    for (const Replay& replay : kReplays) {
      c.cu_seqlens = replay.cu_seqlens, c.gates = replay.gates, ++c.seed;
      LongCall fresh(c, cut);
      ASSERT_NO_FATAL_FAILURE(fresh.run());
      call.refill(c);
      call.poison();
      graph.replay(stream.get());
      stream.synchronize();
      EXPECT_TRUE(call.guards_intact());
      const std::string context = "replayed, gates " + std::to_string(static_cast<int>(c.gates)) + ", " + text(cut);
      Results(fresh).expect_same_bits(call, context);
      if (c.cu_seqlens.back() > 0) call.expect_contract(context);
    }
  }
}

TEST_F(CudaSegmentBits, OfReplayedGraphsWithoutPacksAreThoseOfFreshCalls) {
  for (const Cut& cut : {Cut{kAuto}, Cut{kAuto, 3}}) {
    LongCase c{.name = "GraphOfRows", .B = 2, .T = 5000, .H = 1, .HV = 3, .gates = Gates::minus_5};
    LongCall call(c, cut);
    const Stream stream;
    ASSERT_EQ(call.launch(stream.get()), "");
    stream.synchronize();
    const Graph graph(call, stream.get());
    ASSERT_EQ(graph.error(), "");
    for (const Gates gates : {Gates::zero, Gates::turns, Gates::minus_5, Gates::benchmark, Gates::zero}) {
      c.gates = gates, ++c.seed;
      LongCall fresh(c, cut);
      ASSERT_NO_FATAL_FAILURE(fresh.run());
      call.refill(c);
      call.poison();
      graph.replay(stream.get());
      stream.synchronize();
      Results(fresh).expect_same_bits(call, "replayed, gates " + std::to_string(static_cast<int>(gates)) + ", " + text(cut));
    }
  }
}

// --- streams

bool ends_within(const Stream& stream, std::chrono::seconds limit) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream.get());
    if (state != cudaErrorNotReady) {
      check_cuda(state, "running a call");
      return true;
    }
    if (std::chrono::steady_clock::now() - start > limit) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// A call whose segments wait for one another for ever would hang the program: better that it says so and ends.
void wait_or_abort(const Stream& stream, const std::string& what) {
  if (ends_within(stream, std::chrono::seconds(60))) return;
  std::fprintf(stderr, "%s: did not end within a minute\n", what.c_str());
  std::abort();
}

// Segments wait for others, of the same call: these must come to run however few multiprocessors there are.
TEST_F(CudaSegmentBits, AreTheSameOnFewMultiprocessors) {
  const LongCase cases[] = {{.name = "Gate0", .T = 8192, .gates = Gates::zero},
                            {.name = "Heads", .T = 8192, .H = 2, .HV = 8},
                            {.name = "Turns", .T = 9000, .cu_seqlens = {0, 5000, 5001, 9000}, .gates = Gates::turns, .in_place = true}};
  for (const LongCase& c : cases) {
    LongCall call(c);
    for (const Cut& cut : {Cut{kAuto}, Cut{kExact}, Cut{kExact, 64}, Cut{kAuto, 16}, Cut{kAuto, 0, true}}) {
      call.set_cut(cut);
      ASSERT_NO_FATAL_FAILURE(call.run());
      const Results expected(call);
      for (const int left : {1, 2, 7}) {
        call.poison();
        const Stream stream;
        Occupied machine(left);
        ASSERT_EQ(call.launch(stream.get()), "");
        EXPECT_TRUE(ends_within(stream, std::chrono::seconds(20))) << c << ", " << left << " multiprocessors, " << text(cut);
        machine.release();
        wait_or_abort(stream, "a call on the whole machine, " + text(cut));
        expected.expect_same_bits(call, std::to_string(left) + " multiprocessors, " + text(cut));
      }
    }
  }
}

TEST_F(CudaSegmentBits, AreTheSameInCallsOfTwoStreamsAtOnce) {
  for (const Cut& cut : {Cut{kAuto}, Cut{kExact}, Cut{kExact, 64}, Cut{kAuto, 0, true}}) {
    std::deque<LongCall> calls;
    calls.emplace_back(LongCase{.name = "Gate0", .T = 16000, .gates = Gates::zero}, cut);
    calls.emplace_back(LongCase{.name = "Heads", .T = 16000, .H = 2, .HV = 8}, cut);
    calls.emplace_back(LongCase{.name = "Turns", .T = 9000, .cu_seqlens = {0, 5000, 9000}, .gates = Gates::turns}, cut);
    calls.emplace_back(LongCase{.name = "ManyPairs", .B = 8, .T = 1000, .H = 4, .HV = 32, .dtype = DType::f16}, cut);
    std::deque<Results> expected;
    for (LongCall& call : calls) {
      ASSERT_NO_FATAL_FAILURE(call.run());
      expected.emplace_back(call);
      call.poison();
    }
    const Stream one, other;
    for (int i = 0; i < 20; ++i) {
      for (std::size_t j = 0; j < calls.size(); ++j) ASSERT_EQ(calls[j].launch((j % 2 == 0 ? one : other).get()), "");
    }
    wait_or_abort(one, "calls of two streams, " + text(cut));
    wait_or_abort(other, "calls of two streams, " + text(cut));
    for (std::size_t j = 0; j < calls.size(); ++j) {
      EXPECT_TRUE(calls[j].guards_intact());
      expected[j].expect_same_bits(calls[j], "two streams, " + text(cut));
    }
  }
}

// --- batch_invariant

// Sequence n of `pack` becomes the one sequence of `alone`.
void put_sequence(const LongCall& alone, const LongCall& pack, int n) {
  const auto& offsets = pack.made_from().cu_seqlens;
  for (const char* name : {"q", "k", "v", "g", "beta"}) {
    copy(alone.tensor(name), Part(pack.tensor(name), 1, offsets[n], offsets[n + 1]).tensor());
  }
  copy(alone.tensor("initial_state"), Part(pack.tensor("initial_state"), 0, n, n + 1).tensor());
}

void expect_sequence(const LongCall& pack, int n, const Results& alone, const std::string& context) {
  const auto& offsets = pack.made_from().cu_seqlens;
  EXPECT_EQ(count_different(Part(pack.tensor("o"), 1, offsets[n], offsets[n + 1]).tensor(), alone.o()), 0) << "elements of o; " << context;
  EXPECT_EQ(count_different(Part(pack.tensor("final_state"), 0, n, n + 1).tensor(), alone.final_state()), 0)
      << "elements of final_state; " << context;
}

// Packs in which a sequence of `length` tokens is number n.
struct Place {
  std::vector<std::int64_t> cu_seqlens;
  int n;
};
std::vector<Place> places(std::int64_t length) {
  std::vector<Place> all{{{0, length, length + 3000, length + 3065, length + 3065}, 0},
                         {{0, 3000, 3065, 3065, 3065 + length, 3065 + length + 9000}, 3},
                         {{11, 11, 7788, 7788 + length}, 2}};
  // More pairs than multiprocessors.
  Place among_many{{5}, 100};
  for (int i = 0; i < 200; ++i) among_many.cu_seqlens.push_back(among_many.cu_seqlens.back() + (i == among_many.n ? length : 17 + i % 90));
  all.push_back(among_many);
  return all;
}

class CudaBatchInvariant : public GpuTest, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Lengths, CudaBatchInvariant, ::testing::Values(1, 64, 100, 4096, 4097, 10000),
                         [](const auto& param_info) { return "T" + std::to_string(param_info.param); });

TEST_P(CudaBatchInvariant, BitsOfASequenceAreTheSameWhateverItIsPackedWith) {
  const std::int64_t length = GetParam();
  constexpr flashdelta_context_parallel kModes[] = {kAuto, kExact, kOff};
  for (const Gates gates : {Gates::benchmark, Gates::zero, Gates::turns}) {
    LongCase c{
        .name = "Alone", .T = length, .H = 2, .HV = 4, .dtype = gates == Gates::zero ? DType::f16 : DType::bf16, .gates = gates, .seed = 9};
    LongCall alone(c);
    std::deque<Results> expected;
    for (const auto mode : kModes) {
      alone.set_cut({mode, 0, true});
      ASSERT_NO_FATAL_FAILURE(alone.run());
      expected.emplace_back(alone);
    }
    for (const Place& place : places(length)) {
      LongCase packed = c;
      packed.name = "Pack", packed.seed = 1, packed.T = place.cu_seqlens.back() + 13, packed.cu_seqlens = place.cu_seqlens;
      packed.gates = Gates::benchmark;
      LongCall pack(packed);
      put_sequence(alone, pack, place.n);
      for (std::size_t i = 0; i < std::size(kModes); ++i) {
        const Cut cut{kModes[i], 0, true};
        pack.set_cut(cut);
        ASSERT_NO_FATAL_FAILURE(pack.run());
        expect_sequence(pack, place.n, expected[i], std::to_string(place.cu_seqlens.size() - 1) + " sequences, " + text(cut));
      }
    }
  }
}

TEST_F(CudaSegmentBits, WithBatchInvariantDoNotDependOnWhatElseIsWritten) {
  for (const Gate gate : {Gate::random, Gate::zero}) {
    Case c{.name = "Saving", .T = 4400, .HV = 2, .dtype = DType::bf16, .gate = gate};
    Call plain = cuda_call(c), saving = cuda_call_saving(c);
    plain.options.batch_invariant = saving.options.batch_invariant = 1;
    const Tensors expected = cuda_forward(plain);
    ASSERT_FALSE(expected.empty());
    expect_same_bits(results_only(cuda_forward(saving)), expected, "with the saved tensors");
    plain.unwanted.insert("final_state");
    EXPECT_TRUE(cuda_forward(plain).at("o").bits() == expected.at("o").bits()) << "without final_state";
  }
}

// --- segment_counts

using Counts = std::array<std::int32_t, 4>;

Counts counts_of(const LongCase& c, const Cut& cut, double tolerance = 0) {
  LongCall call(c, cut);
  call.set_tolerance(tolerance);
  call.run();
  const Results expected(call);
  const Counts counts = call.run_counting();
  expected.expect_same_bits(call, "with segment_counts, " + text(cut));
  EXPECT_EQ(counts[0], c.sequences() * c.HV + counts[1] + counts[2]) << c << ' ' << text(cut);
  EXPECT_GE(counts[3], counts[1]) << c << ' ' << text(cut);
  EXPECT_LE(counts[3], 8 * counts[1]) << c << ' ' << text(cut);
  return counts;
}

class CudaSegmentCounts : public GpuTest {};

// 512 chunks: few enough segments that each is longer than a warm-up.
LongCase long_case(Gates gates) { return {.name = "Long", .T = 32768, .H = 1, .HV = 4, .gates = gates}; }

TEST_F(CudaSegmentCounts, OffCutsNothing) {
  for (const Gates gates : {Gates::zero, Gates::minus_5, Gates::benchmark})
    EXPECT_EQ(counts_of(long_case(gates), {kOff}), (Counts{4, 0, 0, 0}));
  EXPECT_EQ(counts_of({.name = "Pack", .T = 9000, .cu_seqlens = {0, 0, 5000, 9000}}, {kOff}), (Counts{6, 0, 0, 0}));
}

TEST_F(CudaSegmentCounts, ExactNeverWarmsUp) {
  for (const Gates gates : {Gates::zero, Gates::minus_5, Gates::minus_1000, Gates::benchmark}) {
    for (const Cut& cut : {Cut{kExact}, Cut{kExact, 5}, Cut{kExact, 64}, Cut{kExact, 0, true}}) {
      const Counts counts = counts_of(long_case(gates), cut);
      EXPECT_EQ(counts[1], 0) << text(cut);
      EXPECT_GT(counts[2], 0) << text(cut);
      EXPECT_EQ(counts[3], 0) << text(cut);
    }
  }
}

TEST_F(CudaSegmentCounts, AutoWarmsUpWhereGatesAreStrong) {
  for (const Gates gates : {Gates::minus_5, Gates::minus_1000}) {
    for (const Cut& cut : {Cut{kAuto}, Cut{kAuto, 5}, Cut{kAuto, 64}, Cut{kAuto, 0, true}}) {
      const Counts counts = counts_of(long_case(gates), cut);
      EXPECT_GT(counts[1], 0) << text(cut);
      EXPECT_EQ(counts[2], 0) << text(cut);
      if (cut.segments == 5) EXPECT_EQ(counts, (Counts{20, 16, 0, 16})) << "one chunk of -5 a token forgets all";
    }
  }
}

TEST_F(CudaSegmentCounts, AutoIsExactWhereGatesAreZero) {
  // From a boundary less than a warm-up away from the sequence's start nothing is left out either: it may count as one.
  const Counts planned = counts_of(long_case(Gates::zero), {kAuto});
  EXPECT_GT(planned[2], 0);
  EXPECT_LE(planned[1], 4);
  for (const int n : {2, 5, 16}) {
    EXPECT_EQ(counts_of(long_case(Gates::zero), {kAuto, n}), (Counts{4 * n, 0, 4 * (n - 1), 0}));
  }
  EXPECT_EQ(counts_of(long_case(Gates::zero), {kAuto, 0, true}), (Counts{32, 0, 28, 0})) << "a cut every 64 chunks";
}

TEST_F(CudaSegmentCounts, HeadsAreOfBothKinds) {
  // Head 3 forgets nothing.
  const Counts counts = counts_of(long_case(Gates::benchmark), {kAuto, 5});
  EXPECT_EQ(counts[0], 20);
  EXPECT_EQ(counts[1], 12);
  EXPECT_EQ(counts[2], 4);
  const Counts turns = counts_of({.name = "Turns", .T = 32768, .HV = 2, .gates = Gates::turns}, {kAuto, 32});
  EXPECT_EQ(turns[0], 64);
  EXPECT_GT(turns[1], 0);
  EXPECT_GT(turns[2], 0);
}

TEST_F(CudaSegmentCounts, AForcedNumberIsGivenToEveryPair) {
  for (const auto mode : {kAuto, kExact}) {
    for (const int n : {1, 2, 3, 16, 64}) {
      EXPECT_EQ(counts_of({.name = "Rows", .B = 2, .T = 8192, .H = 1, .HV = 3}, {mode, n})[0], 6 * n) << n;
      // 0, 1, 1, 2, 47 and 79 chunks: never more segments than chunks, and one for none.
      const Counts counts = counts_of({.name = "Pack", .T = 8192, .cu_seqlens = {0, 0, 1, 65, 150, 3150, 8192}}, {mode, n});
      EXPECT_EQ(counts[0], 2 * (1 + 1 + 1 + std::min(n, 2) + std::min(n, 47) + std::min(n, 79))) << n;
    }
  }
}

TEST_F(CudaSegmentCounts, ALargerToleranceWarmsUpLess) {
  const LongCase c{.name = "Tolerances", .T = 16384, .HV = 2};
  const Cut cut{kAuto, 8};
  const Counts loose = counts_of(c, cut, 1e-1), usual = counts_of(c, cut), tight = counts_of(c, cut, 1e-7), none = counts_of(c, cut, 1e-30);
  EXPECT_EQ(loose[1], 14);
  EXPECT_EQ(usual[1], 14);
  EXPECT_EQ(tight[1], 14);
  EXPECT_LT(loose[3], usual[3]);
  EXPECT_LT(usual[3], tight[3]);
  EXPECT_EQ(none[1], 0) << "exp(-69) is beyond what these gates forget within eight chunks";
  EXPECT_EQ(none[2], 14);
}

// Where the plan looks at more (context_parallel_test.cpp), what it tells must be as true.
TEST_F(CudaSegmentCounts, OfLargeCallsAreOfCuts) {
  for (const LongCase& c : {LongCase{.name = "Halves", .T = 8192, .H = 16, .HV = 64, .cu_seqlens = {0, 6144, 8192}},
                            LongCase{.name = "Late", .T = 8192, .H = 12, .HV = 48, .cu_seqlens = {0, 6144, 8192}},
                            LongCase{.name = "Loose", .T = 16384, .H = 16, .HV = 48},
                            LongCase{.name = "Fours", .T = 20480, .H = 4, .HV = 40, .gates = Gates::minus_5}}) {
    const Counts counts = counts_of(c, {kAuto});
    EXPECT_GT(counts[1], 0) << c;
    EXPECT_EQ(counts[2] == 0, c.gates == Gates::minus_5 || c.name == "Halves") << c;
  }
}

// A plan takes longer than it saves there; in packs lengths tell it on the device.
TEST_F(CudaSegmentCounts, ShortCallsAreNotCut) {
  for (const auto mode : {kAuto, kExact}) {
    EXPECT_EQ(counts_of({.name = "Few", .T = 1500, .H = 2, .HV = 8}, {mode}), (Counts{8, 0, 0, 0}));
    EXPECT_EQ(counts_of({.name = "Many", .T = 3000, .H = 8, .HV = 32}, {mode}), (Counts{32, 0, 0, 0}));
    EXPECT_EQ(counts_of({.name = "Pack", .T = 2000, .cu_seqlens = {0, 700, 700, 2000}}, {mode}), (Counts{6, 0, 0, 0}));
    EXPECT_GT(counts_of({.name = "Longer", .T = 4096, .H = 2, .HV = 8}, {mode})[0], 8);
  }
}

// |1 - beta |k|^2| up to 63 counts against the gates.
TEST_F(CudaSegmentCounts, LongKeysCountAgainstTheGates) {
  LongCase c{.name = "LongKeys", .T = 16384, .gates = Gates::minus_5, .beta = Strength::one, .key_length = 8, .beta_by_length = false};
  EXPECT_EQ(counts_of(c, {kAuto, 4})[1], 6) << "log 63 is below 5";
  const Counts held_down = counts_of(c, {kAuto});
  EXPECT_GT(held_down[1], 0);
  EXPECT_EQ(held_down[2], 0);
  c.key_length = 13;
  EXPECT_EQ(counts_of(c, {kAuto, 4})[2], 6) << "log 168 is above 5";
  // The plan by cost is first made from gates alone.
  const Counts enlarged = counts_of(c, {kAuto});
  EXPECT_EQ(enlarged[1], 0);
  EXPECT_GT(enlarged[2], 0);
}

}  // namespace
}  // namespace flashdelta::testing
