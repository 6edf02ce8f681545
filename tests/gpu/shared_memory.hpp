// What multiprocessors' shared memory holds when a call begins.
#pragma once

#include <cuda_runtime_api.h>

namespace flashdelta::testing {

// Fills all shared memory of the current device, ahead of what `stream` gets next: as numbers NaN, as an index far beyond everything.
void poison_shared_memory(cudaStream_t stream);

}  // namespace flashdelta::testing
