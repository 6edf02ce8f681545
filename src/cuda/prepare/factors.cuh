// From gates and betas as given to a value head's factors, per token of the chunk.
//
// Gates enter as exp(c_i - r) and exp(r - c_j), r the sum at the end of block J or of the block before I: no exponent is positive.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/gram.cuh"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// Bits of what tokens `token` and token + 32 of a head were given: turning them into numbers would wait for them. Tokens past the rows get
// the last one's: a branch around each load takes longer, and who uses them looks. What is absent has bits 0.
__device__ __forceinline__ void load_given(uint32_t (&to)[2], const PerToken& x, std::int64_t first, int head, int token, int rows) {
  to[0] = to[1] = 0;
  if (x.data == nullptr || rows <= 0) return;
  const char* at = x.data + (first + static_cast<unsigned>(head) * x.head);
  const auto last = static_cast<unsigned>(rows - 1), wanted = static_cast<unsigned>(token);
  to[0] = device::load_bits(at + min(wanted, last) * x.token, x.type);
  to[1] = device::load_bits(at + min(wanted + 32, last) * x.token, x.type);
}

// Gates and betas as given, of W value heads from the pass's first on: tokens t and t + 32 of one head a thread, so that neighbours read
// neighbouring heads.
template <int W>
struct Given {
  uint32_t g[2], beta[2];

  __device__ __forceinline__ void load(const Arguments& a, const Place& at, int pass, unsigned tid) {
    const int head = min(pass + static_cast<int>(tid % W), a.group - 1), token = static_cast<int>(tid / W);
    load_given(g, a.g, at.g, head, token, at.rows);
    load_given(beta, a.beta, at.beta, head, token, at.rows);
  }
  template <class S>
  __device__ __forceinline__ void put(const Arguments& a, S& s, unsigned tid) const {
    const unsigned head = tid % W, token = tid / W;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto& to = s.derived.head[head].given;
      to.g[token + 32 * i] = device::from_bits(g[i], a.g.type);
      to.beta[token + 32 * i] = a.beta.data == nullptr ? 1.F : device::from_bits(beta[i], a.beta.type);
    }
  }
};

__device__ __forceinline__ float softplus(float x) { return x > 20.F ? x : log1pf(expf(x)); }

// Log gates and betas of tokens 2 lane and 2 lane + 1.
struct Gates {
  float g0, g1, b0, b1;
};

// In-kernel gate and sigmoid: their library functions would push the common path out of the instruction cache.
static __device__ __noinline__ Gates activate_raw(const Arguments& a, Gates x, int head) {
  if (a.gate_in_kernel) {
    const float rate = -expf(device::load_element(a.A_log.data, a.A_log.type, head * a.A_log.head));
    const float bias = a.dt_bias.data == nullptr ? 0.F : device::load_element(a.dt_bias.data, a.dt_bias.type, head * a.dt_bias.head);
    x.g0 = rate * softplus(x.g0 + bias), x.g1 = rate * softplus(x.g1 + bias);
  }
  if (a.beta_sigmoid) {
    const float most = a.neg_eigval ? 2.F : 1.F;
    x.b0 = most / (1.F + expf(-x.b0)), x.b1 = most / (1.F + expf(-x.b1));
  }
  return x;
}

// A gate at least kLowestGate, by a comparison that NaN passes through.
__device__ __forceinline__ float held_up(float g) { return g < kLowestGate ? kLowestGate : g; }

// Given values to log gates and betas; tokens past the sequence's end get 0 and 0. `whole`: the gates before kLowestGate.
__device__ __forceinline__ Gates activate(const Arguments& a, const float* g, const float* beta, int rows, int head, int lane,
                                          float2& whole) {
  const float2 given_g = reinterpret_cast<const float2*>(g)[lane], given_beta = reinterpret_cast<const float2*>(beta)[lane];
  Gates x{given_g.x, given_g.y, given_beta.x, given_beta.y};
  if (a.gate_in_kernel || a.beta_sigmoid) x = activate_raw(a, x, head);
  if (2 * lane >= rows) x.g0 = x.b0 = 0.F;
  if (2 * lane + 1 >= rows) x.g1 = x.b1 = 0.F;
  whole = make_float2(x.g0 < kLowestSavedGate ? kLowestSavedGate : x.g0, x.g1 < kLowestSavedGate ? kLowestSavedGate : x.g1);
  x.g0 = held_up(x.g0), x.g1 = held_up(x.g1);
  return x;
}

// exp of the sums at the ends of blocks 0, 1, 2 between one another.
struct BlockDecay {
  float d20, d31, d30;
};

// Everything of a value head that is per token. Returns whether the inverse needs split operands.
__device__ __forceinline__ bool make_factors(const Gates& x, const float* key_scale, bool powers, Factors& f, BlockDecay& decay, float2& c,
                                             int lane) {
  float sum = x.g0 + x.g1;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const float before = __shfl_up_sync(~0U, sum, o);
    if (lane >= o) sum += before;
  }
  float before = __shfl_up_sync(~0U, sum, 1);
  if (lane == 0) before = 0.F;
  c.x = before + x.g0, c.y = c.x + x.g1;
  const float c0 = c.x * kLog2e, c1 = c.y * kLog2e;
  const float end_before = __shfl_sync(~0U, c1, ((lane & 24) + 31) & 31), base = lane < 8 ? 0.F : end_before;
  const float end = __shfl_sync(~0U, c1, lane | 7);
  const float end0 = __shfl_sync(~0U, c1, 7), end1 = __shfl_sync(~0U, c1, 15), end2 = __shfl_sync(~0U, c1, 23);
  decay = {device::exp2_fast(end1 - end0), device::exp2_fast(end2 - end1), device::exp2_fast(end2 - end0)};
  float b0 = x.b0, b1 = x.b1;
  if (powers) {
    const float s0 = key_scale[2 * lane], s1 = key_scale[2 * lane + 1];
    b0 /= s0 * s0, b1 /= s1 * s1;
  }
  const float row0 = -b0 * device::exp2_fast(c0 - base), row1 = -b1 * device::exp2_fast(c1 - base);
  const float left0 = device::exp2_fast(end - c0), left1 = device::exp2_fast(end - c1);
  __syncwarp();
  reinterpret_cast<float4*>(f.gate)[lane] = make_float4(c0, -b0, c1, -b1);
  reinterpret_cast<uint32_t*>(f.row)[lane] = device::pack_f16(row0, row1);
  reinterpret_cast<uint32_t*>(f.column)[lane] = device::pack_f16(left0, left1);
  __syncwarp();
  return __any_sync(~0U, b0 > kSplitAbove || b1 > kSplitAbove);
}

// What beta and keys may add to the log of the transition's norm, which is the gates' sum else: log |1 - beta |k|^2| where that is above 0.
__device__ __forceinline__ float log_growth(const Gates& x, const float* norm, bool l2norm, int lane) {
  const float2 square = l2norm ? make_float2(1.F, 1.F) : reinterpret_cast<const float2*>(norm)[lane];
  const float most0 = fabsf(1.F - x.b0 * square.x), most1 = fabsf(1.F - x.b1 * square.y);
  float growth = 0.F;
  if (__any_sync(~0U, !(most0 <= 1.F && most1 <= 1.F))) {
    growth = (most0 <= 1.F ? 0.F : logf(most0)) + (most1 <= 1.F ? 0.F : logf(most1));
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) growth += __shfl_xor_sync(~0U, growth, o);
  }
  return growth;
}

}  // namespace flashdelta::cuda::prepare
