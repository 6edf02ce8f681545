// Tensor maps: how the copy engine finds the boxes of q, k, v and o.
#pragma once

#include <cuda.h>

#include "op/problem.hpp"

namespace flashdelta::cuda {

// Boxes of 64 tokens of one head of one batch row, zero outside the tensor: `tiles` of 64 channels one behind the other, each 128-byte
// swizzled. Axes: channel within a tile, token, tile, head, batch row, with the tensor's own strides. `name` is for the error. Throws
// op::Error.
CUtensorMap make_tensor_map(const op::Tensor& tensor, int tiles, const char* name);

// Boxes of 32 columns and 128 rows of one state of [N, HV, 128, 128] float32 states, 128-byte swizzled. Rows are K where V is dense, else
// V. Throws op::Error.
CUtensorMap make_state_map(const op::Tensor& tensor, const char* name);
// Whether the states lie so that there can be such a map.
bool has_state_map(const op::Tensor& tensor);

}  // namespace flashdelta::cuda
