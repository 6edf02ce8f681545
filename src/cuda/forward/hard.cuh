// Hard chunks (prepare/README.md), token by token.
#pragma once

#include <type_traits>

#include "cuda/device/copy.cuh"
#include "cuda/forward/shared.cuh"

namespace flashdelta::cuda::forward {

__device__ __forceinline__ float* rests_of(Shared& s, int at, int w) { return reinterpret_cast<float*>(s.solve[at]) + w * kChunk; }

// A token with beta near 2 and a key of length 1 is a reflection: nothing is forgotten, and where its key comes again without gates, so
// does what rounding has made of beta / |k|^2, the same each time. It adds up with the number of tokens. So that factor has a second
// part: what beta / (|k|^2 + eps) exceeds beta * norm * norm in float32 by. One consumer, for a whole chunk, a token for two threads,
// into factors that hard chunks do not use. False, without any: none of the tokens is a reflection.
template <Operand Type>
__device__ __forceinline__ bool make_rests(Shared& s, int at, bool l2norm, int w, int warp, int lane) {
  const RecordTail& record = s.t[at].tail;
  const bool reflects = fmaxf(record.beta[lane], record.beta[lane + 32]) > 1.F + kLeastReflection;
  if (!l2norm || !__any_sync(~0U, reflects)) return false;
  const int t = warp * 16 + lane / 2, half = lane % 2;
  double squares[4] = {};
#pragma unroll 1
  for (int unit = 0; unit < 8; ++unit) {  // threads of a quarter of a warp at different ones, or their banks would meet
    const uint4 x = *reinterpret_cast<const uint4*>(s.k[at][half] + t * 128 + ((unit + t + 4 * half) & 7) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 k = device::unpack<Type>(i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w);
      squares[i] = fma(static_cast<double>(k.x), static_cast<double>(k.x), squares[i]);
      squares[i] = fma(static_cast<double>(k.y), static_cast<double>(k.y), squares[i]);
    }
  }
  double square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  square += __shfl_xor_sync(~0U, square, 1) + kNormEpsilon;
  const float norm = s.key[at][t], beta = record.beta[t];
  const double factor = static_cast<double>(beta) * norm * norm;
  const double more = 1. - square * norm * norm;  // of the order of 1e-7: its square is nothing
  if (half == 0) rests_of(s, at, w)[t] = static_cast<float>(factor + factor * more - static_cast<double>(beta * norm * norm));
  device::named_sync(kConsumerBarrier + w, 128);
  return true;
}

// A hard chunk, token by token in float32, on the state as it lies in registers, as exact as the recurrence itself. o replaces v in its
// tile, where it is wanted (full).
//
// What S holds is the state over exp(c - base): of gates, values and outputs alone get a factor, and the state one at the end. A factor for
// each token would be as many instructions again as a read, and rounds 1 - 1e-5, the same each time. Where gates are strong, base moves.
template <Operand Type>
__device__ __forceinline__ void step_through(const Arguments& a, Shared& s, float (&S)[64], int at, int w, unsigned char* v_tile, bool full,
                                             bool values, int warp, int lane) {
  using Element = std::conditional_t<Type == Operand::f16, __half, __nv_bfloat16>;
  const RecordTail& record = s.t[at].tail;
  const int pair = lane % 4, first = warp * 16 + lane / 4;  // its value columns: first and first + 8
  const bool rests = make_rests<Type>(s, at, a.l2norm, w, warp, lane);
  const auto decay = [&](float by) {
    const float factor = device::exp2_fast(by);
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] *= factor;
  };
  float base = 0.F;
#pragma unroll 1
  for (int t = 0; t < kChunk; ++t) {
    const float c = record.c[t];
    // Not `<=`, which NaN would pass by.
    if (!(c - base > -kMostPostponed)) decay(c - base), base = c;
    const auto channels = [&](const unsigned char (&tile)[2][kChunk * 128], int j) {  // 8 j + 2 pair and the one after it
      return device::unpack<Type>(*reinterpret_cast<const uint32_t*>(tile[j / 8] + t * 128 + (((j % 8) ^ (t & 7)) << 4) + pair * 4));
    };
    float read0 = 0.F, read1 = 0.F;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 k = channels(s.k[at], j);
      read0 = fmaf(k.x, S[4 * j], fmaf(k.y, S[4 * j + 1], read0)), read1 = fmaf(k.x, S[4 * j + 2], fmaf(k.y, S[4 * j + 3], read1));
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) read0 += __shfl_xor_sync(~0U, read0, o), read1 += __shfl_xor_sync(~0U, read1, o);
    const auto element = [&](int v) { return reinterpret_cast<Element*>(v_tile + t * 128 + (((v / 8) ^ (t & 7)) << 4) + v % 8 * 2); };
    Element* const v0 = element(first);
    Element* const v1 = element(first + 8);
    const float key = s.key[at][t], factor = record.beta[t] * key, read = a.l2norm ? factor * key : factor;
    const float rest = rests ? rests_of(s, at, w)[t] : 0.F, write = factor * device::exp2_fast(base - c);
    const float given0 = values ? static_cast<float>(*v0) : 0.F, given1 = values ? static_cast<float>(*v1) : 0.F;
    const float u0 = fmaf(write, given0, -fmaf(read, read0, rest * read0)), u1 = fmaf(write, given1, -fmaf(read, read1, rest * read1));
    if (!full) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 k = channels(s.k[at], j);
        S[4 * j] = fmaf(k.x, u0, S[4 * j]), S[4 * j + 1] = fmaf(k.y, u0, S[4 * j + 1]);
        S[4 * j + 2] = fmaf(k.x, u1, S[4 * j + 2]), S[4 * j + 3] = fmaf(k.y, u1, S[4 * j + 3]);
      }
      continue;
    }
    float o0 = 0.F, o1 = 0.F;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 k = channels(s.k[at], j), q = channels(s.q[at], j);
      S[4 * j] = fmaf(k.x, u0, S[4 * j]), S[4 * j + 1] = fmaf(k.y, u0, S[4 * j + 1]);
      S[4 * j + 2] = fmaf(k.x, u1, S[4 * j + 2]), S[4 * j + 3] = fmaf(k.y, u1, S[4 * j + 3]);
      o0 = fmaf(q.x, S[4 * j], fmaf(q.y, S[4 * j + 1], o0)), o1 = fmaf(q.x, S[4 * j + 2], fmaf(q.y, S[4 * j + 3], o1));
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) o0 += __shfl_xor_sync(~0U, o0, o), o1 += __shfl_xor_sync(~0U, o1, o);
    const float query = s.query[at][t] * device::exp2_fast(c - base);
    __syncwarp();
    if (pair == 0) *v0 = static_cast<Element>(query * o0), *v1 = static_cast<Element>(query * o1);
  }
  decay(record.c[kChunk - 1] - base);
  device::fence_shared_to_async();  // what was read is here
}

}  // namespace flashdelta::cuda::forward
