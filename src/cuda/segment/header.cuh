// How a plan's header goes from who makes it to the chunk loop.
#pragma once

#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::segment {

// The loop may begin. By one thread, behind a barrier of those that made the plan.
__device__ __forceinline__ void hand_out(PlanHeader* to, PlanHeader header) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(header.word) : "memory");
}

// The same where another may do so as well, with another word: the first one's stands.
__device__ __forceinline__ void hand_out_first(PlanHeader* to, PlanHeader header) {
  asm volatile("{\n.reg .b64 was;\natom.release.gpu.global.cas.b64 was, [%0], %1, %2;\n}" ::"l"(to), "l"(PlanHeader::not_ready().word),
               "l"(header.word)
               : "memory");
}

// A plan's header as it is now.
__device__ __forceinline__ PlanHeader look_at_header(const PlanHeader* header) {
  PlanHeader now;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now.word) : "l"(header) : "memory");
  return now;
}
__device__ __forceinline__ PlanHeader wait_for_header(const PlanHeader* header) {
  PlanHeader now = look_at_header(header);
  for (; !now.ready(); now = look_at_header(header)) __nanosleep(40);
  return now;
}

}  // namespace flashdelta::cuda::segment
