// The oracle: the gated delta rule in float64, token by token, forward and adjoint. Slow, obvious, and independent of every
// chunked formula. Takes any dtype of op::DType for every tensor, float64 included. Never uses problem.workspace.
#pragma once

#include "op/problem.hpp"

namespace flashdelta::reference {

void forward(const op::Problem& problem);  // chunk_forward and recurrent_forward mean the same here
void backward(const op::Problem& problem);

}  // namespace flashdelta::reference
