// What the cuda backend takes of what the other backends take, from descriptions alone: no device is asked, no device memory is read.
#pragma once

#include "op/problem.hpp"

namespace flashdelta::op {

// The widths its kernels are compiled for.
inline constexpr std::int64_t kCudaHead = 128;

// Throws op::Error. For a problem whose q, k, v and, in a forward, o are taken.
void check_cuda(const Problem& problem);

}  // namespace flashdelta::op
