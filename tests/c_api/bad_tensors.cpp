#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

#include "c_api/bad_input.hpp"

namespace flashdelta::abi_test {
namespace {

constexpr auto kValue = FLASHDELTA_VALUE_ERROR;
constexpr auto kType = FLASHDELTA_TYPE_ERROR;

const std::vector<std::string> kTensors{"q",
                                        "k",
                                        "v",
                                        "g",
                                        "beta",
                                        "initial_state",
                                        "cu_seqlens",
                                        "A_log",
                                        "dt_bias",
                                        "o",
                                        "final_state",
                                        "saved_c",
                                        "saved_T",
                                        "saved_states",
                                        "d_o",
                                        "d_final_state",
                                        "dq",
                                        "dk",
                                        "dv",
                                        "dg",
                                        "dbeta",
                                        "d_initial_state",
                                        "dA_log",
                                        "d_dt_bias",
                                        "segment_counts"};

// The cases of one tensor, spelt as claims about it.
class TensorCases {
 public:
  explicit TensorCases(std::string name) : name_(std::move(name)) {
    for (const Entry entry : kEntries) {
      if (!Call(entry).has(name_)) continue;
      entries_.push_back(entry);
      (Call::is_output(name_, entry) ? writers_ : readers_).push_back(entry);
    }
    Call sample(entries_.front());
    shape_ = sample[name_].shape;
    strides_ = sample[name_].explicit_strides();
    // Of at least two places, so that its stride counts.
    axis_ = static_cast<std::size_t>(std::find_if(shape_.begin(), shape_.end(), [](std::int64_t s) { return s > 1; }) - shape_.begin());
  }

  std::vector<BadCase> all() {
    descriptions();
    shapes();
    types();
    addresses();
    devices();
    strides();
    if (!writers_.empty()) outputs();
    return std::move(cases_);
  }

 private:
  using Spoil = std::function<void(CallTensor&)>;

  void add(const std::string& what, const std::vector<Entry>& entries, const Spoil& spoil, flashdelta_status status,
           const std::string& text, bool cpu_only = false) {
    const std::string name = name_;
    cases_.push_back({name_ + " " + what, entries, [=](Call& c) { spoil(c[name]); }, status, {name_ + ": " + text}, cpu_only});
  }
  void add(const std::string& what, const Spoil& spoil, const std::string& text) { add(what, entries_, spoil, kValue, text); }

  void descriptions() {
    const auto rank = std::to_string(shape_.size());
    add(
        "of one more axis",
        [](CallTensor& t) {
          t.shape.push_back(1);
          ++t.dl.ndim;
        },
        "has " + std::to_string(shape_.size() + 1) + " axes; it must have " + rank);
    add("of no axis", [](CallTensor& t) { t.dl.ndim = 0; }, "has 0 axes; it must have " + rank);
    add("of a negative number of axes", [](CallTensor& t) { t.dl.ndim = -1; }, "has -1 axes");
    add("with a null shape", [](CallTensor& t) { t.null_shape = true; }, "shape is null");
  }

  // Sizes that q, v and cu_seqlens give are free: whether they fit is told of the others.
  void shapes() {
    add("with a negative size", [](CallTensor& t) { t.shape.back() = -3; }, "axis " + std::to_string(shape_.size() - 1) + " has size -3");
    add(
        "with a size past int32", [](CallTensor& t) { t.shape[0] = 2147483648; },
        "axis 0 has size 2147483648; an axis has at most 2147483647");
    if (name_ == "q" || name_ == "v" || name_ == "cu_seqlens") return;
    for (std::size_t i = 0; i < shape_.size(); ++i) {
      add("with one more on axis " + std::to_string(i), [i](CallTensor& t) { ++t.shape[i]; }, "shape is [");
    }
    add("without elements", [](CallTensor& t) { t.shape.back() = 0; }, "shape is [");
  }

  void types() {
    const bool integers = name_ == "cu_seqlens" || name_ == "segment_counts";
    const DLDataType other = integers ? kF32 : kInt32;
    add(
        integers ? "float32" : "int32", entries_, [=](CallTensor& t) { t.dl.dtype = other; }, kType,
        integers ? "dtype is float32" : "dtype is int32");
    add("complex", entries_, [](CallTensor& t) { t.dl.dtype = {kDLComplex, 64, 1}; }, kType, "dtype is complex64");
    add("of two lanes", entries_, [](CallTensor& t) { t.dl.dtype.lanes = 2; }, kType, "dtype is ");
    add("of 8 bits", entries_, [](CallTensor& t) { t.dl.dtype.bits = 8; }, kType, "dtype is ");
    add("of an unknown type code", entries_, [](CallTensor& t) { t.dl.dtype.code = 99; }, kType, "dtype is code 99");
    if (name_ == "segment_counts")
      add("int64", entries_, [](CallTensor& t) { t.dl.dtype = kInt64; }, kType, "dtype is int64; it must be int32");
    if (integers) return;
    const bool everywhere = name_ == "k" || name_ == "v" || name_.rfind("saved_", 0) == 0;
    add("float64", entries_, [](CallTensor& t) { t.dl.dtype = kF64; }, kType, "dtype is float64", !everywhere);
  }

  void addresses() {
    add("with null data", [](CallTensor& t) { t.dl.data = nullptr; }, "data is null");
    add(
        "misaligned", [](CallTensor& t) { t.dl.data = static_cast<std::byte*>(t.dl.data) + 1; },
        "data (with byte_offset 0) is not aligned");
    add("misaligned by byte_offset", [](CallTensor& t) { t.dl.byte_offset = 1; }, "data (with byte_offset 1) is not aligned");
    add(
        "with a byte_offset past the address space", [](CallTensor& t) { t.dl.byte_offset = std::numeric_limits<std::uint64_t>::max(); },
        "byte_offset 18446744073709551615");
  }

  void devices() {
    add("on an unsupported device", [](CallTensor& t) { t.dl.device = {kDLMetal, 0}; }, "is on metal");
    add("on an unknown device", [](CallTensor& t) { std::memset(&t.dl.device.device_type, 77, 1); }, "is on device type 77");
    if (name_ != "q") add("on another device", [](CallTensor& t) { t.dl.device = {kDLCUDA, 0}; }, "is on cuda:0, but q is on cpu");
  }

  void strides() {
    const std::size_t axis = axis_;
    const auto with_stride = [axis](std::int64_t stride) { return [=](CallTensor& t) { t.explicit_strides()[axis] = stride; }; };
    add("with a stride past int64", with_stride(std::numeric_limits<std::int64_t>::max()), "strides [");
    add("with the most negative stride", with_stride(std::numeric_limits<std::int64_t>::min()), "strides [");
    if (!readers_.empty()) add("with strides past the address space", readers_, with_stride(-(std::int64_t{1} << 58)), kValue, "strides [");
    if (name_ == "q" || name_ == "k" || name_ == "v") {
      add(
          "with a last axis of stride 2", [](CallTensor& t) { t.explicit_strides().back() = 2; },
          "its last axis has stride 2; it must be contiguous");
      add("with a last axis of stride -1", [](CallTensor& t) { t.explicit_strides().back() = -1; }, "its last axis has stride -1");
      add("with a last axis of stride 0", [](CallTensor& t) { t.explicit_strides().back() = 0; }, "its last axis has stride 0");
    }
  }

  void outputs() {
    const std::size_t axis = axis_;
    const std::string place = "axis " + std::to_string(axis);
    const auto with_stride = [axis](std::int64_t stride) { return [=](CallTensor& t) { t.explicit_strides()[axis] = stride; }; };
    const auto size = std::to_string(shape_[axis]);
    add("broadcast over an axis", writers_, with_stride(0), kValue, place + " of size " + size + " has stride 0");
    add("with a negative stride", writers_, with_stride(-strides_[axis]), kValue, place + " has stride -" + std::to_string(strides_[axis]));
    if (strides_[axis] > 1) {
      add("overlapping itself", writers_, with_stride(strides_[axis] - 1), kValue,
          place + " of size " + size + " has stride " + std::to_string(strides_[axis] - 1));
    }
    if (name_ == "segment_counts")
      add("of stride 2", writers_, with_stride(2), kValue, "its last axis has stride 2; it must be contiguous");
    const std::string name = name_;
    cases_.push_back(
        {name_ + " over q", writers_, [=](Call& c) { c[name].dl.data = c["q"].dl.data; }, kValue, {name_ + ": shares memory with q"}});
  }

  std::string name_;
  std::vector<Entry> entries_, readers_, writers_;
  std::vector<std::int64_t> shape_, strides_;
  std::size_t axis_ = 0;
  std::vector<BadCase> cases_;
};

}  // namespace

std::vector<BadCase> bad_tensors() {
  std::vector<BadCase> cases;
  for (const std::string& name : kTensors) {
    for (BadCase& c : TensorCases(name).all()) cases.push_back(std::move(c));
  }
  return cases;
}

}  // namespace flashdelta::abi_test
