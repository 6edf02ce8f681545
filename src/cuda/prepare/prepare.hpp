// `prepare`: for every chunk of every value head its record (layout.cuh), which is all that the chunk loop needs besides q, k and v.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/device/fragment.cuh"
#include "cuda/layout.cuh"
#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::prepare {

// Gates or betas, [B, T, HV].
struct PerToken {
  const char* data;  // null: absent
  device::Type type;
  std::int64_t row, token, head;  // strides in bytes
};

// What the places of chunks follow from.
struct Inputs {
  Sequences sequences;
  int slots, H, group;  // chunk numbers in use at most, key heads, value heads per key head
  PerToken g, beta;
};

struct Arguments : Inputs {
  bool l2norm, gate_in_kernel, beta_sigmoid, neg_eigval;
  Scalars A_log, dt_bias;
  unsigned char* records;     // [slots, HV, record_bytes]
  CUtensorMap* bounded_maps;  // [N, kMaps]; null where no map needs a bound
  int* counter;               // set to 0 before a dependent launch may begin: the loop's items are handed out by it
  PlanHeader* plan;           // made ready there where no cut can be worth it, else marked as not ready; null: the call has no plan
  bool may_leave_uncut;       // the plan is by cost
  int multiprocessors;
  signed char* bounds;  // [HV, forgotten_row(slots)], what each chunk forgets; null: not wanted
  // Not null: bounds are there, as gates alone tell, before a dependent launch may begin, and 0 here; 1 where keys have changed one later.
  int* grown;
  // Rows of o that belong to no sequence are set to zero here (packed calls).
  unsigned char* o;
  std::int64_t o_token, o_head;  // strides in bytes
  Scalars saved_c, saved_T;      // null: not wanted; float32
  std::int64_t saved_T_column;   // stride in elements
  States saved_states;           // the loop writes them; slots of no chunk are set to zero here
  int checkpoint_chunks, saved_slots;
};

// Whether `grown` may be given to a call of so many items (chunks of key heads), which wants no saved_T: CTAs have few enough to know them
// all from the start, and to tell of all of them first.
bool may_tell_early(std::int64_t items, int group, int multiprocessors);

// `maps`: kMaps tensor maps of the call. Launches on `stream` and lets a dependent launch follow early.
cudaError_t launch(const Arguments& arguments, const CUtensorMap* maps, device::Operand operand, int multiprocessors, cudaStream_t stream);

}  // namespace flashdelta::cuda::prepare
