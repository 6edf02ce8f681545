// One tensor argument at a time: from the caller's DLTensor and a rule to op::Tensor, or an error that names it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "op/error.hpp"
#include "op/problem.hpp"

namespace flashdelta::op {

[[noreturn]] inline void refuse_value(const std::string& text) { throw Error(FLASHDELTA_VALUE_ERROR, text); }
[[noreturn]] inline void refuse_type(const std::string& text) { throw Error(FLASHDELTA_TYPE_ERROR, text); }

// No axis is longer, so B * T, N * HV and the like always fit an int64 and kernels may count an axis with an int32.
inline constexpr std::int64_t kLongestAxis = 2147483647;

// A set of dtypes.
struct DTypes {
  unsigned bits = 0;
  constexpr DTypes() = default;
  constexpr DTypes(std::initializer_list<DType> types) {
    for (const DType t : types) bits |= bit(t);
  }
  [[nodiscard]] constexpr bool has(DType t) const { return (bits & bit(t)) != 0; }
  static constexpr unsigned bit(DType t) { return 1U << static_cast<unsigned>(t); }
};
inline constexpr DTypes kFloats{DType::f32, DType::bf16, DType::f16};
inline constexpr DTypes kAllFloats{DType::f64, DType::f32, DType::bf16, DType::f16};

enum class Use : std::uint8_t { input, output };

// An axis as error texts call it, and the size it must have.
struct Axis {
  const char* name = "";
  std::int64_t size = 0;
};

// The axes of a tensor, without a heap allocation: decode checks fourteen tensors for a few microseconds of work.
class Axes {
 public:
  Axes(std::initializer_list<Axis> axes) : rank_(static_cast<int>(axes.size())) { std::copy(axes.begin(), axes.end(), axes_.begin()); }
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] const Axis* begin() const { return axes_.data(); }
  [[nodiscard]] const Axis* end() const { return axes_.data() + rank_; }

 private:
  std::array<Axis, 4> axes_{};
  int rank_;
};

// What a tensor has to be. `wanted` names the dtype rule in the error text ("q's dtype"); empty: the set speaks for itself.
struct Rule {
  const char* name;
  Use use;
  Axes axes;
  DTypes dtypes;
  const char* wanted = "";
  bool contiguous_last = false;
};

// The bytes a tensor touches: [low, high), or none. Dense: every byte of it.
struct Footprint {
  const char* name = "";
  Use use = Use::input;
  std::uintptr_t low = 0, high = 0;
  std::int64_t element = 0;
  bool dense = false;
};

std::string dtype_name(DType dtype);
std::string dtype_name(DLDataType dtype);
// As a number: whatever a caller left there, also where it is no value of the enum.
std::int32_t device_type(const DLDevice& device);
bool on_host(const DLDevice& device);
std::string device_name(const DLDevice& device);
std::string shape_text(const std::int64_t* shape, int rank);

// Refuses another number of axes, and sizes that no tensor can have. The sizes that `axes` holds are not looked at.
void check_rank(const char* name, const DLTensor& tensor, const Axes& axes);

// The bytes of a tensor whose rank and shape are checked: its address, alignment and extents. Strides of axes of size <= 1 become 1.
struct Layout {
  void* data = nullptr;
  std::int64_t elements = 0;
  std::array<std::int64_t, 4> shape{}, stride{};
};
Layout check_layout(const char* name, const DLTensor& tensor, std::int64_t element_size, Use use, Footprint* footprint);

// A whole tensor against its rule.
Tensor check_tensor(const Rule& rule, const DLTensor& tensor, Footprint* footprint);

// Whether the tensors of these names may share bytes.
bool may_overlap(const std::vector<Footprint>& footprints, std::string_view a, std::string_view b);

// Refuses an output that certainly shares memory with another tensor. Interleaved slices of one buffer are not told apart further.
void check_overlap(const std::vector<Footprint>& footprints, bool state_in_place);

}  // namespace flashdelta::op
