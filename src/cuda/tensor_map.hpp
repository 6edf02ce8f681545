// Tensor maps: how the copy engine finds the boxes of q, k, v and o.
#pragma once

#include <cuda.h>

#include "op/problem.hpp"

namespace flashdelta::cuda {

// Boxes of 64 tokens of one head of one batch row, zero outside the tensor: two tiles of 64 channels one behind the other, each 128-byte
// swizzled. Axes: channel within a tile, token, tile, head, batch row, with the tensor's own strides. `name` is for the error. Throws
// op::Error.
CUtensorMap make_tensor_map(const op::Tensor& tensor, const char* name);

}  // namespace flashdelta::cuda
