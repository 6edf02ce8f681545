// How far back a state is forgotten, from what each chunk's transition forgets (layout.cuh): sums of bytes, the same for the windows that
// a pair is judged by and for the warm-up of a cut, so that a pair with a window has a warm-up of no more chunks at every cut.
#pragma once

#include "cuda/layout.cuh"
#include "cuda/segment/config.h"

namespace flashdelta::cuda::segment {

// A rehearsal has no bytes yet: these stand for a chunk that forgets all and for one that forgets nothing.
constexpr unsigned kAllForgotten = 0x7F7F7F7F, kNoneForgotten = 0;

// The least sums of four and of eight chunks in a row that end in the words added. Two 16-bit sums go through each register: those
// that end at even chunks, and at odd ones. What comes before the first word counts as forgetting all.
struct Sums {
  unsigned odd = 0x007F007F, odd2 = 0x00FE00FE, even2 = 0x00FE00FE, odd4 = 0x01FC01FC, even4 = 0x01FC01FC;
  unsigned least4 = 0x7FFF7FFF, least8 = 0x7FFF7FFF, signs = 0;

  __device__ __forceinline__ static unsigned before(unsigned last, unsigned here) { return __byte_perm(last, here, 0x5432); }
  __device__ __forceinline__ void add(unsigned word) {
    signs |= word;
    const unsigned even1 = word & 0x00FF00FF, odd1 = word >> 8 & 0x00FF00FF;
    const unsigned o2 = even1 + odd1, e2 = even1 + before(odd, odd1);
    const unsigned o4 = o2 + before(odd2, o2), e4 = e2 + before(even2, e2);
    least4 = __vminu2(least4, __vminu2(o4, e4));
    least8 = __vminu2(least8, __vminu2(o4 + odd4, e4 + even4));
    odd = odd1, odd2 = o2, even2 = e2, odd4 = o4, even4 = e4;
  }
  __device__ __forceinline__ static bool enough(unsigned least, unsigned wanted) { return min(least & 0xFFFF, least >> 16) >= wanted; }
  __device__ __forceinline__ bool never() const { return (signs & 0x80808080) != 0; }
};

// Bytes of chunks `first` to `first` + 3 that are not of the sequence's `chunks` become those of chunks that forget all: a window that
// reaches out of the sequence is then enough wherever the next one inside is.
__device__ __forceinline__ unsigned inside(unsigned word, int first, int chunks) {
  const unsigned from = __funnelshift_lc(0, ~0U, 8 * max(-first, 0)), to = __funnelshift_lc(0, ~0U, 8 * max(chunks - first, 0));
  const unsigned keep = from & ~to;
  return (word & keep) | (kAllForgotten & ~keep);
}

// Chunks of warm-up that reach the state before the chunk whose byte is at `cut`, `chunks` into its sequence; 0: none are enough.
static __device__ __noinline__ int warm_up(const signed char* cut, int chunks, int wanted) {
  static_assert(kMostWarmUp == 8);
  const auto address = reinterpret_cast<std::uintptr_t>(cut);
  const auto* from = reinterpret_cast<const unsigned*>((address & ~static_cast<std::uintptr_t>(3)) - kMostWarmUp);
  const int shift = 8 * static_cast<int>(address & 3);
  const unsigned first = __ldcg(from), second = __ldcg(from + 1), third = __ldcg(from + 2);
  unsigned low = __funnelshift_r(first, second, shift), high = __funnelshift_r(second, third, shift);
  int sum = 0;
#pragma unroll 1
  for (int i = 1; i <= min(chunks, kMostWarmUp); ++i) {
    const int here = static_cast<int>(high) >> 24;
    high = __funnelshift_l(low, high, 8), low <<= 8, sum += here;
    if (here < 0) break;
    if (sum >= wanted) return i;
  }
  return 0;
}

}  // namespace flashdelta::cuda::segment
