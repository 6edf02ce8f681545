// What the schedulers (forward.cpp, backward.cpp, recurrent.cpp) ask of one instruction set's build of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/config.hpp"
#include "op/problem.hpp"

namespace flashdelta::cpu {

// Chunks [first, last) of sequence n.
struct Span {
  std::int64_t n = 0, first = 0, last = 0;
};

// Value columns [first, last) of a state: whole blocks of kValueBlock, but for the state's end.
struct Columns {
  std::int64_t first = 0, last = 0;
};

// What a pass over a segment makes.
enum class Pass : std::uint8_t {
  full,        // outputs, or gradients
  state,       // only the state's (or its gradient's) way through the segment
  transition,  // the same with v (or d_o) = 0: what the segment makes of a state, columns independent, so `state` may be [K, K]
};

// A state, or its gradient, while it is worked on: value columns in blocks of kValueBlock, each [padded(K), padded(its columns)]. Products
// then read a block from end to end. What pads it is zero.
constexpr std::int64_t state_floats(std::int64_t K, std::int64_t width) { return padded(K) * padded(width); }
constexpr std::int64_t state_at(std::int64_t K, std::int64_t width, std::int64_t k, std::int64_t v) {
  const std::int64_t v0 = v / kValueBlock * kValueBlock;
  return v0 * padded(K) + k * padded(std::min<std::int64_t>(kValueBlock, width - v0)) + v - v0;
}

struct Kernels {
  // Runs the chunks of `span` for some value columns of value head h. `state` is the state before them and becomes that after them; its
  // width is V, or K for Pass::transition. Whoever has column 0 also writes saved_c and saved_T. scratch: forward_scratch() floats, 64-byte
  // aligned.
  void (*forward)(const op::Problem&, const Span&, std::int64_t h, const Columns&, Pass, float* state, float* scratch);

  // The reverse chain for one value head: `d_state` is the gradient after the span and becomes that before it.
  void (*backward_state)(const op::Problem&, const Span&, std::int64_t h, Pass, float* d_state, float* scratch);

  // Gradients of value heads [h, h + count) over `span`: all of a key head's, or one of HeadGroups, the first group first. d_states
  // holds as many of the above, one behind the other. gate_sums [count][2] gathers the parts of dA_log and d_dt_bias.
  void (*backward)(const op::Problem&, const Span&, std::int64_t h, std::int64_t count, float* d_states, double* gate_sums, float* scratch);

  // All tokens of sequence n, value head h, token by token. separate_passes is the same rule as ggml schedules it, a pass over the state
  // for each of decay, read, update and output: what benchmarks compare with.
  void (*recurrent)(const op::Problem&, std::int64_t n, std::int64_t h, float* scratch);
  void (*separate_passes)(const op::Problem&, std::int64_t n, std::int64_t h, float* scratch);

  // state from / to a states tensor's (n, h), or some value columns of it; an absent source means zero.
  void (*load_state)(const op::Tensor&, std::int64_t n, std::int64_t h, std::int64_t K, std::int64_t V, float* state);
  void (*store_state)(const op::Tensor&, std::int64_t n, std::int64_t h, std::int64_t K, const Columns&, const float* state);

  // b += m * s for the transition m and states s, b: one step of the scan over segments.
  void (*apply_transition)(std::int64_t K, std::int64_t V, const float* m, const float* s, float* b);

  // Multiply-adds per second in registers, for `seconds`: the peak that benchmarks compare with.
  double (*peak_macs)(double seconds);
};

// The build for `set`, null where it is not built or this processor lacks it.
const Kernels* find_kernels(flashdelta_instruction_set set);

// Floats of scratch, by the problem's shapes.
std::int64_t forward_scratch(const op::Problem& p);
std::int64_t backward_scratch(const op::Problem& p);
std::int64_t recurrent_scratch(const op::Problem& p);

}  // namespace flashdelta::cpu
