// What the warps of a CTA share while they prepare a work item.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/layout.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/prepare.hpp"

namespace flashdelta::cuda::prepare {

using device::Barrier;
using device::Operand;
using std::uint32_t;

// One value head's factors, per token of the chunk; b is beta, times 4^e where keys are scaled by 2^-e.
struct Factors {
  float2 gate[kChunk];    // c in units of log 2, -b
  __half row[kChunk];     // -b exp(c - c at the end of the block before)
  __half column[kChunk];  // exp(c at the end of this block - c)
};

// CTAs that take items. Where there is to be a plan, another one behind them tells whether the loop has to wait for it.
__device__ __forceinline__ int workers(const Arguments& a) { return static_cast<int>(gridDim.x) - (a.plan != nullptr ? 1 : 0); }

// Where a work item, a chunk of a key head, lies.
struct Place {
  std::int64_t g, beta;  // byte of the gates, of beta, at its first token and value head
  int row, token, slot, h;
  int rows;  // tokens of the chunk; or kNoMore, kNotYet
};
constexpr int kNoMore = 0, kNotYet = -1;
// Places are found kBatch at a time, a lane each (config.h). Warps are at most one item apart, and one place behind a batch says how it
// goes on.
constexpr int kPlaces = 16;
static_assert(kPlaces >= kBatch + 3 && kPlaces > 1 && (kPlaces & (kPlaces - 1)) == 0);
__device__ __forceinline__ int place_of(int n) { return n & (kPlaces - 1); }  // item n's

// A value head's gates and betas as given, and later its factors. The padding keeps heads, which are written together, on different banks.
union Head {
  struct {
    float g[kChunk], beta[kChunk];
  } given;
  Factors factors;
  unsigned char padded[800];
};

// K K^T, left by the warps for one another.
template <bool Split>
struct Exchanged {
  float2 diagonal[4][3][32];                             // the diagonal blocks' upper triangles, accumulator layout, lane last
  alignas(16) uint32_t above[Split ? 12 : 6][2][2][32];  // blocks above it, [pair][row half][column half][lane], fp16; what fp16 lost
};
// What is there only after the products of keys.
template <int Heads, bool Split>
struct Derived : Exchanged<Split> {
  unsigned char record[Heads][record_bytes(true)];
  Head head[Heads];
};
// Of one head by four warps, with factors of their own each: none waits for another's.
template <>
struct Derived<1, false> : Exchanged<false> {
  unsigned char record[1][record_bytes(true)];
  Head head[1];  // as given
  Factors factors[4];
  uint32_t columns[3][3][32];  // what blocks below diagonal block J are multiplied by: T_JJ with its column factor, B fragments
  float2 squares[4];           // each diagonal block's part of the sums that tell a hard chunk
};

// Split: operands of two fp16 numbers.
template <int Heads, bool Split>
struct alignas(1024) Shared {
  unsigned char k[2 * kChunk * 128];  // two halves of K, 128-byte swizzled
  alignas(128) float norm[kChunk];    // |k|^2
  float key_scale[kChunk];            // what keys are multiplied by, where they are
  Derived<Heads, Split> derived;
  Inputs inputs;  // for functions out of line: they would read the kernel's parameters from memory
  Place place[kPlaces];
  int covered;  // Sequences::covered()
  Barrier full;

  // 128 bytes for each warp that nothing else uses before the first item: of `norm` and `key_scale`.
  __device__ __forceinline__ unsigned char* scratch(int warp) { return reinterpret_cast<unsigned char*>(norm) + warp * 128; }
};

}  // namespace flashdelta::cuda::prepare
