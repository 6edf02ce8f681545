// Moving tiles: rows of any dtype and stride to float tiles and back, transposes, row sums. Included once per instruction set.
#if defined(FLASHDELTA_CPU_SIMD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_TILE_INL_H_
#undef FLASHDELTA_CPU_SIMD_TILE_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_TILE_INL_H_
#endif

#include <cstring>

#include "cpu/kernels.hpp"
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

// `rows` rows of `n` elements from `src`, `step` elements apart, and their elements `stride`, to and from rows of floats ld apart. What to
// do is decided once for all of them: a row of a block is only a few vectors.
HWY_NOINLINE void LoadRows(op::DType type, const std::byte* src, Index step, Index stride, Index rows, Index n, float* out, Index ld) {
  const DF d;
  const auto each = [&](const auto* from, const auto& load) HWY_ATTR {
    for (Index i = 0; i < rows; ++i, from += step, out += ld) {
      for (Index j = 0; j < n; j += kLanes) hn::StoreU(load(from + j), d, out + j);
    }
  };
  const bool vectors = stride == 1 && n % kLanes == 0;
  const auto* half = reinterpret_cast<const std::uint16_t*>(src);
  if (vectors && type == op::DType::f32) {
    each(reinterpret_cast<const float*>(src), [](const float* x) HWY_ATTR { return hn::LoadU(DF(), x); });
  } else if (vectors && type == op::DType::bf16) {
    each(half, [](const std::uint16_t* x) HWY_ATTR { return LoadBf16(x); });
  } else if (vectors && kNativeHalf && type == op::DType::f16) {
    each(half, [](const std::uint16_t* x) HWY_ATTR { return LoadF16(x); });
  } else {
    for (Index i = 0; i < rows; ++i) LoadRow(type, src + i * step * op::size_of(type), stride, n, out + i * ld);
  }
}

HWY_NOINLINE void StoreRows(op::DType type, std::byte* dst, Index step, Index stride, Index rows, Index n, const float* in, Index ld) {
  const DF d;
  const auto each = [&](auto* to, const auto& store) HWY_ATTR {
    for (Index i = 0; i < rows; ++i, to += step, in += ld) {
      for (Index j = 0; j < n; j += kLanes) store(hn::LoadU(d, in + j), to + j);
    }
  };
  const bool vectors = stride == 1 && n % kLanes == 0;
  auto* half = reinterpret_cast<std::uint16_t*>(dst);
  if (vectors && type == op::DType::f32) {
    each(reinterpret_cast<float*>(dst), [](VF x, float* to) HWY_ATTR { hn::StoreU(x, DF(), to); });
  } else if (vectors && type == op::DType::bf16) {
    each(half, [](VF x, std::uint16_t* to) HWY_ATTR { hn::StoreU(RoundToBf16(x), DHalf(), to); });
  } else if (vectors && kNativeHalf && type == op::DType::f16) {
    each(half, [](VF x, std::uint16_t* to) HWY_ATTR { StoreF16(x, to); });
  } else {
    for (Index i = 0; i < rows; ++i) StoreRow(type, dst + i * step * op::size_of(type), stride, n, in + i * ld);
  }
}

HWY_INLINE void Fill(float* p, Index n) { std::memset(p, 0, static_cast<std::size_t>(n) * sizeof(float)); }

// A tile of `rows` tokens from t on, `m` rows high: columns [c0, c0 + width) of head h of batch row b; zero beyond `rows` and in the
// padding, whatever stands behind the sequence in memory.
HWY_INLINE void LoadTile(const op::Tensor& x, Index b, Index t, Index rows, Index m, Index h, Index c0, Index width, float* tile,
                         Index ld) {
  const Index pad = padded(width) - width;
  if (rows > 0) LoadRows(x.dtype, x.at(b, t, h, c0), x.stride[1], x.stride[3], rows, width, tile, ld);
  for (Index i = 0; pad > 0 && i < rows; ++i) Fill(tile + i * ld + width, pad);
  for (Index i = rows; i < m; ++i) Fill(tile + i * ld, padded(width));
}

// Asks for the rows that LoadTile or StoreTile will touch.
HWY_INLINE void AskFor(const op::Tensor& x, Index b, Index t, Index rows, Index h, Ahead& ahead) {
  if (x && x.stride[3] == 1) ahead.Add(x.at(b, t, h), rows, x.stride[1] * op::size_of(x.dtype), x.shape[3] * op::size_of(x.dtype));
}

HWY_INLINE void StoreTile(const op::Tensor& x, Index b, Index t, Index rows, Index h, Index c0, Index width, const float* tile, Index ld) {
  if (rows > 0) StoreRows(x.dtype, x.at(b, t, h, c0), x.stride[1], x.stride[3], rows, width, tile, ld);
}

// Four floats from each of N / 4 rows, 4 * ld apart, as one vector.
template <int N>
HWY_INLINE hn::Vec<hn::CappedTag<float, N>> LoadBlocks(const float* p, Index ld) {
  const hn::CappedTag<float, N> d;
  if constexpr (N == 4) {
    return hn::LoadU(d, p);
  } else {
    return hn::Combine(d, LoadBlocks<N / 2>(p + N / 2 * ld, ld), LoadBlocks<N / 2>(p, ld));
  }
}

// Rows [i, i + N) of Transpose.
template <int N>
HWY_INLINE void TransposeRows(Index i, Index cols, const float* in, Index ld, float* out, Index ld_out, const float* factors) {
  const hn::CappedTag<float, N> d;
  const hn::RepartitionToWide<decltype(d)> dw;
  const auto factor = factors == nullptr ? hn::Set(d, 1.0F) : hn::LoadU(d, factors + i);
  for (Index j = 0; j < cols; j += 4) {
    const float* p = in + i * ld + j;
    const auto a = LoadBlocks<N>(p, ld), b = LoadBlocks<N>(p + ld, ld), c = LoadBlocks<N>(p + 2 * ld, ld),
               e = LoadBlocks<N>(p + 3 * ld, ld);
    const auto ab0 = hn::BitCast(dw, hn::InterleaveLower(d, a, b)), ab1 = hn::BitCast(dw, hn::InterleaveUpper(d, a, b));
    const auto ce0 = hn::BitCast(dw, hn::InterleaveLower(d, c, e)), ce1 = hn::BitCast(dw, hn::InterleaveUpper(d, c, e));
    float* o = out + j * ld_out + i;
    hn::StoreU(hn::Mul(factor, hn::BitCast(d, hn::InterleaveLower(dw, ab0, ce0))), d, o);
    hn::StoreU(hn::Mul(factor, hn::BitCast(d, hn::InterleaveUpper(dw, ab0, ce0))), d, o + ld_out);
    hn::StoreU(hn::Mul(factor, hn::BitCast(d, hn::InterleaveLower(dw, ab1, ce1))), d, o + 2 * ld_out);
    hn::StoreU(hn::Mul(factor, hn::BitCast(d, hn::InterleaveUpper(dw, ab1, ce1))), d, o + 3 * ld_out);
  }
}

// out[j][i] = factors[i] in[i][j] for i < rows, j < cols, both multiples of 4; factors 1 where null.
HWY_NOINLINE void Transpose(Index rows, Index cols, const float* in, Index ld, float* out, Index ld_out, const float* factors = nullptr) {
  Index i = 0;
  for (; i + kLanes <= rows; i += kLanes) TransposeRows<kLanes>(i, cols, in, ld, out, ld_out, factors);
  if (kLanes > 8) {
    for (; i + 8 <= rows; i += 8) TransposeRows<std::min(8, kLanes)>(i, cols, in, ld, out, ld_out, factors);
  }
  for (; i < rows; i += 4) TransposeRows<4>(i, cols, in, ld, out, ld_out, factors);
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

// to[j] += a[j], n a multiple of kLanes.
HWY_INLINE void AddRow(const float* HWY_RESTRICT a, Index n, float* HWY_RESTRICT to) {
  const DF d;
  for (Index j = 0; j < n; j += kLanes) hn::StoreU(hn::Add(hn::LoadU(d, a + j), hn::LoadU(d, to + j)), d, to + j);
}

// Columns [v0, v0 + w) of a states tensor's (n, h), zero if it is absent, to and from rows ld apart; rows and columns that pad are zero.
HWY_INLINE void LoadColumns(const op::Tensor& x, Index n, Index h, Index K, Index v0, Index w, float* tile, Index ld) {
  const Index wp = padded(w), rows = x ? K : 0;
  if (x) LoadRows(x.dtype, x.at(n, h, 0, v0), x.stride[2], x.stride[3], rows, w, tile, ld);
  for (Index i = 0; w < wp && i < rows; ++i) Fill(tile + i * ld + w, wp - w);
  for (Index i = rows; i < padded(K); ++i) Fill(tile + i * ld, wp);
}

HWY_INLINE void StoreColumns(const op::Tensor& x, Index n, Index h, Index K, Index v0, Index w, const float* tile, Index ld) {
  StoreRows(x.dtype, x.at(n, h, 0, v0), x.stride[2], x.stride[3], K, w, tile, ld);
}

void LoadState(const op::Tensor& x, std::int64_t n, std::int64_t h, std::int64_t K, std::int64_t V, float* state) {
  for (Index v0 = 0; v0 < V; v0 += kValueBlock) {
    const Index w = std::min<Index>(kValueBlock, V - v0);
    LoadColumns(x, n, h, K, v0, w, state + v0 * padded(K), padded(w));
  }
}

void StoreState(const op::Tensor& x, std::int64_t n, std::int64_t h, std::int64_t K, const Columns& columns, const float* state) {
  for (Index v0 = columns.first; v0 < columns.last; v0 += kValueBlock) {
    const Index w = std::min<Index>(kValueBlock, columns.last - v0);
    StoreColumns(x, n, h, K, v0, w, state + v0 * padded(K), padded(w));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
