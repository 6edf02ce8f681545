// Schedules the token-by-token path: one item per (sequence, value head).
#include "cpu/cpu.hpp"
#include "cpu/segments.hpp"
#include "cpu/threads.hpp"

namespace flashdelta::cpu {
namespace {

int threads(const op::Problem& p) {
  const auto tokens = static_cast<double>(p.B * p.T + p.N);  // loading a state costs about a token's work
  return useful_threads(p, tokens * static_cast<double>(p.HV * p.K * p.V) * 3);
}

void run(const op::Problem& problem, decltype(Kernels::recurrent) kernel) {
  const std::int64_t scratch = recurrent_scratch(problem);
  parallel_for(problem.N * problem.HV, threads(problem), [&](std::int64_t i, int thread) {
    kernel(problem, i / problem.HV, i % problem.HV, static_cast<float*>(problem.workspace) + thread * scratch);
  });
  clear_outside(problem, problem.o);
}

}  // namespace

std::size_t recurrent_forward_workspace(const op::Problem& problem) {
  return static_cast<std::size_t>(threads(problem) * recurrent_scratch(problem)) * sizeof(float);
}

void recurrent_forward(const op::Problem& problem) { run(problem, find_kernels(problem.instruction_set)->recurrent); }

void separate_passes_forward(const op::Problem& problem) { run(problem, find_kernels(problem.instruction_set)->separate_passes); }

}  // namespace flashdelta::cpu
