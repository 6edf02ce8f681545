// The CPU backend's face towards plan.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "op/problem.hpp"

namespace flashdelta::cpu {

std::size_t chunk_forward_workspace(const op::Problem& problem);
std::size_t chunk_backward_workspace(const op::Problem& problem);
std::size_t recurrent_forward_workspace(const op::Problem& problem);

void chunk_forward(const op::Problem& problem);
void chunk_backward(const op::Problem& problem);
void recurrent_forward(const op::Problem& problem);

// Instruction sets of this build that this processor runs, best first ("AVX512", "AVX2", "SSSE3", "NEON"), and the processor's name.
std::vector<std::string> instruction_sets();
std::string processor();

// Whether `set` is built and usable here; BEST always is.
bool usable(flashdelta_instruction_set set);

// Measured peak of `threads` threads (0: all) on fused multiply-adds, in GFLOP/s: what benchmarks compare with. 0 if not usable.
double peak_gflops(flashdelta_instruction_set set, int threads);

// recurrent_forward as ggml schedules it, one pass over the state for each of decay, read, update and output; its problem, its workspace.
// The other comparison of benchmarks.
void separate_passes_forward(const op::Problem& problem);

}  // namespace flashdelta::cpu
