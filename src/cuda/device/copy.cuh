// Copies between global and shared memory that run beside the threads: tensor maps (TMA) and plain runs of bytes.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/device/barrier.cuh"

namespace flashdelta::cuda::device {

// L2 policies: for data read or written once (records, v, o), and any other.
constexpr std::uint64_t kEvictFirst = 0x12F0000000000000ULL, kEvictNormally = 0x1000000000000000ULL;

// Orders this thread's shared-memory writes before later asynchronous copies or wgmma that read them, and its reads before copies that
// write there. A barrier alone does not: an arrival may be seen while a load in front of it still waits behind other warps' stores, for
// longer than a copy takes to come. (Not needed where what was read has been used, as by a wgmma that has been issued.)
__device__ __forceinline__ void fence_shared_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory: on the writer's side before it tells, and on the reader's side after it was told.
__device__ __forceinline__ void fence_global_to_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A box of a (channel, token, tile, head, batch row) tensor, from `tile` on, into shared memory; `full` counts its bytes.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, Barrier& full, int tile, int head, int token, int row,
                                         std::uint64_t policy = kEvictNormally) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], "
      "%8;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(&full)), "r"(0), "r"(token), "r"(tile), "r"(head), "r"(row), "l"(policy)
      : "memory");
}
// A box of a (column, row, head, sequence) tensor, from its first row on.
__device__ __forceinline__ void load_columns(void* to, const CUtensorMap* map, Barrier& full, int column, int row, int head, int sequence) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(shared_address(&full)), "r"(column), "r"(row), "r"(head), "r"(sequence)
               : "memory");
}
// A box backwards, and its own group.
__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int tile, int head, int token, int row) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5, %6}], [%1], %7;\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(shared_address(from)), "r"(0), "r"(token), "r"(tile), "r"(head), "r"(row), "l"(kEvictFirst)
      : "memory");
}
// `bytes` (a multiple of 16) as they lie.
__device__ __forceinline__ void load_bytes(void* to, const void* from, int bytes, Barrier& full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&full)), "l"(kEvictFirst)
               : "memory");
}
// The same where others will read them too.
__device__ __forceinline__ void load_shared_bytes(void* to, const void* from, int bytes, Barrier& full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&full))
               : "memory");
}
// One of several runs of a group; store_bytes ends the group.
__device__ __forceinline__ void store_run(void* to, std::uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void store_bytes(void* to, std::uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
// Until shared memory may be written again / until the data is in global memory. For the thread that stored.
__device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Brings `bytes` (a multiple of 16) into L2.
__device__ __forceinline__ void prefetch_bytes(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Writes to `to` (global) a copy of `map` whose token axis ends at `end`: boxes then read zeros, and write nothing, past a sequence's
// end, whatever lies there. One warp; `scratch` is 128 aligned bytes of shared memory.
__device__ __forceinline__ void write_bounded_map(CUtensorMap* to, const CUtensorMap& map, int end, std::uint32_t* scratch, int lane) {
  scratch[lane] = reinterpret_cast<const std::uint32_t*>(&map)[lane];
  __syncwarp();
  if (lane == 0) {
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" ::"r"(shared_address(scratch)), "r"(end)
                 : "memory");
  }
  __syncwarp();
  reinterpret_cast<std::uint32_t*>(to)[lane] = scratch[lane];
  asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
  __syncwarp();
}
// Before a map written by an earlier kernel is used; for the thread that uses it.
__device__ __forceinline__ void acquire_map(const CUtensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

}  // namespace flashdelta::cuda::device
