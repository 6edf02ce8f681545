// The chunk loop: o and final states from q, k, v and the records that `prepare` made.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/device/fragment.cuh"
#include "cuda/layout.cuh"
#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::forward {

struct Arguments {
  Sequences sequences;
  int HV, group;  // value heads, of all and of a key head
  bool l2norm;
  float scale;
  const unsigned char* records;
  const CUtensorMap* bounded_maps;  // null where no map needs a bound
  int* counter;                     // hands out tickets; without a plan those after the first of each CTA
  Plan plan;
  States initial_state, final_state, saved_states;
  bool initial_staged;  // initial_state has a tensor map
  bool halves;          // without a plan: pairs are two items of 64 value columns each
  bool keep_queries;    // L2 keeps queries for other value heads where pairs are cut, too
  int checkpoint_chunks;
};

// `maps`: kMaps tensor maps of the call; `state_map`: of the initial state, where that is staged. To be launched right behind `prepare` on
// the same stream, whose tail it overlaps.
cudaError_t launch(const Arguments& arguments, const CUtensorMap* maps, const CUtensorMap& state_map, device::Operand operand,
                   int multiprocessors, cudaStream_t stream);

}  // namespace flashdelta::cuda::forward
