#include "plan/plan.hpp"

#include <fmt/format.h>

#include "cpu/cpu.hpp"
#include "cuda/cuda.hpp"
#include "op/error.hpp"
#include "reference/reference.hpp"

namespace flashdelta::plan {
namespace {

using op::Backend;
using op::Operation;
using op::Problem;

// In this order, so that what is missing from the library itself reads the same in every build.
void check_cuda(const Problem& p) {
  if (p.operation == Operation::chunk_backward) {
    throw op::Error(FLASHDELTA_UNAVAILABLE,
                    "backend: backward is not yet available on the cuda backend; move the tensors to the CPU for gradients");
  }
  if (!cuda::built()) throw op::Error(FLASHDELTA_UNAVAILABLE, "backend: tensors are on a CUDA device, but " + cuda::problem());
}

void check_instruction_set(const Problem& p) {
  if (cpu::usable(p.instruction_set)) return;
  static constexpr const char* kNames[] = {"best", "baseline", "avx2", "avx512"};
  throw op::Error(FLASHDELTA_UNAVAILABLE,
                  fmt::format("instruction_set: is {} ({}), which this build or processor does not have; best always works",
                              static_cast<int>(p.instruction_set), kNames[p.instruction_set]));
}

std::size_t cpu_workspace_size(const Problem& p) {
  switch (p.operation) {
    case Operation::chunk_forward: return cpu::chunk_forward_workspace(p);
    case Operation::chunk_backward: return cpu::chunk_backward_workspace(p);
    case Operation::recurrent_forward: return cpu::recurrent_forward_workspace(p);
  }
  return 0;
}

void run_cpu(const Problem& p) {
  switch (p.operation) {
    case Operation::chunk_forward: return cpu::chunk_forward(p);
    case Operation::chunk_backward: return cpu::chunk_backward(p);
    case Operation::recurrent_forward: return cpu::recurrent_forward(p);
  }
}

}  // namespace

std::size_t workspace_size(const Problem& problem) {
  switch (problem.backend) {
    case Backend::cpu: check_instruction_set(problem); return (cpu_workspace_size(problem) + 63) / 64 * 64;
    case Backend::cuda: check_cuda(problem); return (cuda::chunk_forward_workspace(problem) + 63) / 64 * 64;
    case Backend::reference: return 0;
  }
  return 0;
}

void run(const Problem& problem) {
  const std::size_t needed = workspace_size(problem);
  if (problem.workspace_size < needed) {
    throw op::Error(FLASHDELTA_VALUE_ERROR, fmt::format("workspace: {} bytes given; this call needs {} (ask the workspace_size function)",
                                                        problem.workspace_size, needed));
  }
  switch (problem.backend) {
    case Backend::cpu: return run_cpu(problem);
    case Backend::cuda: return cuda::chunk_forward(problem);
    case Backend::reference:
      return problem.operation == Operation::chunk_backward ? reference::backward(problem) : reference::forward(problem);
  }
}

}  // namespace flashdelta::plan
