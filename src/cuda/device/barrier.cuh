// Barriers: transaction barriers in shared memory, named barriers, register budgets, and the chain between dependent launches.
#pragma once

#include <cstdint>

namespace flashdelta::cuda::device {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// A transaction barrier: a phase completes when `count` arrivals and all announced bytes are in.
using Barrier = std::uint64_t;

__device__ __forceinline__ void barrier_init(Barrier& b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(count));
}
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&b)) : "memory");
}
// Predicated inside, so that a loop around it keeps one instruction stream.
__device__ __forceinline__ void barrier_arrive_if(Barrier& b, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(shared_address(&b)),
               "r"(static_cast<int>(condition))
               : "memory");
}
// As many arrivals at once.
__device__ __forceinline__ void barrier_arrive_if(Barrier& b, int arrivals, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0], %2;\n}" ::"r"(shared_address(&b)),
               "r"(static_cast<int>(condition)), "r"(arrivals)
               : "memory");
}
// One arrival that also announces `bytes` of copies into this phase.
__device__ __forceinline__ void barrier_arrive_expect(Barrier& b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&b)), "r"(bytes) : "memory");
}
// Waits until the phase of parity `parity` has completed.
__device__ __forceinline__ void barrier_wait(Barrier& b, int parity) {
  asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
                   shared_address(&b)),
               "r"(parity)
               : "memory");
}

// The same for a thread that may wait long: it polls once a microsecond at most, and wakes when the phase completes.
__device__ __forceinline__ void barrier_wait_long(Barrier& b, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          shared_address(&b)),
      "r"(parity), "r"(1000)
      : "memory");
}

// Named barriers 1..15 (0 is __syncthreads): `threads` counts those that wait and those that only arrive.
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Predicated inside; all threads of a warp alike.
__device__ __forceinline__ void named_sync_if(int id, int threads, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p bar.sync %0, %1;\n}" ::"r"(id), "r"(threads), "r"(static_cast<int>(condition))
               : "memory");
}
__device__ __forceinline__ void named_arrive_if(int id, int threads, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p bar.arrive %0, %1;\n}" ::"r"(id), "r"(threads), "r"(static_cast<int>(condition))
               : "memory");
}

// A count in shared memory, with the order that a barrier has: what was written before it is counted up is seen by who sees the count.
__device__ __forceinline__ void count_up_if(int& count, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p red.release.cta.shared::cta.add.s32 [%0], 1;\n}" ::"r"(shared_address(&count)),
               "r"(static_cast<int>(condition))
               : "memory");
}
__device__ __forceinline__ int count(const int& count) {
  int now = 0;
  asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(now) : "r"(shared_address(&count)) : "memory");
  return now;
}

// Registers per thread of the calling warpgroup from here on.
template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Instructions that keep others apart.
template <int N>
__device__ __forceinline__ void filler() {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("nanosleep.u32 1;");
}

// Programmatic dependent launch: the next kernel may take free multiprocessors from now on; the previous kernel's memory is visible.
__device__ __forceinline__ void allow_dependent_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace flashdelta::cuda::device
