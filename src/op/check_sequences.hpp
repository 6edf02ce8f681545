// cu_seqlens: where each packed sequence begins and ends.
#pragma once

#include "op/check_tensor.hpp"

namespace flashdelta::op {

// Fills N and the cu_seqlens fields; needs backend, B and T. Values are checked where the host can read them.
void check_sequences(const DLTensor* cu_seqlens, Problem* problem, Footprint* footprint);

}  // namespace flashdelta::op
