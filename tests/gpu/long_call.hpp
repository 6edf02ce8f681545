// Calls of long sequences: everything made, run and compared on the GPU.
#pragma once

#include <array>
#include <deque>
#include <iosfwd>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flashdelta/flashdelta.h"
#include "gpu/device_oracle.hpp"
#include "gpu/device_tensors.hpp"

namespace flashdelta::testing {

enum class Strength { sigmoid, twice_sigmoid, zero, one, two, raw, eighth_two };  // eighth_two: 2 at every eighth token, else 0.5

// A line of a table. K = V = 128.
struct LongCase {
  std::string name;
  std::int64_t B = 1, T = 0, H = 1, HV = 2;
  std::vector<std::int64_t> cu_seqlens{};
  DType dtype = DType::bf16;
  Gates gates = Gates::benchmark;
  Strength beta = Strength::sigmoid;
  double key_length = 1, key_cosine = 0;
  std::int64_t key_period = 0;  // above 0: so many keys, over and over
  // beta |k|^2 stays what it is for unit keys.
  bool beta_by_length = true;
  bool initial_state = true, l2norm = false, v_first = false, in_place = false;
  DType state = DType::f32;
  std::uint64_t seed = 1;

  [[nodiscard]] std::int64_t sequences() const { return cu_seqlens.empty() ? B : static_cast<std::int64_t>(cu_seqlens.size()) - 1; }
};
std::ostream& operator<<(std::ostream& out, const LongCase& c);

// How a call is cut.
struct Cut {
  flashdelta_context_parallel mode = FLASHDELTA_CONTEXT_PARALLEL_AUTO;
  int segments = 0;
  bool batch_invariant = false;
};
std::ostream& operator<<(std::ostream& out, const Cut& cut);
void set_cut(flashdelta_options& options, const Cut& cut);

class LongCall {
 public:
  explicit LongCall(const LongCase& c, const Cut& cut = {});
  LongCall(const LongCall&) = delete;
  LongCall& operator=(const LongCall&) = delete;

  // Another cut of the same call; the workspace is asked for anew.
  void set_cut(const Cut& cut);
  void set_tolerance(double tolerance) { args_.options.context_parallel_tolerance = tolerance; }
  // Other values in the same tensors: everything of `c` but its sizes, dtypes and flags.
  void refill(const LongCase& c);
  // Outputs and workspace to NaN; an initial state that a call has overwritten to what it was.
  void poison();
  // Allocates the workspace unless it is there, then enqueues and nothing else. "" or the error's text.
  [[nodiscard]] std::string launch(cudaStream_t stream = nullptr);
  // poison, launch, wait; a failure of any kind fails the test.
  void run();
  // The same with segment_counts asked for: segments, boundaries warmed up, boundaries exact, chunks of warm-up.
  std::array<std::int32_t, 4> run_counting();

  // Arguments whose initial_state is what it was before the call.
  [[nodiscard]] flashdelta_forward_args args() const;
  [[nodiscard]] const LongCase& made_from() const { return case_; }
  // Holds o and final_state to the contract, and notes their errors in the record.
  DeviceErrors expect_contract(const std::string& context) const;
  [[nodiscard]] bool guards_intact() const;

  // Inputs and outputs, by argument name, for tests that look at them or change them.
  [[nodiscard]] const DLTensor& tensor(const char* name) const;

 private:
  DLTensor* add(const char* name, DType dtype, Shape shape);
  void fill();

  LongCase case_;
  DeviceOffsets offsets_;
  std::deque<Array> arrays_;
  std::vector<std::pair<std::string, Array*>> names_;
  flashdelta_forward_args args_{};
  Array counts_{DType::i32, {4}};
  std::optional<DeviceBuffer> workspace_;
};

// o and final_state, kept.
class Results {
 public:
  explicit Results(const LongCall& call);
  // The same bits as the call holds now.
  void expect_same_bits(const LongCall& call, const std::string& context) const;
  [[nodiscard]] const DLTensor& o() const { return o_.tensor(); }
  [[nodiscard]] const DLTensor& final_state() const { return final_state_.tensor(); }

 private:
  Array o_, final_state_;
};

}  // namespace flashdelta::testing
