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
// Beginning and ending an item: reading a state, filling the pipeline, writing a state. More where that is written in pairs of bf16 and
// others are told.
constexpr float kItem = 2.F, kPart = 2.5F;
// Beginning and ending a scan; one step of it.
constexpr float kScanItem = 2.F, kScanStep = 0.7F;

// A pair's first segment against its others: it is run whole while theirs are run for the state alone, and all wait for the slowest.
constexpr float kFirstShare = kStateOnly;

// Chunks that a segment has more than its neighbour nearer to an end of the pair. The scan takes a step at a time, so what comes later in
// it may be longer, by a step, as long as its parts are run; and what is told of later must be shorter.
constexpr float kRise = kScanStep / kStateOnly;

// Dependents of a pair up to which its scan counts as short.
constexpr int kShortScan = 4;
// Shortest piece worth a cut, in chunks.
constexpr int kShortest = 2;
// Pairs of at most this share of a multiprocessor's load are never cut: handed out one by one they balance well enough.
constexpr float kNeverCut = 0.52F;
// What a plan promises is worth this much: multiprocessors are never loaded quite alike, and the plan itself takes a while. Once it has
// been made, what it must save is less.
constexpr float kImbalance = 1.25F, kPlan = 7.F, kGain = 3.F;
// The same of a hill: there is room for all items at once.
constexpr float kHillImbalance = 1.1F;

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
