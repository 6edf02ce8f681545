// Context parallel on the CPU: how sequences are cut into segments, and how far back a segment's start state reaches.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.hpp"

namespace flashdelta::cpu {

inline std::int64_t chunks_of(const op::Problem& p, std::int64_t n) { return (op::sequence(p, n).length() + kChunk - 1) / kChunk; }

// One sequence's segments: the same for all of its heads. Boundaries are multiples of checkpoint_chunks.
struct Cut {
  std::int64_t n = 0, count = 1;
  std::int64_t first_boundary = 0;  // boundaries of the sequences before, times HV: where this one's states stand
};

// Every sequence's cut, the longest sequences first, so that threads end together.
std::vector<Cut> cut_sequences(const op::Problem& p, int threads);

// Boundaries (count - 1, times HV) over all cuts.
std::int64_t boundary_count(const op::Problem& p, const std::vector<Cut>& cuts);

// How a call with segments lays out its workspace: each thread's scratch, then the boundaries' states and transitions.
struct SegmentLayout {
  int threads;
  std::vector<Cut> cuts;
  std::int64_t scratch, state, transition, boundaries;  // floats each, and their number
  std::int64_t states_at, transitions_at, end;          // in bytes

  SegmentLayout(const op::Problem& p, int thread_count, std::int64_t scratch_floats)
      : threads(thread_count),
        cuts(cut_sequences(p, threads)),
        scratch(scratch_floats),
        state(state_floats(p.K, p.V)),
        transition(state_floats(p.K, p.K)),
        boundaries(boundary_count(p, cuts)),
        states_at(threads * scratch * 4),
        transitions_at(states_at + boundaries * state * 4),
        end(transitions_at + boundaries * transition * 4) {}
};

// Segment j of a cut.
Span segment(const op::Problem& p, const Cut& cut, std::int64_t j);

// The last (or, `from_start`, the first) chunks of the segment across which a state's norm provably falls below the tolerance, by
// log ||M||_2 <= sum(g + log max(1, |1 - beta |k|^2|)): what came before cannot matter then. Zero where there are none, or where
// context_parallel does not allow to cut.
std::int64_t warm_up_chunks(const op::Problem& p, const Span& span, std::int64_t h, bool from_start);

// One (cut, head, segment), as the schedulers' items are numbered.
struct Item {
  const Cut* cut;
  std::int64_t head, j;
};

// All of them, `heads` per cut; only those segments whose number `wanted(cut, j)` accepts.
template <class Wanted>
std::vector<Item> items_of(const std::vector<Cut>& cuts, std::int64_t heads, const Wanted& wanted) {
  std::vector<Item> items;
  for (const Cut& cut : cuts) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t j = 0; j < cut.count; ++j) {
        if (wanted(cut, j)) items.push_back({&cut, h, j});
      }
    }
  }
  return items;
}

// Zeroes the rows of tokens that belong to no sequence: those before the first and after the last.
void clear_outside(const op::Problem& p, const op::Tensor& x);

}  // namespace flashdelta::cpu
