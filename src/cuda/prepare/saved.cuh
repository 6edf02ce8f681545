// What a backward reads of a chunk, and zeros where tensors that come out belong to no sequence.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// Where T[i][j] lies in a record.
__device__ __forceinline__ int element_offset(int i, int j) {
  const int panel = j >> 4, row = i - 16 * panel;
  return panel_offset(panel) + row * 32 + ((((j >> 3) ^ (row >> 2)) & 1) << 4) + (j & 7) * 2;
}
template <Operand Type>
__device__ __forceinline__ float get_element(const unsigned char* at) {
  if constexpr (Type == Operand::f16) return __half2float(*reinterpret_cast<const __half*>(at));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
}

// What a backward reads: T and c of the chunk. T is scaled back to that of the keys themselves; c is summed again without kLowestGate.
template <Operand Type>
__device__ __noinline__ void save(const Arguments& a, const Place& at, int head, const unsigned char* record, float2 log_gates, int lane) {
  __syncwarp();
  const auto& tail = *reinterpret_cast<const RecordTail*>(record + kPanelBytes);
  if (a.saved_c.data != nullptr) {
    float sum = log_gates.x + log_gates.y;
    for (int o = 1; o < 32; o <<= 1) {
      const float before = __shfl_up_sync(~0U, sum, o);
      if (lane >= o) sum += before;
    }
    float before = __shfl_up_sync(~0U, sum, 1);
    if (lane == 0) before = 0.F;
    float* to = static_cast<float*>(const_cast<void*>(a.saved_c.data)) + at.row * a.saved_c.row + (at.token + 2 * lane) * a.saved_c.token +
                head * a.saved_c.head;
    if (2 * lane < at.rows) to[0] = before + log_gates.x;
    if (2 * lane + 1 < at.rows) to[a.saved_c.token] = before + log_gates.x + log_gates.y;
  }
  if (a.saved_T.data == nullptr) return;
  float* to =
      static_cast<float*>(const_cast<void*>(a.saved_T.data)) + at.row * a.saved_T.row + at.token * a.saved_T.token + head * a.saved_T.head;
  for (int e = lane; e < at.rows * kChunk; e += 32) {
    const int i = e / kChunk, j = e % kChunk;
    float x = 0.F;
    if (j / 16 <= i / 16) x = ldexpf(get_element<Type>(record + element_offset(i, j)), tail.exponent[j] - tail.exponent[i]);
    to[i * a.saved_T.token + j * a.saved_T_column] = x;
  }
}

// Rows of o before the first sequence and after the last; covered: rows of any.
static __device__ __noinline__ void zero_rows_of_no_sequence(const Arguments& a, int covered) {
  const int low = a.sequences.offset(0);
  const int heads = a.H * a.group, outside = a.sequences.T - covered;
  constexpr int kUnits = kHead * 2 / 16;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       e < static_cast<std::int64_t>(outside) * heads * kUnits; e += static_cast<std::int64_t>(workers(a)) * blockDim.x) {
    const int unit = e % kUnits, head = e / kUnits % heads, i = static_cast<int>(e / kUnits / heads);
    const int token = i < low ? i : i + covered;
    *reinterpret_cast<uint4*>(a.o + token * a.o_token + head * a.o_head + unit * 16) = make_uint4(0, 0, 0, 0);
  }
}

// Bytes that no chunk of this call has, between those that chunks have: the plan reads words of them, though it lets none count.
// By a CTA that has no items: waiting for offsets, behind all keys on their way, one that has some would be the last to end.
static __device__ __forceinline__ void clear_bounds_of_no_chunk(const Inputs& a, signed char* bounds) {
  const int row = forgotten_row(a.slots);
  const auto heads = static_cast<unsigned>(a.H * a.group);
  const std::int64_t runs = (static_cast<std::int64_t>(a.sequences.N) + 1) * heads;
  for (std::int64_t i = threadIdx.x; i < runs; i += blockDim.x) {  // behind sequence n, of a value head
    const auto before = static_cast<int>(i / heads), head = static_cast<int>(i % heads), n = before - 1;
    const int until = before < a.sequences.N ? a.sequences.slot(before) : row;
    int at = 0;
    if (n >= 0) {
      const Sequences::Span span = a.sequences.span(n);
      at = span.slot + span.chunks();
    }
    for (; at < until; ++at) bounds[static_cast<std::int64_t>(head) * row + at] = 0;
  }
  if (threadIdx.x < kForgottenGroup) bounds[static_cast<int>(threadIdx.x) - kForgottenGroup] = 0;  // in front of the first row
}

// Rows of saved_c and saved_T of tokens in no sequence, and saved states of no chunk: they come out as zero, as everything that is wanted
// is written completely.
static __device__ __noinline__ void zero_saved_of_no_sequence(const Arguments& a) {
  const int tid = threadIdx.x, threads = blockDim.x, heads = a.H * a.group;
  if (a.sequences.cu_seqlens != nullptr && (a.saved_c.data != nullptr || a.saved_T.data != nullptr)) {
    const int low = a.sequences.offset(0), covered = a.sequences.covered();
    for (int i = blockIdx.x; i < a.sequences.T - covered; i += workers(a)) {
      const int token = i < low ? i : i + covered;
      for (int e = tid; e < heads * kChunk; e += threads) {
        const int head = e / kChunk, j = e % kChunk;
        if (a.saved_T.data != nullptr) {
          static_cast<float*>(const_cast<void*>(a.saved_T.data))[token * a.saved_T.token + head * a.saved_T.head + j * a.saved_T_column] =
              0.F;
        }
        if (a.saved_c.data != nullptr && j == 0) {
          static_cast<float*>(const_cast<void*>(a.saved_c.data))[token * a.saved_c.token + head * a.saved_c.head] = 0.F;
        }
      }
    }
  }
  if (a.saved_states.data == nullptr) return;
  const int tokens = kChunk * a.checkpoint_chunks;
  const auto first_slot = [&](int n) -> std::int64_t {
    if (n == a.sequences.N) return a.saved_slots;
    const Sequences::Span span = a.sequences.span(n);
    return (static_cast<std::int64_t>(span.row) * a.sequences.T + span.begin) / tokens + n;
  };
  // Between the end of sequence n (-1: before the first) and the next one's first slot.
  for (int n = static_cast<int>(blockIdx.x) - 1; n < a.sequences.N; n += workers(a)) {
    const std::int64_t from = n < 0 ? 0 : first_slot(n) + (a.sequences.span(n).length + tokens - 1) / tokens;
    const std::int64_t until = min(first_slot(n + 1), static_cast<std::int64_t>(a.saved_slots));
    for (std::int64_t e = from * heads * kHead * kHead + tid; e < until * heads * kHead * kHead; e += threads) {
      const int v = e % kHead, k = e / kHead % kHead;
      const std::int64_t row = e / kHead / kHead;
      device::store_element(
          a.saved_states.data, a.saved_states.type,
          row / heads * a.saved_states.sequence + row % heads * a.saved_states.head + k * a.saved_states.k + v * a.saved_states.v, 0.F);
    }
  }
}

}  // namespace flashdelta::cuda::prepare
