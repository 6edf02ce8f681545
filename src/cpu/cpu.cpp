#include "cpu/cpu.hpp"
#include "op/error.hpp"
namespace flashdelta::cpu {
std::size_t chunk_forward_workspace(const op::Problem&) { return 0; }
std::size_t chunk_backward_workspace(const op::Problem&) { return 0; }
std::size_t recurrent_forward_workspace(const op::Problem&) { return 0; }
void chunk_forward(const op::Problem&) { throw op::Error(FLASHDELTA_UNAVAILABLE, "cpu: not built yet"); }
void chunk_backward(const op::Problem&) { throw op::Error(FLASHDELTA_UNAVAILABLE, "cpu: not built yet"); }
void recurrent_forward(const op::Problem&) { throw op::Error(FLASHDELTA_UNAVAILABLE, "cpu: not built yet"); }
std::vector<std::string> instruction_sets() { return {}; }
std::string processor() { return {}; }
bool usable(flashdelta_instruction_set set) { return set == FLASHDELTA_INSTRUCTION_SET_BEST; }
}  // namespace flashdelta::cpu
