// cu_seqlens: where each packed sequence begins and ends.
#pragma once

#include "op/check_tensor.hpp"

namespace flashdelta::op {

// Fills N and the cu_seqlens fields; needs backend, B and T. Values are checked where the host can read them.
void check_sequences(const DLTensor* cu_seqlens, Problem* problem, Footprint* footprint);

// Refuses offsets that decrease or leave [0, T]; they must be where the host can read them.
void check_offsets(const Problem& p);

}  // namespace flashdelta::op
