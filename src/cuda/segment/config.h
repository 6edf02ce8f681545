// Constants of the plan of segments, each with its reason. Costs are in units of one full chunk of the loop.
#pragma once

namespace flashdelta::cuda::segment {

// At least the multiprocessors: a thread each, and one for each listed pair.
constexpr int kThreads = 256;

// Longest warm-up: beyond it a boundary counts as exact. Eight chunks of state-only work cost about what a transition and a local state
// of a short segment cost.
constexpr int kMostWarmUp = 8;

// A chunk that only moves the state on, against a full one: it lacks q S, P U, q k^T and the output.
constexpr float kStateOnly = 0.7F;
// A chunk of half the value columns, one consumer's, against both, where all multiprocessors are busy: its products wait for one another.
constexpr float kHalf = 0.62F;
// The same beside whole pairs: the clock is that of the others.
constexpr float kHalfBeside = 0.69F;
// A chunk where few multiprocessors are busy, against one where all are: the clock is higher.
constexpr float kIdle = 0.83F;
// Beginning and ending an item: reading a state, filling the pipeline, writing a state. More where that is written in pairs of bf16 and
// others are told.
constexpr float kItem = 2.F, kPart = 2.5F;
// Beginning and ending a scan; one step of it.
constexpr float kScanItem = 2.F, kScanStep = 0.7F;

// A pair's first segment against its others: it is run whole while theirs are run for the state alone, and all wait for the slowest.
constexpr float kFirstShare = kStateOnly;
// In large calls the model also looks at late cuts: a first segment that is so many times as long as those behind it, 2 to 4 of them, whole
// or as two halves of its value columns. The highest numbers of segments make room for them: no large call is best cut in so many.
constexpr int kLateCounts = 3, kLateShares = 5, kLateCuts = 2 * kLateCounts * kLateShares;
constexpr float kLateShare = 1.15F, kLateStep = 1.57F;
// Chunks of the longest pair's shortest segment in one: those of others, less than half as long, still have kShortest.
constexpr float kLateShortest = 6.F;

// Chunks that a segment has more than its neighbour nearer to an end of the pair. The scan takes a step at a time, so what comes later in
// it may be longer, by a step, as long as its parts are run; and what is told of later must be shorter.
constexpr float kRise = kScanStep / kStateOnly;

// Dependents of a pair up to which its scan counts as short.
constexpr int kShortScan = 4;
// Chunks of key heads from which on a call is large: L2 does not keep keys and queries (32 KB) until another value head comes to them, and
// it lasts long enough for a plan that looks at more. Pieces of warm pairs then go side by side, at most so many, where that saves at least
// one load in so many.
constexpr int kLargeFrom = 1280, kMostGang = 4, kWorthGangs = 5;

// Shortest piece worth a cut, in chunks.
constexpr int kShortest = 2;
// Pairs of at most this share of a multiprocessor's load are never cut: handed out one by one they balance well enough.
constexpr float kNeverCut = 0.25F;
// Cuts at best, an even share for all, are worth a plan where so many times as long, and what the plan and the cuts cost by themselves,
// would not take longer than no cuts. Long shares come nearer to even. Measured, auto against off, on 1 to 96 pairs of 1024 to 8192 tokens:
// below these a plan takes 1 to 7 us more than it saves.
constexpr float kAtBest = 1.25F, kPlan = 20.F;
constexpr float kAtBestLong = 1.1F, kPlanLong = 28.F;
// Once the plan has been made: what it promises takes so many times as long, and it must save so much.
constexpr float kImbalance = 1.05F, kGain = 6.F;
// Of a late cut, whose parts leave multiprocessors something to do until the scan.
constexpr float kLateImbalance = 1.F;
// The same where little waits for one another: of a hill, which has room for all items at once, and where only warm pairs are cut.
constexpr float kEvenImbalance = 1.1F, kEvenGain = 3.F;

// Chunks (of value heads) from which on `prepare` takes about as long as a rehearsal of the plan.
constexpr int kRehearseFrom = 4096;

// batch_invariant: chunks between its fixed cuts.
constexpr int kFixedChunks = 64;

// Blocks that a multiprocessor could hold by registers: the plan must fit beside `prepare`, to be there when that ends.
constexpr int kResident = 4;

// Pairs that a plan may cut, by kNeverCut fewer than twice the multiprocessors; and boundaries, each of 128 KB of workspace.
constexpr int kMostListed = kThreads;
constexpr int kMostBoundaries = 288;
constexpr int kMostSegments = 64;  // of one pair, where the plan chooses

}  // namespace flashdelta::cuda::segment
