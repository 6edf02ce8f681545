// Products of float tiles that live in the cache: C = c0 * C + r * (A B). Included once per instruction set.
#if defined(FLASHDELTA_CPU_SIMD_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_GEMM_INL_H_
#undef FLASHDELTA_CPU_SIMD_GEMM_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_GEMM_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr int kLanes = HWY_MAX_BYTES / 4 < 16 ? HWY_MAX_BYTES / 4 : 16;

// 32 vector registers hold 8 x 2 accumulators and hide the latency of both FMA units (12 x 2 are no faster); 16 registers hold 6 x 2.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
constexpr int kMR = 8;
#else
constexpr int kMR = 6;
#endif
constexpr int kNV = 2;

using Index = std::ptrdiff_t;

// A(i, p) = data[i * row + p * depth]: any strides, because A is read by broadcasts.
struct Left {
  const float* data;
  Index row, depth;
};
// B(p, j) = data[p * ld + j].
struct Right {
  const float* data;
  Index ld;
};
struct Out {
  float* data;
  Index ld;
  float c0 = 0;                 // factor of what C held; 0: C is not read
  float alpha = 1;              // factor of the product ...
  const float* rows = nullptr;  // ... times one per row
};

// Which part of the product is known to vanish or is not wanted.
enum class Shape : std::uint8_t {
  full,
  left_lower,  // A(i, p) = 0 for p > i
  left_upper,  // A(i, p) = 0 for p < i
  out_lower,   // only C(i, j) with j <= i is wanted (more may be written)
};

// Rows in main memory that later work reads or writes. Tokens of a head stand kilobytes apart, so the hardware foresees none of them;
// a product asks for a few rows between its blocks, which hides their way into the second-level cache.
class Ahead {
 public:
  void Add(const std::byte* first, Index rows, Index step, Index bytes) {
    if (rows > 0 && count_ < kMost) runs_[count_++] = {first, rows, step, bytes};
  }
  void Step() {
    for (int i = 0; i < kRowsPerStep && at_ < count_; ++i) {
      Run& run = runs_[at_];
      for (Index b = 0; b < run.bytes; b += 64) __builtin_prefetch(run.row + b, 0, 2);
      run.row += run.step;
      if (--run.rows == 0) ++at_;
    }
  }

 private:
  struct Run {
    const std::byte* row;
    Index rows, step, bytes;
  };
  static constexpr int kMost = 8;
  static constexpr int kRowsPerStep = kMR > 6 ? 2 : 1;  // so that a half chunk's products have steps enough
  Run runs_[kMost];
  int count_ = 0, at_ = 0;
};

template <int MR, int NV>
HWY_INLINE void Micro(Index p0, Index p1, const Left& a, Index i, const Right& b, Index j, const Out& c) {
  const DF d;
  VF acc[MR][NV];
  FLASHDELTA_UNROLL(8) for (int r = 0; r < MR; ++r) { FLASHDELTA_UNROLL(2) for (int v = 0; v < NV; ++v) acc[r][v] = hn::Zero(d); }
  const float* HWY_RESTRICT ap = a.data + i * a.row + p0 * a.depth;
  const float* HWY_RESTRICT bp = b.data + p0 * b.ld + j;
  const Index row = a.row, depth = a.depth, ld = b.ld;
  for (Index p = p0; p < p1; ++p, ap += depth, bp += ld) {
    VF bv[NV];
    FLASHDELTA_UNROLL(2) for (int v = 0; v < NV; ++v) bv[v] = hn::LoadU(d, bp + v * kLanes);
    FLASHDELTA_UNROLL(8) for (int r = 0; r < MR; ++r) {
      const VF av = hn::Set(d, ap[r * row]);
      FLASHDELTA_UNROLL(2) for (int v = 0; v < NV; ++v) acc[r][v] = hn::MulAdd(av, bv[v], acc[r][v]);
    }
  }
  float* HWY_RESTRICT out = c.data + i * c.ld + j;
  const float* factors = c.rows == nullptr ? &c.alpha : c.rows + i;
  const Index step = c.rows == nullptr ? 0 : 1;
  const float sign = c.rows == nullptr ? 1 : c.alpha;
  if (c.c0 != 0) {
    const VF c0 = hn::Set(d, c.c0);
    FLASHDELTA_UNROLL(8) for (int r = 0; r < MR; ++r, out += c.ld) {
      const VF factor = hn::Set(d, sign * factors[r * step]);
      FLASHDELTA_UNROLL(2) for (int v = 0; v < NV; ++v) {
        hn::StoreU(hn::MulAdd(acc[r][v], factor, hn::Mul(c0, hn::LoadU(d, out + v * kLanes))), d, out + v * kLanes);
      }
    }
  } else {
    FLASHDELTA_UNROLL(8) for (int r = 0; r < MR; ++r, out += c.ld) {
      const VF factor = hn::Set(d, sign * factors[r * step]);
      FLASHDELTA_UNROLL(2) for (int v = 0; v < NV; ++v) hn::StoreU(hn::Mul(acc[r][v], factor), d, out + v * kLanes);
    }
  }
}

template <int NV>
HWY_INLINE void Panel(Index m, Index depth, const Left& a, const Right& b, Index j, const Out& c, Shape shape, Ahead* ahead) {
  Index i = 0;
  const auto rows = [&](auto mr, Index at) HWY_ATTR {
    constexpr int MR = decltype(mr)::value;
    const Index p0 = shape == Shape::left_upper ? std::min(at, depth) : 0;
    const Index p1 = shape == Shape::left_lower ? std::min(at + MR, depth) : depth;
    Micro<MR, NV>(p0, p1, a, at, b, j, c);
    if (ahead != nullptr) ahead->Step();
  };
  // Row blocks above the diagonal of this panel are not wanted, and of those that start on it no column behind their first vector.
  if (shape == Shape::out_lower) {
    i = j;
    if (NV > 1 && j + kLanes <= m) {
      constexpr int kDiagonal = std::min(8, kLanes);
      for (; i < j + kLanes; i += kDiagonal) Micro<kDiagonal, 1>(0, depth, a, i, b, j, c);
    }
  }
  // Eight rows are left as 4 + 4: with 6 + 2 the two would wait for their own sums.
  for (; i + kMR <= m && (kMR == 8 || m - i != 8); i += kMR) rows(std::integral_constant<int, kMR>{}, i);
  for (; i + 4 <= m; i += 4) rows(std::integral_constant<int, 4>{}, i);
  if (i + 2 <= m) {
    rows(std::integral_constant<int, 2>{}, i);
    i += 2;
  }
  if (i < m) rows(std::integral_constant<int, 1>{}, i);
}

// C [m, n] = c0 C + alpha rows (A [m, depth] B [depth, n]). n is rounded up to whole vectors: tiles are padded for that.
HWY_NOINLINE void Gemm(Index m, Index n, Index depth, const Left& a, const Right& b, const Out& c, Shape shape = Shape::full,
                       Ahead* ahead = nullptr) {
  Index j = 0;
  for (; j + kNV * kLanes <= n; j += kNV * kLanes) Panel<kNV>(m, depth, a, b, j, c, shape, ahead);
  for (; j < n; j += kLanes) Panel<1>(m, depth, a, b, j, c, shape, ahead);
}

// Multiply-adds on registers only, dependent chains enough to fill both FMA units.
HWY_NOINLINE float SpinMacs(std::int64_t rounds, float seed) {
  const DF d;
  VF acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = hn::Set(d, seed + static_cast<float>(i));
  const VF x = hn::Set(d, 0.999F), y = hn::Set(d, 1e-3F);
  for (std::int64_t r = 0; r < rounds; ++r) {
    FLASHDELTA_UNROLL(12) for (int i = 0; i < 12; ++i) acc[i] = hn::MulAdd(acc[i], x, y);
  }
  VF sum = acc[0];
  for (int i = 1; i < 12; ++i) sum = hn::Add(sum, acc[i]);
  return hn::GetLane(sum);
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
