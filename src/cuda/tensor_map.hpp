// Tensor maps: how the copy engine finds the boxes of q, k, v and o.
#pragma once

#include <cuda.h>

#include "op/problem.hpp"

namespace flashdelta::cuda {

// Boxes of 64 tokens by 64 channels of one head of one batch row, 128-byte swizzled, zero outside the tensor. Axes: channel, head, token,
// batch row, with the tensor's own strides. `name` is for the error. Throws op::Error.
CUtensorMap make_tensor_map(const op::Tensor& tensor, const char* name);

}  // namespace flashdelta::cuda
