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

// Tokens times heads per second of `threads` threads, each running ggml's schedule of the token loop (one pass over the state for each
// of decay, read, update, output) on a head of its own: the other comparison of benchmarks. 0 if not usable.
double separate_passes_tokens_per_second(flashdelta_instruction_set set, int threads, std::int64_t K, std::int64_t V);

}  // namespace flashdelta::cpu
