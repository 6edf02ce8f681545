// Items of a segment, and in which order tickets go to them.
#pragma once

#include "cuda/segment/config.h"
#include "cuda/segment/segment.hpp"

namespace flashdelta::cuda::segment {

struct alignas(16) Pair {
  int sequence, head, chunks, slot;  // slot: number of the sequence's first chunk
};

// Tickets: firsts, parts, pieces of the line for multiprocessors without a part, scans, the other pieces and dependents in either order.
struct Tickets {
  int firsts, parts, early_pieces, scans, late_pieces, dependents;  // dependents: or their halves
  // Behind short scans dependents are soon ready, and longer than pieces; behind long ones they would wait while pieces could be done.
  bool late_last;
  __device__ int part() const { return firsts; }
  __device__ int early() const { return part() + parts; }
  __device__ int scan() const { return early() + early_pieces; }
  __device__ int late() const { return scan() + scans + (late_last ? dependents : 0); }
  __device__ int dependent() const { return scan() + scans + (late_last ? 0 : late_pieces); }
  __device__ int count() const { return scan() + scans + late_pieces + dependents; }
  __device__ int exact_boundaries(bool halves) const { return halves ? dependents / kTiles : dependents; }
};

// One segment of a pair with its surroundings.
struct Segment {
  Pair pair;
  int j, count, begin, end, boundary;  // boundary: number of the one at its start; the next one's is one more
  int warm;                            // of its start; 0: it depends on the segment before (or is the first)
  bool dependent, next_dependent, after_dependent;
  bool halved;  // goes out as two halves of its value columns
  __device__ bool first() const { return j == 0; }
  __device__ bool last() const { return j + 1 == count; }
  __device__ bool starts_chain() const { return dependent && next_dependent && !after_dependent; }
};
template <class WarmOf>
__device__ __forceinline__ void look_around(Segment& x, WarmOf warm_of) {
  x.warm = x.first() ? 0 : warm_of(x.boundary);
  x.dependent = !x.first() && x.warm == 0;
  x.next_dependent = !x.last() && warm_of(x.boundary + 1) == 0;
  x.after_dependent = x.j > 1 && warm_of(x.boundary - 1) == 0;
}

struct Counts {
  int firsts, parts, scans, dependents;
  __device__ void add(const Segment& x) {
    const int copies = x.halved ? kTiles : 1;
    firsts += x.dependent ? 0 : copies, parts += x.dependent && x.next_dependent ? 2 : 0, scans += x.starts_chain() ? kScanBlocks : 0,
        dependents += x.dependent ? copies : 0;
  }
};

__device__ __forceinline__ void put(Item* items, int index, const Item& x) {
  static_assert(sizeof(Item) == 3 * sizeof(int4));
  int4* to = reinterpret_cast<int4*>(items + index);
  to[0] = make_int4(x.sequence, x.head, x.first, x.warm);
  to[1] = make_int4(x.chunks, static_cast<int>(x.from) | static_cast<int>(x.to) << 16, x.from_boundary, x.to_boundary);
  to[2] = make_int4(x.scan_steps, x.more, x.from_scan, x.consumers);
}

// Items of one segment, at its numbers within each kind. One loop, so that there is one place that writes items.
template <class WarmOf>
__device__ __forceinline__ void emit(Item* items, const Segment& x, const Tickets& t, const Counts& at, WarmOf warm_of) {
  Item item{x.pair.sequence, x.pair.head, x.begin, 0, x.end - x.begin, From::boundary, To::nowhere, x.boundary,
            x.boundary + 1,  0,           -1,      0, kBothConsumers};
  if (x.last()) item.to = To::final_state;
  int index = 0, count = 1;
  if (x.dependent) {
    // Its end is the scan's to write, unless no one waits for it.
    item.from_scan = x.after_dependent ? 1 : 0;
    index = t.dependent() + at.dependents;
    if (x.next_dependent) count = x.after_dependent ? 3 : 3 + kScanBlocks;
  } else {
    item.from = x.first() ? From::start : From::zero;
    if (x.next_dependent) item.to = To::boundary;
    item.first -= x.warm, item.chunks += x.warm, item.warm = x.warm;
    index = at.firsts;
  }
  if (x.halved) {
    item.consumers = 1;
    put(items, index++, item);
    item.consumers = 2;
  }
#pragma unroll 1
  for (int i = 1;; ++i) {
    put(items, index++, item);
    if (i == count) return;
    if (i == 1) {
      item.warm = item.chunks, item.from_scan = 0, item.consumers = kBothConsumers;
      item.from = From::identity, item.to = To::transition;
      index = t.part() + at.parts;
    } else if (i == 2) {
      item.from = From::zero, item.to = To::boundary;
    } else if (i == 3) {
      item.first = 0, item.warm = 1 << 30, item.chunks = 0, item.from = From::boundary;
#pragma unroll 1
      for (int j = x.j + 1; j < x.count && warm_of(x.boundary + j - x.j) == 0; ++j) ++item.scan_steps;
      index = t.scan() + at.scans;
    } else {
      ++item.first;
    }
  }
}

}  // namespace flashdelta::cuda::segment
