// The state in the consumers' registers: how it comes and goes.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/forward/shared.cuh"

namespace flashdelta::cuda::forward {

// Element (k, v) of S for register i of S^T: rows v, columns k.
__device__ __forceinline__ int state_k(int i, int lane) { return i / 4 * 8 + 2 * (lane % 4) + i % 2; }
__device__ __forceinline__ int state_v(int i, int first_row, int lane) { return first_row + lane / 4 + i / 2 % 2 * 8; }

// Register i's place from that of register 0, in a state whose rows are k (values next to one another) or v.
template <StateRows Rows>
__host__ __device__ constexpr int state_offset(int i) {
  const int k = i / 4 * 8 + i % 2, v = i / 2 % 2 * 8;
  return Rows == StateRows::k ? k * kHead + v : v * kHead + k;
}
// And register 0's.
template <StateRows Rows>
__device__ __forceinline__ int state_base(int first_row, int lane) {
  const int k = state_k(0, lane), v = state_v(0, first_row, lane);
  return Rows == StateRows::k ? k * kHead + v : v * kHead + k;
}

// Reads and writes with offsets known here: all are in flight at once.
template <class E, StateRows Rows>
__device__ __forceinline__ void load_rows(float (&S)[64], const void* data, std::int64_t offset, int first_row, int lane) {
  const E* from = static_cast<const E*>(data) + offset + state_base<Rows>(first_row, lane);
#pragma unroll
  for (int i = 0; i < 64; ++i) S[i] = static_cast<float>(from[state_offset<Rows>(i)]);
}
template <class E, StateRows Rows>
__device__ __forceinline__ void store_rows(const float (&S)[64], void* data, std::int64_t offset, int first_row, int lane) {
  E* to = static_cast<E*>(data) + offset + state_base<Rows>(first_row, lane);
#pragma unroll
  for (int i = 0; i < 64; ++i) to[state_offset<Rows>(i)] = static_cast<E>(S[i]);
}

__device__ __forceinline__ void load_state(float (&S)[64], const States& from, std::int64_t offset, int first_row, int lane) {
  if (from.data == nullptr) {
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] = 0.F;
    return;
  }
  switch (from.rows) {
    case StateRows::k:
      if (from.type == device::Type::f32) break;  // copies bring it, or else it has a stride of its own
      if (from.type == device::Type::bf16) return load_rows<__nv_bfloat16, StateRows::k>(S, from.data, offset, first_row, lane);
      return load_rows<__half, StateRows::k>(S, from.data, offset, first_row, lane);
    case StateRows::v:
      if (from.type == device::Type::f32) break;
      if (from.type == device::Type::bf16) return load_rows<__nv_bfloat16, StateRows::v>(S, from.data, offset, first_row, lane);
      return load_rows<__half, StateRows::v>(S, from.data, offset, first_row, lane);
    default: break;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    S[i] = device::load_element(from.data, from.type, offset + state_k(i, lane) * from.k + state_v(i, first_row, lane) * from.v);
  }
}

__device__ __forceinline__ void store_state(const float (&S)[64], const States& to, std::int64_t offset, int first_row, int lane) {
  switch (to.rows) {
    case StateRows::k:
      if (to.type == device::Type::f32) return store_rows<float, StateRows::k>(S, to.data, offset, first_row, lane);
      if (to.type == device::Type::bf16) return store_rows<__nv_bfloat16, StateRows::k>(S, to.data, offset, first_row, lane);
      return store_rows<__half, StateRows::k>(S, to.data, offset, first_row, lane);
    case StateRows::v:
      if (to.type == device::Type::f32) return store_rows<float, StateRows::v>(S, to.data, offset, first_row, lane);
      if (to.type == device::Type::bf16) return store_rows<__nv_bfloat16, StateRows::v>(S, to.data, offset, first_row, lane);
      return store_rows<__half, StateRows::v>(S, to.data, offset, first_row, lane);
    default:
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        device::store_element(to.data, to.type, offset + state_k(i, lane) * to.k + state_v(i, first_row, lane) * to.v, S[i]);
      }
  }
}

// A transition as the scan wants it (segment/scan_sm90.cuh): rows k; v and v + 8 of a column block share a register.
__device__ __forceinline__ void store_transition(const float (&S)[64], uint32_t* to, int first_row, int lane) {
  device::keep(lane);  // as in the scan
  to += segment::transition_offset(2 * (lane % 4), first_row / 2 + lane / 4);
#pragma unroll
  for (int i = 0; i < 64; i += 8) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const segment::Split x = segment::split(S[i + e], S[i + e + 2]), y = segment::split(S[i + e + 4], S[i + e + 6]);  // 8 rows further
      uint32_t* at = to + segment::transition_offset(i * 2 + e, 0);
      *reinterpret_cast<uint2*>(at) = make_uint2(x.high, y.high),
      *reinterpret_cast<uint2*>(at + kHead * kHead / 2) = make_uint2(x.low, y.low);
    }
  }
}

// A state that copies have brought, by this warp's part of the pieces: columns 32 p .. 32 p + 31 of the matrix are piece p.
__device__ __forceinline__ void read_pieces(float (&S)[64], const uint32_t (&pieces)[4], Staged staged, StateRows rows, int w, int warp,
                                            int lane) {
  const int g = lane / 4, t = lane % 4;
  const uint32_t mine = w == 0 ? (warp < 2 ? pieces[0] : pieces[1]) : (warp < 2 ? pieces[2] : pieces[3]);
  if (staged == Staged::boundary) {
    const uint32_t from = mine + warp % 2 * segment::kBlockBytes + segment::boundary_offset(2 * t, g) * 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] = device::load_shared(from + segment::boundary_offset(i / 4 * 8 + i % 2, i / 2 % 2 * 8) * 4);
  } else if (rows == StateRows::k) {  // 128-byte swizzled: 16-byte unit u of row k stands at u ^ (k % 8)
    const uint32_t from = mine + 2 * t * 128 + (((warp % 2 * 4 + g / 4) ^ (2 * t)) << 4) + g % 4 * 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int e = i % 2, h = i / 2 % 2;
      S[i] = device::load_shared((from ^ (e << 4) ^ (h << 5)) + i / 4 * 1024 + e * 128);
    }
  } else {
    const uint32_t from = (w * 64 + warp * 16 + g) * 128 + (((t / 2) ^ g) << 4) + t % 2 * 8;
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      const float2 x = device::load_shared_pair(pieces[i / 16] + (from ^ (i / 4 % 4 << 5)) + i / 2 % 2 * 1024);
      S[i] = x.x, S[i + 1] = x.y;
    }
  }
}

// The state that an item begins with, unless copies bring it.
__device__ __forceinline__ void begin_item(const Arguments& a, const Item& item, float (&S)[64], int first_row, int lane) {
  if (item.from == From::identity) {
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] = state_k(i, lane) == state_v(i, first_row, lane) ? 1.F : 0.F;
    return;
  }
  States from = a.initial_state;
  if (item.from == From::zero) from.data = nullptr;
  load_state(S, from, item.sequence * from.sequence + item.head * from.head, first_row, lane);
}

// Where the final state will overwrite the initial one: that has been read. An item that writes it itself has no one to tell.
__device__ __forceinline__ void tell_initial_read(const Arguments& a, const Item& item, int w, bool leader) {
  if (a.plan.initial_read == nullptr || item.from != From::start || item.to == To::final_state) return;
  device::named_sync(kConsumerBarrier + w, 128);
  if (leader) segment::add_to_count(&a.plan.initial_read[item.sequence * a.HV + item.head]);
}

// Where an item's state goes.
__device__ __forceinline__ void end_item(const Arguments& a, const Item& item, const float (&S)[64], int w, int first_row, bool leader,
                                         int lane) {
  if (item.to == To::nowhere) return;
  if (item.to == To::final_state) {
    if (a.final_state.data == nullptr) return;
    if (a.plan.initial_read != nullptr && item.from != From::start) {
      if (leader) segment::wait_for_count(&a.plan.initial_read[item.sequence * a.HV + item.head], 2);
      device::named_sync(kConsumerBarrier + w, 128);
    }
    store_state(S, a.final_state, item.sequence * a.final_state.sequence + item.head * a.final_state.head, first_row, lane);
    return;
  }
  const std::int64_t at = static_cast<std::int64_t>(item.to_boundary) * kHead * kHead;
  if (item.to == To::transition) {
    store_transition(S, a.plan.transitions + at, first_row, lane);
  } else {
    float* to =
        a.plan.states + at + first_row / kScanColumns * (segment::kBlockBytes / 4) + segment::boundary_offset(2 * (lane % 4), lane / 4);
#pragma unroll
    for (int i = 0; i < 64; ++i) to[segment::boundary_offset(i / 4 * 8 + i % 2, i / 2 % 2 * 8)] = S[i];
  }
  device::fence_global_to_async();  // copies read them
  device::named_sync(kConsumerBarrier + w, 128);
  if (leader) segment::add_to_count(&a.plan.arrived[item.to_boundary]);
}

}  // namespace flashdelta::cuda::forward
