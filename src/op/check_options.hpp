// The options of a call, by themselves: flags, enums, numbers and what needs what.
#pragma once

#include "op/problem.hpp"

namespace flashdelta::op {

// Fills every field of the problem that comes from the options alone (not backend, scale and tolerance: they depend on the tensors).
void check_options(const flashdelta_options& options, Problem* problem);

// The tolerance for inputs of q's dtype: as given, or the default of that dtype.
double resolve_tolerance(const flashdelta_options& options, DType q);

// The backend for tensors of q's device; refuses devices that no backend takes and a `backend` that contradicts the device.
Backend check_backend(const flashdelta_options& options, const DLTensor& q);

const char* backend_name(Backend backend);

}  // namespace flashdelta::op
