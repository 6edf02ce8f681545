// What `prepare` leaves for the chunk loop, and how a sequence's chunks are numbered. Both kernels and the host read it here.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device/element.cuh"

namespace flashdelta::cuda {

constexpr int kChunk = 64;  // tokens of a chunk: one wgmma M
constexpr int kHead = 128;  // K and V
// A state comes in pieces of 32 columns, 128 bytes of float32 a row.
constexpr int kPieceColumns = 32, kPieceBytes = kPieceColumns * kHead * 4;
constexpr int kTile = 64;  // channels of a shared-memory tile: 128 bytes, the widest swizzle
constexpr int kTiles = kHead / kTile;
constexpr int kTileBytes = kChunk * kTile * 2;
constexpr float kLog2e = 1.4426950408889634F;
constexpr double kNormEpsilon = 1e-6;  // of the l2-norm, by definition

// A log gate below this forgets everything in float32 (exp(-128) is less than half its smallest number), and -inf would leave inf - inf
// behind. Not lower: the sum of a chunk's gates must keep small gates beside such ones (64 * 128 has a rounding of 5e-4).
constexpr float kLowestGate = -128.F;
constexpr float kLowestSavedGate = -1000.F;  // of saved_c, whose values others compare

// A record stands for one chunk of one value head:
//   T       its 16 x 16 blocks on and below the diagonal, 16 bit, as four column panels: panel J holds rows 16 J .. 63 of columns
//           16 J .. 16 J + 15, 32 bytes a row, 32-byte swizzled; the blocks above are zero and are not stored
//   c       64 floats, the inclusive sum of the log gates in units of log 2
//   beta    64 floats. Not folded into T: its diagonal stays 1, which 16 bits hold exactly
//   e       64 signed bytes: keys of a chunk with long ones are used as 2^-e k, and T is that of the scaled keys
//   hard    an integer: not 0 where the chunk's products cancel too much for 16-bit operands; the loop then goes token by token
//   norms   64 floats, 1 / |k|; only with the l2-norm
constexpr int kPanelBytes = 5120;
constexpr int kFactorBytes = kChunk * 4;
constexpr int kExponentBytes = kChunk + 16;  // with `hard`, padded to what bulk copies take
struct RecordTail {                          // what follows the panels
  float c[kChunk];
  float beta[kChunk];
  signed char exponent[kChunk];
  int hard, padding[3];
  float norm[kChunk];
};
static_assert(sizeof(RecordTail) == 3 * kFactorBytes + kExponentBytes);
__host__ __device__ constexpr int panel_offset(int j) { return j == 0 ? 0 : j == 1 ? 2048 : j == 2 ? 3584 : 4608; }
__host__ __device__ constexpr int record_bytes(bool l2norm) { return kPanelBytes + kExponentBytes + (l2norm ? 3 : 2) * kFactorBytes; }

// What a chunk's transition forgets, for the plan of segments: a byte for every chunk and value head, of which a value head's lie in a row.
// Eighths of a nat, rounded down, so that sums of them claim no more than is so; kForgottenMost stands for more as well. Negative: the
// chunk may enlarge the state, or nothing is known of it.
constexpr float kForgottenUnit = 0.125F;
constexpr int kForgottenMost = 127;
constexpr int kForgottenGroup = 16;  // bytes that the plan loads at once; rows begin at multiples, and as many bytes precede the first
__host__ __device__ constexpr int forgotten_row(int slots) { return (slots + kForgottenGroup - 1) / kForgottenGroup * kForgottenGroup; }
// bound: the log norm of the transition at most.
__device__ __forceinline__ signed char forgotten(float bound) {
  const float units = floorf(bound * (-1.F / kForgottenUnit));
  return static_cast<signed char>(units >= 0.F ? fminf(units, static_cast<float>(kForgottenMost)) : -1.F);
}

// In the loop's shared memory panels 1 and 3 get 16 zero rows on top, so that two products of 32 rows cover rows 0..31 and 32..63 of all
// panels that reach them. Byte where row 0 of a panel is, or would be.
constexpr int kStagedPanelBytes = 6144;
__host__ __device__ constexpr int staged_panel(int j) { return j == 0 ? 0 : 1024 * (j + 1); }

// The tensor maps of a call's q, k, v and o; beside them one bounded set for every packed sequence whose last chunk is not full.
enum MapIndex { kMapQ, kMapK, kMapV, kMapO, kMaps };

// Sequences of a call. Packed: offsets in device memory, read (and clamped to [0, T]) by the kernels alone.
struct Sequences {
  const void* cu_seqlens;  // null: N = B rows of T tokens
  std::int64_t stride;
  std::int32_t is_int64, N, T;

  struct Span {
    int row, begin, length, slot;  // batch row, first token, tokens, number of the first chunk
    __device__ int chunks() const { return (length + kChunk - 1) / kChunk; }
  };

  __device__ int offset(int n) const {
    const auto* at = static_cast<const std::int32_t*>(cu_seqlens) + (n * stride << is_int64);
    const std::int32_t low = at[0], high = is_int64 != 0 ? at[1] : low >> 31;
    return high < 0 ? 0 : high > 0 || static_cast<std::uint32_t>(low) > static_cast<std::uint32_t>(T) ? T : low;
  }
  // Chunks are numbered without a scan: sequence n's first is begin / 64 + n, which leaves room for every sequence before it.
  __device__ int slot(int n) const {
    if (cu_seqlens == nullptr) return n * ((T + kChunk - 1) / kChunk);
    return offset(n) / kChunk + n;
  }
  // Tokens between the first sequence's first and the last one's last; T without packs.
  __device__ int covered() const {
    if (cu_seqlens == nullptr) return T;
    const int begin = offset(0), end = offset(N);
    return end > begin ? end - begin : 0;
  }
  __device__ Span span(int n) const {
    if (cu_seqlens == nullptr) return {n, 0, T, slot(n)};
    const int begin = offset(n), end = offset(n + 1);
    return {0, begin, end > begin ? end - begin : 0, begin / kChunk + n};
  }
};

// A small tensor [B, T, HV] (or a vector) of any strides.
struct Scalars {
  const void* data;  // null: absent
  device::Type type;
  std::int64_t row, token, head;  // strides in elements
};

// A state tensor [N, HV, K, V], or the saved states, of any strides.
// Dense [K][V], dense [V][K], or any strides.
enum class StateRows : std::int32_t { other, k, v };
struct States {
  void* data;  // null: absent
  device::Type type;
  std::int64_t sequence, head;  // strides in elements
  std::int64_t k, v;
  StateRows rows;
};

}  // namespace flashdelta::cuda
