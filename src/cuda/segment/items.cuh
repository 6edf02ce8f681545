// What the plan of segments hands to the chunk loop: a list of work items, and where states at segment boundaries lie. Both kernels and
// the host read it here. docs/context_parallel.md tells the whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/layout.cuh"

namespace flashdelta::cuda {

// Where an item's state comes from and where it goes.
enum class From : std::int16_t { start, zero, identity, boundary };  // start: the sequence's initial state
enum class To : std::int16_t { nowhere, final_state, boundary, transition };

// One value head of one sequence over chunks [first, first + chunks). The first `warm` of them only move the state on: they warm it up, or
// make a segment's local state or its transition (from the identity, without values).
// scan_steps > 0: no chunks, but columns [16 * first, + 16) of the states at the boundaries after from_boundary, one after another.
struct Item {
  std::int32_t sequence, head, first, warm, chunks;
  From from;
  To to;
  std::int32_t from_boundary, to_boundary;
  std::int32_t scan_steps;
  std::int32_t more;       // the item to go on with, or -1
  std::int32_t from_scan;  // from_boundary's state is of the scan's making, not of one item's
  std::int32_t consumers;  // bit w: value columns 64 w .. 64 w + 63
};
constexpr int kBothConsumers = 3;
static_assert(sizeof(Item) == 48);

// Whether two halves of every pair have a multiprocessor each: what is cut nowhere then goes out so.
__host__ __device__ constexpr bool halves_fit(std::int64_t pairs, int multiprocessors) { return kTiles * pairs <= multiprocessors; }

constexpr int kScanColumns = 16;  // of a scan item
constexpr int kScanBlocks = kHead / kScanColumns;
// Arrivals that complete a boundary: both consumers of the one item that ends there, or of the transition and the local state.
constexpr int kArrivalsWhole = 2, kArrivalsParts = 4;

// A plan's header in the workspace, one word, so that who sees that the plan is ready has all of it. Tickets below `tickets` are items;
// those from there on are (sequence, head) pairs in order, of which the ones of more than `longest_whole` chunks are in the items already.
// The loop begins when it is ready, not when the plan's launch has ended. `prepare` marks it as not ready before anything is
// launched behind it. Then `prepare`, where lengths tell that nothing is cut, or the plan hands it out, whoever comes first.
struct PlanHeader {
  std::uint64_t word;

  __host__ __device__ static constexpr PlanHeader not_ready() { return {0}; }
  // halves: pairs that are no items go out as two halves of their value columns.
  __host__ __device__ static constexpr PlanHeader of(int tickets, int longest_whole, bool halves) {
    return {std::uint64_t{1} | static_cast<std::uint64_t>(halves) << 1 | static_cast<std::uint64_t>(tickets) << 2 |
            static_cast<std::uint64_t>(longest_whole) << 32};
  }
  __host__ __device__ constexpr bool ready() const { return (word & 1) != 0; }
  __host__ __device__ constexpr bool halves() const { return (word & 2) != 0; }
  __host__ __device__ constexpr int tickets() const { return static_cast<int>(static_cast<std::uint32_t>(word) >> 2); }
  __host__ __device__ constexpr int longest_whole() const { return static_cast<int>(word >> 32); }
};
constexpr int kAllWhole = 0x7FFFFFFF;  // longest_whole of a call that is cut nowhere

struct Plan {
  PlanHeader* header;  // null: no plan, all tickets are pairs
  Item* items;
  std::int32_t* arrived;       // per boundary
  std::int32_t* scanned;       // per boundary: column blocks of its state that the scan has done
  std::int32_t* warm;          // per boundary: chunks of warm-up that reach its state; 0: none are enough
  float* states;               // per boundary: [128][128]; the local state first where the scan makes it whole
  std::uint32_t* transitions;  // per boundary: 64 KB, of the segment that ends there, in scan_sm90.cuh's form
  std::int32_t* initial_read;  // per pair, where final_state overwrites initial_state: 2 once the initial state has been read; else null
};

}  // namespace flashdelta::cuda
