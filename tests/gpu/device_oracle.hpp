// For calls too large for the reference backend: the token recurrence in double precision on the GPU.
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

}  // namespace flashdelta::testing
