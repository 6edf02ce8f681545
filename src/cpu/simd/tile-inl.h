// Moving tiles: rows of any dtype and stride to float tiles and back, transposes, row sums. Included once per instruction set.
#if defined(FLASHDELTA_CPU_SIMD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_TILE_INL_H_
#undef FLASHDELTA_CPU_SIMD_TILE_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_TILE_INL_H_
#endif

#include <cstring>

#include "cpu/simd/gemm-inl.h"
#include "op/element.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

using DI = hn::RebindToSigned<DF>;
using DHalf = hn::Rebind<std::uint16_t, DF>;

// Round to nearest even; a NaN stays one (its quiet bit is set, so that it cannot round to an infinity).
HWY_INLINE hn::Vec<DHalf> RoundToBf16(VF x) {
  const hn::RebindToUnsigned<DF> du;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  const auto magnitude = hn::BitCast(DI(), hn::And(bits, hn::Set(du, 0x7fffffff)));
  const auto nan = hn::RebindMask(du, hn::Gt(magnitude, hn::Set(DI(), 0x7f800000)));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded));
  return hn::DemoteTo(DHalf(), hn::BitCast(DI(), high));
}

HWY_INLINE VF LoadBf16(const std::uint16_t* p) {
  const hn::RebindToUnsigned<DF> du;
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(DHalf(), p))));
}

// Without the processor's own conversions Highway's are not IEEE's at the ends of the range; then halves go one by one.
#if HWY_TARGET <= HWY_AVX2 || HWY_ARCH_ARM_A64
constexpr bool kNativeHalf = true;
#else
constexpr bool kNativeHalf = false;
#endif

HWY_INLINE VF LoadF16(const std::uint16_t* p) {
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}

HWY_INLINE void StoreF16(VF x, std::uint16_t* p) {
  const hn::Rebind<hwy::float16_t, DF> dh;
  hn::StoreU(hn::DemoteTo(dh, x), dh, reinterpret_cast<hwy::float16_t*>(p));
}

// `n` elements from `src`, `stride` apart, to floats.
HWY_INLINE void LoadRow(op::DType type, const std::byte* src, Index stride, Index n, float* HWY_RESTRICT out) {
  Index i = 0;
  if (stride == 1) {
    const DF d;
    if (type == op::DType::f32) {
      std::memcpy(out, src, static_cast<std::size_t>(n) * sizeof(float));
      return;
    }
    const auto* half = reinterpret_cast<const std::uint16_t*>(src);
    if (type == op::DType::bf16) {
      for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadBf16(half + i), d, out + i);
    } else if (kNativeHalf) {
      for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadF16(half + i), d, out + i);
    }
  }
  const Index step = stride * op::size_of(type);
  for (; i < n; ++i) out[i] = static_cast<float>(op::load_element(type, src + i * step));
}

HWY_INLINE void StoreRow(op::DType type, std::byte* dst, Index stride, Index n, const float* HWY_RESTRICT row) {
  Index i = 0;
  if (stride == 1) {
    const DF d;
    if (type == op::DType::f32) {
      std::memcpy(dst, row, static_cast<std::size_t>(n) * sizeof(float));
      return;
    }
    auto* half = reinterpret_cast<std::uint16_t*>(dst);
    if (type == op::DType::bf16) {
      for (; i + kLanes <= n; i += kLanes) hn::StoreU(RoundToBf16(hn::LoadU(d, row + i)), DHalf(), half + i);
    } else if (kNativeHalf) {
      for (; i + kLanes <= n; i += kLanes) StoreF16(hn::LoadU(d, row + i), half + i);
    }
  }
  const Index step = stride * op::size_of(type);
  for (; i < n; ++i) op::store_element(type, dst + i * step, row[i]);
}

HWY_INLINE void Fill(float* p, Index n) { std::memset(p, 0, static_cast<std::size_t>(n) * sizeof(float)); }

// A tile of `rows` tokens from t on, `m` rows high: columns [c0, c0 + width) of head h of batch row b; zero beyond `rows` and in the
// padding, whatever stands behind the sequence in memory.
HWY_INLINE void LoadTile(const op::Tensor& x, Index b, Index t, Index rows, Index m, Index h, Index c0, Index width, float* tile,
                         Index ld) {
  const Index pad = padded(width) - width;
  for (Index i = 0; i < rows; ++i) {
    LoadRow(x.dtype, x.at(b, t + i, h, c0), x.stride[3], width, tile + i * ld);
    if (pad > 0) Fill(tile + i * ld + width, pad);
  }
  for (Index i = rows; i < m; ++i) Fill(tile + i * ld, padded(width));
}

// Asks for the rows that LoadTile or StoreTile will touch.
HWY_INLINE void AskFor(const op::Tensor& x, Index b, Index t, Index rows, Index h, Ahead& ahead) {
  if (x && x.stride[3] == 1) ahead.Add(x.at(b, t, h), rows, x.stride[1] * op::size_of(x.dtype), x.shape[3] * op::size_of(x.dtype));
}

HWY_INLINE void StoreTile(const op::Tensor& x, Index b, Index t, Index rows, Index h, Index c0, Index width, const float* tile, Index ld) {
  for (Index i = 0; i < rows; ++i) StoreRow(x.dtype, x.at(b, t + i, h, c0), x.stride[3], width, tile + i * ld);
}

// out[j][i] = in[i][j] for i < rows, j < cols, both multiples of 4.
HWY_NOINLINE void Transpose(Index rows, Index cols, const float* in, Index ld, float* out, Index ld_out) {
  const hn::FixedTag<float, 4> d;
  const hn::RepartitionToWide<decltype(d)> dw;
  for (Index i = 0; i < rows; i += 4) {
    for (Index j = 0; j < cols; j += 4) {
      const float* p = in + i * ld + j;
      const auto a = hn::LoadU(d, p), b = hn::LoadU(d, p + ld), c = hn::LoadU(d, p + 2 * ld), e = hn::LoadU(d, p + 3 * ld);
      const auto ab0 = hn::BitCast(dw, hn::InterleaveLower(d, a, b)), ab1 = hn::BitCast(dw, hn::InterleaveUpper(d, a, b));
      const auto ce0 = hn::BitCast(dw, hn::InterleaveLower(d, c, e)), ce1 = hn::BitCast(dw, hn::InterleaveUpper(d, c, e));
      float* o = out + j * ld_out + i;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, ab0, ce0)), d, o);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, ab0, ce0)), d, o + ld_out);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, ab1, ce1)), d, o + 2 * ld_out);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, ab1, ce1)), d, o + 3 * ld_out);
    }
  }
}

// Sum of a[j] * b[j], n a multiple of kLanes.
HWY_INLINE float Dot(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, Index n) {
  const DF d;
  VF s0 = hn::Zero(d), s1 = hn::Zero(d);
  Index j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    s0 = hn::MulAdd(hn::LoadU(d, a + j), hn::LoadU(d, b + j), s0);
    s1 = hn::MulAdd(hn::LoadU(d, a + j + kLanes), hn::LoadU(d, b + j + kLanes), s1);
  }
  for (; j < n; j += kLanes) s0 = hn::MulAdd(hn::LoadU(d, a + j), hn::LoadU(d, b + j), s0);
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
}

// a[j] *= s, n a multiple of kLanes.
HWY_INLINE void ScaleRow(float* a, float s, Index n) {
  const DF d;
  const VF f = hn::Set(d, s);
  for (Index j = 0; j < n; j += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, a + j), f), d, a + j);
}

void LoadState(const op::Tensor& s, std::int64_t n, std::int64_t h, std::int64_t K, std::int64_t V, float* state) {
  const Index ld = leading(V);
  if (!s) return Fill(state, K * ld);
  for (Index i = 0; i < K; ++i) {
    LoadRow(s.dtype, s.at(n, h, i, 0), s.stride[3], V, state + i * ld);
    Fill(state + i * ld + V, ld - V);
  }
}

void StoreState(const op::Tensor& s, std::int64_t n, std::int64_t h, std::int64_t K, std::int64_t V, const float* state) {
  for (Index i = 0; i < K; ++i) StoreRow(s.dtype, s.at(n, h, i, 0), s.stride[3], V, state + i * leading(V));
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
