// Gradients of the oracle's forward by central differences: what any adjoint has to agree with, whoever wrote it.
#pragma once

#include "support/case.hpp"

namespace flashdelta::testing {

// Of <o, d_o> + <final_state, d_final_state> to every argument of the call, in float64, named as chunk_backward names them. An argument
// that is not finite gets 0. Two forward runs an element: for small shapes.
Tensors central_differences(const Call& call);

}  // namespace flashdelta::testing
