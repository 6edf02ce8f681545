// Tensor-core products of one warpgroup (wgmma): 64 x N x 16 steps with float32 sums in registers, B in shared memory, A in registers
// (rs) or in shared memory (ss).
//
// An accumulator may be touched neither by the threads nor by a product of another shape between an issue and the wait for it. The
// "fresh" forms only write their accumulator: with a zero factor instead, ptxas would still wait for its old value.
#pragma once

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/fragment.cuh"

namespace flashdelta::cuda::device {

// Describes a tile in shared memory whose rows are 128 bytes, 128-byte swizzled: rows are N (or M), the 64 elements of a row K. A k step
// of 16 is 32 bytes further.
__device__ __forceinline__ std::uint64_t describe_rows_128(const void* p) {
  return static_cast<std::uint64_t>((shared_address(p) & 0x3FFFFU) >> 4) | (1ULL << 16) | (static_cast<std::uint64_t>(1024 >> 4) << 32) |
         (1ULL << 62);
}
// The same tiles with rows as K: 64 columns of N per tile, the next tile `tile_bytes` further. A k step of 16 is 2048 bytes further.
__device__ __forceinline__ std::uint64_t describe_columns_128(const void* p, int tile_bytes) {
  return static_cast<std::uint64_t>((shared_address(p) & 0x3FFFFU) >> 4) | (static_cast<std::uint64_t>(tile_bytes >> 4) << 16) |
         (static_cast<std::uint64_t>(1024 >> 4) << 32) | (1ULL << 62);
}
// A panel of 16 columns: rows of 32 bytes, 32-byte swizzled; rows are N, the 16 elements of a row one k step.
__device__ __forceinline__ std::uint64_t describe_panel(const void* p) {
  return static_cast<std::uint64_t>((shared_address(p) & 0x3FFFFU) >> 4) | (1ULL << 16) | (static_cast<std::uint64_t>(256 >> 4) << 32) |
         (3ULL << 62);
}
// A descriptor `bytes` further.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the committed groups are still running.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of these registers across this point.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand lists and instruction texts cannot be made by templates. FD_NEW: the accumulator is only written, FD_ADD: added to.
#define FD_LIST16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FD_LIST32 FD_LIST16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FD_LIST64                                                                                                 \
  FD_LIST32                                                                                                       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define FD_4(mode, d, i) mode(d[i]), mode(d[(i) + 1]), mode(d[(i) + 2]), mode(d[(i) + 3])
#define FD_16(mode, d, i) FD_4(mode, d, i), FD_4(mode, d, (i) + 4), FD_4(mode, d, (i) + 8), FD_4(mode, d, (i) + 12)
#define FD_32(mode, d) FD_16(mode, d, 0), FD_16(mode, d, 16)
#define FD_64(mode, d) FD_16(mode, d, 0), FD_16(mode, d, 16), FD_16(mode, d, 32), FD_16(mode, d, 48)
#define FD_NEW "=f"
#define FD_ADD "+f"
#define FD_A(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define FD_WGMMA(shape, type, list, operands, scale, flags)                                                                            \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " scale ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list "}, " operands \
  ", p, " flags ";\n}\n"

// d (64 x 64) = or += a (64 x 16) b^T, b one k step of a tile described by rows.
template <Operand Type, bool Fresh>
__device__ __forceinline__ void wgmma_rs_n64(float (&d)[32], const std::uint32_t* a, std::uint64_t b) {
#define FD_TEXT(type) FD_WGMMA("m64n64k16", type, FD_LIST32, "{%32,%33,%34,%35}, %36", "%37", "1, 1, 0")
  if constexpr (Type == Operand::f16 && Fresh) asm volatile(FD_TEXT("f16") : FD_32(FD_NEW, d) : FD_A(a), "l"(b), "n"(0));
  if constexpr (Type == Operand::f16 && !Fresh) asm volatile(FD_TEXT("f16") : FD_32(FD_ADD, d) : FD_A(a), "l"(b), "n"(1));
  if constexpr (Type == Operand::bf16 && Fresh) asm volatile(FD_TEXT("bf16") : FD_32(FD_NEW, d) : FD_A(a), "l"(b), "n"(0));
  if constexpr (Type == Operand::bf16 && !Fresh) asm volatile(FD_TEXT("bf16") : FD_32(FD_ADD, d) : FD_A(a), "l"(b), "n"(1));
#undef FD_TEXT
}

// The same for 32 rows of b; d holds 16 registers.
template <Operand Type, bool Fresh>
__device__ __forceinline__ void wgmma_rs_n32(float* d, const std::uint32_t* a, std::uint64_t b) {
#define FD_TEXT(type) FD_WGMMA("m64n32k16", type, FD_LIST16, "{%16,%17,%18,%19}, %20", "%21", "1, 1, 0")
  if constexpr (Type == Operand::f16 && Fresh) asm volatile(FD_TEXT("f16") : FD_16(FD_NEW, d, 0) : FD_A(a), "l"(b), "n"(0));
  if constexpr (Type == Operand::f16 && !Fresh) asm volatile(FD_TEXT("f16") : FD_16(FD_ADD, d, 0) : FD_A(a), "l"(b), "n"(1));
  if constexpr (Type == Operand::bf16 && Fresh) asm volatile(FD_TEXT("bf16") : FD_16(FD_NEW, d, 0) : FD_A(a), "l"(b), "n"(0));
  if constexpr (Type == Operand::bf16 && !Fresh) asm volatile(FD_TEXT("bf16") : FD_16(FD_ADD, d, 0) : FD_A(a), "l"(b), "n"(1));
#undef FD_TEXT
}

// d (64 x 128) += a (64 x 16) b, b one k step of two tiles described by columns.
template <Operand Type>
__device__ __forceinline__ void wgmma_rs_n128_columns(float (&d)[64], const std::uint32_t* a, std::uint64_t b) {
#define FD_TEXT(type) FD_WGMMA("m64n128k16", type, FD_LIST64, "{%64,%65,%66,%67}, %68", "%69", "1, 1, 1")
  if constexpr (Type == Operand::f16) asm volatile(FD_TEXT("f16") : FD_64(FD_ADD, d) : FD_A(a), "l"(b), "n"(1));
  if constexpr (Type == Operand::bf16) asm volatile(FD_TEXT("bf16") : FD_64(FD_ADD, d) : FD_A(a), "l"(b), "n"(1));
#undef FD_TEXT
}

// d (64 x 64) = or += a b^T, both one k step of a tile described by rows.
template <Operand Type, bool Fresh>
__device__ __forceinline__ void wgmma_ss_n64(float (&d)[32], std::uint64_t a, std::uint64_t b) {
#define FD_TEXT(type) FD_WGMMA("m64n64k16", type, FD_LIST32, "%32, %33", "%34", "1, 1, 0, 0")
  if constexpr (Type == Operand::f16 && Fresh) asm volatile(FD_TEXT("f16") : FD_32(FD_NEW, d) : "l"(a), "l"(b), "n"(0));
  if constexpr (Type == Operand::f16 && !Fresh) asm volatile(FD_TEXT("f16") : FD_32(FD_ADD, d) : "l"(a), "l"(b), "n"(1));
  if constexpr (Type == Operand::bf16 && Fresh) asm volatile(FD_TEXT("bf16") : FD_32(FD_NEW, d) : "l"(a), "l"(b), "n"(0));
  if constexpr (Type == Operand::bf16 && !Fresh) asm volatile(FD_TEXT("bf16") : FD_32(FD_ADD, d) : "l"(a), "l"(b), "n"(1));
#undef FD_TEXT
}

// Bytes to k step `step` of 64 rows in two tiles of 64 channels each, described by rows.
__device__ __forceinline__ constexpr int rows_step(int step) { return step / 4 * (64 * 128) + step % 4 * 32; }
// d (64 x 64) = a b^T over 128 channels, both of 64 rows in two such tiles.
template <Operand Type>
__device__ __forceinline__ void wgmma_ss_rows(float (&d)[32], std::uint64_t a, std::uint64_t b) {
  wgmma_ss_n64<Type, true>(d, a, b);
#pragma unroll
  for (int step = 1; step < 8; ++step) wgmma_ss_n64<Type, false>(d, advance(a, rows_step(step)), advance(b, rows_step(step)));
}

#undef FD_LIST16
#undef FD_LIST32
#undef FD_LIST64
#undef FD_4
#undef FD_16
#undef FD_32
#undef FD_64
#undef FD_NEW
#undef FD_ADD
#undef FD_A
#undef FD_WGMMA

}  // namespace flashdelta::cuda::device
