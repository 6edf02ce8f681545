// What the roles of the chunk loop share: stages, barriers, work on its way.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/forward/config.h"
#include "cuda/forward/forward.hpp"
#include "cuda/layout.cuh"
#include "cuda/segment/scan_sm90.cuh"

namespace flashdelta::cuda::forward {

using device::Barrier;
using device::Operand;
using std::uint32_t;
using std::uint64_t;

// A state that an item begins with and that copies bring: in four pieces, the first two into a stage's k and q, the others into two tiles
// of v.
enum class Staged : int { no, initial, boundary };

// An item and where its sequence lies: batch row, first token, tokens, number of the first chunk. chunks < 0: no more work.
struct Work {
  Item item;
  int row, token, length, slot;
  Staged staged;

  __device__ __forceinline__ bool full(int c) const { return c >= item.warm; }  // else the chunk only moves the state on
  __device__ __forceinline__ bool values() const { return item.from != From::identity; }
  // Stages before those of its chunks: a state's, or all of a scan's.
  __device__ __forceinline__ int stages_before() const { return staged == Staged::no ? 2 * item.scan_steps : 1; }
  __device__ __forceinline__ bool takes_part(int w) const { return (item.consumers >> w & 1) != 0; }
};

// Where the chunk of o that a tile of v becomes goes.
struct Output {
  const CUtensorMap* map;  // null: nowhere
  int consumers, head, token, row;
};

struct alignas(1024) Shared {
  unsigned char k[kStages][2][kChunk * 128], q[kStages][2][kChunk * 128];  // 128-byte swizzled halves
  unsigned char v[kValueStages][2][kChunk * 128];
  struct alignas(256) Record {
    unsigned char panels[kStagedPanelBytes];
    RecordTail tail;
  } t[kStages];                                               // T as the products want it
  alignas(1024) unsigned char p[kStages][kStagedPanelBytes];  // P in the same panels
  // Per token; 1 / |k| and 1 / |q| with the l2-norm only, or else 2^-e for 1 / |k|.
  float4 solve[kStages][kChunk / 2];  // of two tokens: -beta gam / |k|, what k S is scaled by; then beta
  float write[kStages][kChunk];       // exp(c_last - c) / |k|: what U is scaled by on its way into the state
  float out[kStages][kChunk];         // gam * scale / |q|
  float query[kStages][kChunk];       // scale / |q|
  float key[kStages][kChunk];         // 1 / |k|
  float column[kStages][kChunk];      // exp(r - c) / |k|, r the c of its sixteen tokens' last: P's columns below its diagonal blocks
  float decay[kStages];               // exp(c_last)
  Work work[kWorkRing];
  Output output[kValueStages];
  segment::ScanShared scan;
  // Every phase has someone who waits for it, also where what it tells is not wanted: a phase that passes unseen looks like a mistake.
  Barrier loaded[kStages], normed[kStages], made[kStages], p_made[kStages], released[kStages];
  Barrier v_loaded[kValueStages], v_replaced[kValueStages];  // replaced: by o, or read where there is none
  Barrier item_full[kWorkRing], item_empty[kWorkRing];
  int scanned, announced;  // steps of scans: written to global memory so far, and made known to other multiprocessors
};
static_assert(sizeof(Shared) <= 227 * 1024, "more than a multiprocessor's shared memory");

// A ring's place: index and phase parity.
template <int N>
struct Place {
  int at = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == N) at = 0, parity ^= 1;
  }
};

// Work comes through a ring: the producer is up to three chunks ahead of the others. It is read where it lies (the consumers have no
// registers for it) and given back when done.
struct WorkReader {
  Place<kWorkRing> place;
  __device__ __forceinline__ const Work& next(Shared& s) {
    device::barrier_wait(s.item_full[place.at], place.parity);
    return s.work[place.at];
  }
  __device__ __forceinline__ void done(Shared& s) {
    device::barrier_arrive(s.item_empty[place.at]);
    place.next();
  }
};

__device__ __forceinline__ const CUtensorMap* bounded(const Arguments& a, int sequence, MapIndex which) {
  return a.bounded_maps + sequence * kMaps + which;
}

}  // namespace flashdelta::cuda::forward
