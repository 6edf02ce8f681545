// How a thread's scratch is cut into tiles, and how much of it there is. All tiles start on a cache line.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/config.hpp"
#include "op/problem.hpp"

namespace flashdelta::cpu {

// Hands out consecutive tiles; with a null base it only counts.
class Cutter {
 public:
  explicit Cutter(float* base) : base_(base) {}
  float* take(std::int64_t floats) {
    float* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (floats + kPad - 1) / kPad * kPad;
    return at;
  }
  [[nodiscard]] std::int64_t used() const { return used_; }

 private:
  float* base_;
  std::int64_t used_ = 0;
};

// Floats that a float64 chunk x chunk matrix takes: `wide`, for the inverse, in a tile that is not in use yet.
constexpr std::int64_t kWide = 2 * kChunk * kChunk;

// Forward. R holds q, then v, R, and o. kT lives until R is made, then U takes its place.
struct ForwardScratch {
  double* wide;
  float *k, *qT, *R, *U, *kT, *L, *G, *T, *P;
  std::int64_t used;

  ForwardScratch(const op::Problem& p, float* base) {
    const std::int64_t keys = kChunk * leading(p.K), values = kChunk * leading(std::max(p.K, p.V)), square = kChunk * kSquare;
    Cutter cut(base);
    k = cut.take(keys);
    qT = cut.take(padded(p.K) * kSquare);
    R = cut.take(std::max(values, kWide));
    wide = reinterpret_cast<double*>(R);
    U = kT = cut.take(std::max(values, padded(p.K) * kSquare));
    L = cut.take(square);
    G = cut.take(square);
    T = cut.take(square);
    P = cut.take(square);
    used = cut.used();
  }
};

// The reverse chain alone.
struct BackwardStateScratch {
  double* wide;
  float *k, *q, *d_o, *dU, *dX, *kT, *L, *G, *T, *P;
  std::int64_t used;

  BackwardStateScratch(const op::Problem& p, float* base) {
    const std::int64_t keys = kChunk * leading(p.K), values = kChunk * leading(std::max(p.K, p.V)), square = kChunk * kSquare;
    Cutter cut(base);
    k = cut.take(keys);
    q = cut.take(keys);
    d_o = cut.take(std::max(values, kWide));
    wide = reinterpret_cast<double*>(d_o);
    dU = kT = cut.take(std::max(values, padded(p.K) * kSquare));
    dX = cut.take(values);
    L = cut.take(square);
    G = cut.take(square);
    T = cut.take(square);
    P = cut.take(square);
    used = cut.used();
  }
};

// Backward, by blocks of kValueBlock value columns. kT lives only until k k^T and q k^T are made, then the value tiles take its place;
// W (K wide) takes R's and U's place when those are done with. L's buffer becomes dP, G's becomes dL, and T's the second G.
struct BackwardScratch {
  double* wide;
  float *k, *q, *dq, *dk, *R, *U, *d_o, *dX, *UT, *kT, *W, *S, *ST, *kk, *qk, *T, *P, *dP, *dL;
  float* states;  // [checkpoint_chunks][HV / H] recomputed states; null where every state is saved
  std::int64_t used;

  BackwardScratch(const op::Problem& p, float* base) {
    const std::int64_t keys = kChunk * leading(p.K), square = kChunk * kSquare, values = kChunk * leading(kValueBlock);
    Cutter cut(base);
    k = cut.take(keys);
    q = cut.take(keys);
    dq = cut.take(kChunk * padded(p.K));
    dk = cut.take(kChunk * padded(p.K));
    R = kT = W = cut.take(values);
    wide = reinterpret_cast<double*>(R);
    U = cut.take(std::max(values, keys - values));
    d_o = cut.take(values);
    dX = cut.take(values);
    UT = cut.take(kValueBlock * kSquare);
    S = cut.take(padded(p.K) * leading(kValueBlock));
    ST = cut.take(kValueBlock * leading(p.K));
    kk = cut.take(square);
    qk = cut.take(square);
    T = cut.take(square);
    P = cut.take(square);
    dP = cut.take(square);
    dL = cut.take(square);
    states = nullptr;
    if (p.checkpoint_chunks > 1) {
      // The recomputation borrows the tiles above for its own.
      cut.take(std::max<std::int64_t>(0, ForwardScratch(p, nullptr).used - cut.used()));
      states = cut.take((p.checkpoint_chunks + 1) * (p.HV / p.H) * p.K * leading(p.V));
    }
    used = cut.used();
  }
};

// Token by token: the state with value columns as rows, and the tile through which it is transposed.
struct RecurrentScratch {
  float *S, *tile, *k, *q, *v, *o;
  std::int64_t used;

  RecurrentScratch(const op::Problem& p, float* base) {
    Cutter cut(base);
    S = cut.take(padded(p.V) * padded(p.K));
    tile = cut.take(padded(p.K) * leading(p.V));
    k = cut.take(padded(p.K));
    q = cut.take(padded(p.K));
    v = cut.take(padded(p.V));
    o = cut.take(padded(p.V));
    used = cut.used();
  }
};

}  // namespace flashdelta::cpu
