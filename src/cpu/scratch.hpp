// How a thread's scratch is cut into tiles, and how much of it there is. All tiles start on a cache line.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/config.hpp"
#include "cpu/kernels.hpp"
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

// Floats that a float64 C x C matrix takes: `wide`, for the inverse, in a tile that is not in use yet.
constexpr std::int64_t wide_floats(std::int64_t C) { return 2 * C * C; }

// C tokens, by blocks of kValueBlock value columns. Before they are transposed q and k stand in `rows`, over the tiles from T on. T is L
// first, and inverted over G, R and U.
template <int C>
struct ChunkScratch {
  double* wide;
  float *rows, *kT, *qT, *T, *P, *G, *R, *U;
  std::int64_t used;

  ChunkScratch(const op::Problem& p, float* base) {
    constexpr std::int64_t square = C * kSquare<C>, values = C * kValueBlock;
    static_assert(square + 2 * values >= wide_floats(C));
    Cutter cut(base);
    kT = cut.take(padded(p.K) * kSquare<C>);
    qT = cut.take(padded(p.K) * kSquare<C>);
    for (float** tile : {&T, &P, &G}) *tile = cut.take(square);
    R = cut.take(values);
    U = cut.take(values);
    cut.take(std::max<std::int64_t>(0, C * leading(p.K) - 3 * square - 2 * values));
    rows = T;
    wide = reinterpret_cast<double*>(G);
    used = cut.used();
  }
};

// Forward, by halves of a chunk; R becomes o. What saved_T wants of whole chunks is made in the same place before.
struct ForwardScratch : ChunkScratch<kHalf> {
  ForwardScratch(const op::Problem& p, float* base) : ChunkScratch<kHalf>(p, base) {
    if (p.saved_T) used = std::max(used, ChunkScratch<kChunk>(p, nullptr).used);
  }
};

// The reverse chain alone, by whole chunks.
struct BackwardStateScratch {
  double* wide;
  float *rows, *kT, *qT, *T, *P, *G, *d_o, *dU, *dX;
  std::int64_t used;

  BackwardStateScratch(const op::Problem& p, float* base) {
    const ChunkScratch<kChunk> s(p, base);
    wide = s.wide, rows = s.rows, kT = s.kT, qT = s.qT, T = s.T, P = s.P, G = s.G, d_o = s.R, dU = s.U;
    Cutter cut(base);
    cut.take(s.used);
    dX = cut.take(kChunk * kValueBlock);
    used = cut.used();
  }
};

// How a key head's value heads share a thread's scratch in the backward: as many are worked on together as there is room for the gradients
// of their states. The last group is a full one. Where the sum of dk over the heads has no place between groups (see Park), the gradients
// of all states are kept, and only the order of sums is that of groups.
struct HeadGroups {
  std::int64_t ratio, size;
  bool live;

  explicit HeadGroups(const op::Problem& p);
  // Heads of the group that starts at `first`.
  [[nodiscard]] std::int64_t at(std::int64_t first) const { return first == 0 && ratio % size > 0 ? ratio % size : size; }
};

// Backward, by halves of a chunk and blocks of kValueBlock value columns. Tiles of keys and of their gradients are transposed,
// [padded(K), kHalf]; on their way in and out they stand row by row in `rows`, S's tile. G is first dL's tile, then T's. The inverse is
// made over R and kS, whose place W, kKeyBlock key columns of dq, takes when they are done with; dX transposed takes U's, dU d_oT's.
struct BackwardScratch {
  double* wide;
  float *kT, *qT, *dqT, *dkT, *S, *rows, *R, *kS, *W, *U, *dXT, *d_o, *d_oT, *dX, *UT, *kk, *qk, *T, *P, *dP, *dL, *E, *N;
  float *kT_first, *kk_first, *T_first;  // of the chunk's first half, while the second is worked on
  float* states;                         // [checkpoint_chunks][HV / H] recomputed states; null where every state is saved
  std::int64_t tiles;                    // floats used without those
  std::int64_t used;

  BackwardScratch(const op::Problem& p, const HeadGroups& groups, float* base) {
    const std::int64_t keys = padded(p.K) * kHalf, values = kHalf * kValueBlock, square = kHalf * kSquare<kHalf>;
    static_assert(2 * values >= kKeyBlock * kHalf && 2 * values >= wide_floats(kHalf));
    Cutter cut(base);
    for (float** tile : {&kT, &qT, &kT_first, &dqT, &dkT}) *tile = cut.take(keys);
    S = rows = cut.take(std::max<std::int64_t>(keys, padded(p.K) * kValueBlock));
    for (float** tile : {&R, &kS, &U, &d_o, &d_oT, &dX, &UT}) *tile = cut.take(values);
    W = R;
    wide = reinterpret_cast<double*>(R);
    dXT = U;
    for (float** tile : {&kk, &kk_first, &qk, &T, &T_first, &P, &dP, &dL}) *tile = cut.take(square);
    E = dP;
    N = dL;
    if (groups.size > 1) {  // their sums over the value heads
      E = cut.take(square);
      N = cut.take(square);
    }
    tiles = cut.used();
    states = nullptr;
    if (p.checkpoint_chunks > 1) {
      // The recomputation borrows the tiles above for its own.
      cut.take(std::max<std::int64_t>(0, ForwardScratch(p, nullptr).used - cut.used()));
      states = cut.take(p.checkpoint_chunks * (p.HV / p.H) * state_floats(p.K, p.V));
    }
    used = cut.used();
  }
};

inline HeadGroups::HeadGroups(const op::Problem& p) : ratio(p.HV / p.H), size(ratio), live(false) {
  const auto bytes = [&] { return 4 * (BackwardScratch(p, *this, nullptr).tiles + size * state_floats(p.K, p.V)); };
  if (bytes() < kScratchBytes) return;
  size = std::max<std::int64_t>(1, (kScratchBytes / 4 - 1 - BackwardScratch(p, *this, nullptr).tiles) / state_floats(p.K, p.V));
  live = size < ratio && p.dk && !p.dq && p.dk.dtype != op::DType::f32;
}

// Token by token: the state with value columns as rows, and the tile through which it is transposed, some columns at a time.
constexpr std::int64_t kTransposed = 64;
struct RecurrentScratch {
  float *S, *tile, *k, *q, *v, *o;
  std::int64_t used;

  RecurrentScratch(const op::Problem& p, float* base) {
    Cutter cut(base);
    S = cut.take(padded(p.V) * padded(p.K));
    tile = cut.take(padded(p.K) * leading(std::min(p.V, kTransposed)));
    k = cut.take(padded(p.K));
    q = cut.take(padded(p.K));
    v = cut.take(padded(p.V));
    o = cut.take(padded(p.V));
    used = cut.used();
  }
};

}  // namespace flashdelta::cpu
