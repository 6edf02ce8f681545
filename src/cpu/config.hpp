// Constants of the CPU backend, each with its reason.
#pragma once

#include <cstddef>
#include <cstdint>

#include "flashdelta/flashdelta.h"

namespace flashdelta::cpu {

constexpr int kChunk = FLASHDELTA_CHUNK;

// What a thread's scratch has to stay below; the widths that follow are chosen for it.
constexpr std::int64_t kScratchBytes = 512 << 10;

// Tokens that are worked on at a time: half a chunk, whose products of tokens with tokens are half the work, and whose tiles of keys stay
// in the L1 cache beside a block of the state. The backward makes the state between the halves again for that: together no more work at K =
// V = 128.
constexpr int kHalf = kChunk / 2;

// Value columns that are worked on at a time. A row of them is two cache lines, the widest panel of a product: tiles of such rows use all
// sets of the L1 cache with no padding.
constexpr int kValueBlock = 32;

// Key columns of which the backward makes dq at a time.
constexpr int kKeyBlock = 64;

// Padding of tile widths, in floats: the widest SIMD vector (AVX-512), so that no product has a ragged last vector.
constexpr std::int64_t kPad = 16;

// Log gates below this act as this: exp is 0 in float64 already, and -inf - -inf never arises.
constexpr double kGateFloor = -1000.0;

// A chunk in which roundings last is solved in float64 (simd/hard-inl.h). Only tokens with beta |k|^2 this much above 1 can make it one,
// since of what others round a third is left after five of them ...
constexpr double kLeastReflection = 0.8;
// ... and their pairs must have this mean: 1 for equal keys with beta 2, 1/4 for four directions in turn, 1 / K for independent keys.
constexpr double kHardMean = 0.02;

// A segment's extra pass (local state and transition) must be worth its work: no segment below this many chunks ...
constexpr std::int64_t kMinSegmentChunks = 4;
// ... and none unless the longest sequence is this many times what a thread would get of an even split.
constexpr double kSegmentThreshold = 2.0;
constexpr std::int64_t kMaxSegments = 64;

// Starting a thread costs some 20 us, about this many multiply-adds.
constexpr double kMinMacsPerThread = 1 << 19;

// A row stride, in floats, that is an odd number of cache lines: a column panel of a tile then spreads over all sets of the L1 cache.
constexpr std::int64_t padded(std::int64_t width) { return (width + kPad - 1) / kPad * kPad; }
constexpr std::int64_t leading(std::int64_t width) {
  const std::int64_t p = padded(width);
  return (p / kPad) % 2 == 0 ? p + kPad : p;
}

// Row stride of C x C matrices, C a chunk or half of one.
template <int C>
constexpr std::int64_t kSquare = C > kValueBlock ? leading(C) : C;

}  // namespace flashdelta::cpu
