// For calls too large for the reference backend: the token recurrence in double precision on the GPU, and inputs made there.
#pragma once

#include <cstdint>

#include "flashdelta/flashdelta.h"

namespace flashdelta::testing {

struct DeviceErrors {
  double o = 0, final_state = 0;  // relative, over all sequences looked at; NaN where the results hold one
  double o_norm = 0;              // of the oracle's o: 0 would mean that nothing was compared
};

// Holds the o and final_state (may be null) that a call has left in its device tensors against the recurrence over the same inputs. K and V
// are 128. `tokens` > 0: only the first so many tokens of each sequence, and final_state only where the sequence is no longer.
DeviceErrors device_errors(const flashdelta_forward_args& args, std::int64_t tokens = 0);

// Elements that are not finite.
std::int64_t count_not_finite(const DLTensor& tensor);
// Sets every element, by its index alone: the same on every run.
void fill_normal(const DLTensor& tensor, std::uint64_t seed, double factor = 1);
// Unit vectors along the last axis.
void fill_unit(const DLTensor& tensor, std::uint64_t seed);
// sigmoid(randn).
void fill_sigmoid(const DLTensor& tensor, std::uint64_t seed);
// logsigmoid(randn) / 16, the last axis being heads, of which every fourth forgets nothing: the gates of published benchmarks.
void fill_gates(const DLTensor& tensor, std::uint64_t seed);

}  // namespace flashdelta::testing
