// What will run: from a checked problem to a backend, with its workspace laid out.
#pragma once

#include <cstddef>

#include "op/problem.hpp"

namespace flashdelta::plan {

// Bytes that run(problem) needs as workspace (a multiple of 64; 0 when none).
std::size_t workspace_size(const op::Problem& problem);

// Checks the workspace against workspace_size (op::Error), then runs the operation on its backend.
void run(const op::Problem& problem);

}  // namespace flashdelta::plan
