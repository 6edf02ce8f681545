#include "op/check_tensor.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

namespace flashdelta::op {
namespace {

bool multiply(std::int64_t a, std::int64_t b, std::int64_t* product) { return !__builtin_mul_overflow(a, b, product); }
bool add(std::int64_t a, std::int64_t b, std::int64_t* sum) { return !__builtin_add_overflow(a, b, sum); }

std::string list_of(DTypes dtypes) {
  std::vector<std::string> names;
  for (const DType t : {DType::f32, DType::bf16, DType::f16, DType::f64, DType::i32}) {
    if (dtypes.has(t)) names.push_back(dtype_name(t));
  }
  return fmt::format("{}", fmt::join(names, " or "));
}

void check_shape_values(const char* name, const DLTensor& tensor) {
  for (int i = 0; i < tensor.ndim; ++i) {
    const std::int64_t size = tensor.shape[i];
    if (size < 0) refuse_value(fmt::format("{}: axis {} has size {}; a size cannot be negative", name, i, size));
    if (size > kLongestAxis) refuse_value(fmt::format("{}: axis {} has size {}; an axis has at most {}", name, i, size, kLongestAxis));
  }
}

// Also for tensors without elements, so that no backend multiplies sizes past an int64.
void check_size_fits(const char* name, const DLTensor& tensor, std::int64_t element_size) {
  std::int64_t bytes = element_size;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (!multiply(bytes, std::max<std::int64_t>(tensor.shape[i], 1), &bytes)) {
      refuse_value(fmt::format("{}: shape {} has more bytes than an int64 counts", name, shape_text(tensor.shape, tensor.ndim)));
    }
  }
}

Layout layout_of(const DLTensor& tensor) {
  Layout layout;
  layout.elements = 1;
  for (int i = 0; i < tensor.ndim; ++i) layout.elements *= tensor.shape[i];
  const bool compact = tensor.strides == nullptr || layout.elements == 0;
  std::int64_t inner = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const std::int64_t size = tensor.shape[i];
    layout.shape[i] = size;
    layout.stride[i] = size <= 1 ? 1 : compact ? inner : tensor.strides[i];
    inner *= std::max<std::int64_t>(size, 1);
  }
  return layout;
}

// Byte offsets of the first and one past the last byte from the element at index 0.
void check_extent(const char* name, const Layout& layout, int rank, std::int64_t element_size, std::int64_t* low, std::int64_t* high) {
  std::int64_t from = 0, to = 0;
  for (int i = 0; i < rank; ++i) {
    std::int64_t reach = 0;
    std::int64_t* const end = layout.stride[i] < 0 ? &from : &to;
    if (layout.shape[i] > 1 && (!multiply(layout.shape[i] - 1, layout.stride[i], &reach) || !add(*end, reach, end))) {
      refuse_value(fmt::format("{}: strides {} reach further than an int64 counts", name, shape_text(layout.stride.data(), rank)));
    }
  }
  if (!multiply(from, element_size, low) || !multiply(to, element_size, high) || !add(*high, element_size, high)) {
    refuse_value(fmt::format("{}: strides {} reach further than an int64 counts", name, shape_text(layout.stride.data(), rank)));
  }
}

// The axes that have more than one place, innermost first.
struct Order {
  std::array<int, 4> axes{};
  int count = 0;
  [[nodiscard]] const int* begin() const { return axes.data(); }
  [[nodiscard]] const int* end() const { return axes.data() + count; }
};

Order axes_by_stride(const Layout& layout, int rank) {
  Order order;
  for (int i = rank - 1; i >= 0; --i) {
    if (layout.shape[i] > 1) order.axes[order.count++] = i;
  }
  // By insertion: of equal strides the later axis stays the inner one.
  for (int i = 1; i < order.count; ++i) {
    for (int j = i; j > 0 && std::llabs(layout.stride[order.axes[j]]) < std::llabs(layout.stride[order.axes[j - 1]]); --j) {
      std::swap(order.axes[j], order.axes[j - 1]);
    }
  }
  return order;
}

// An output's elements must be apart: axis by axis from the innermost, a step must leave all that lies inside it behind.
void check_elements_apart(const char* name, const Layout& layout, int rank) {
  std::int64_t inner = 1;
  for (const int i : axes_by_stride(layout, rank)) {
    const std::int64_t stride = layout.stride[i];
    if (stride < 0) refuse_value(fmt::format("{}: axis {} has stride {}; an output's strides cannot be negative", name, i, stride));
    if (stride < inner) {
      refuse_value(fmt::format("{}: axis {} of size {} has stride {}, so elements of this output share memory; it must be at least {}",
                               name, i, layout.shape[i], stride, inner));
    }
    inner += (layout.shape[i] - 1) * stride;
  }
}

bool is_dense(const Layout& layout, int rank) {
  std::int64_t inner = 1;
  for (const int i : axes_by_stride(layout, rank)) {
    const std::int64_t step = std::llabs(layout.stride[i]);
    if (step == 0) continue;  // adds no memory
    if (step != inner) return false;
    inner *= layout.shape[i];
  }
  return true;
}

void* address_of(const char* name, const DLTensor& tensor, std::int64_t element_size) {
  if (tensor.data == nullptr) refuse_value(fmt::format("{}: data is null, but its shape has elements", name));
  std::uintptr_t address = 0;
  if (__builtin_add_overflow(reinterpret_cast<std::uintptr_t>(tensor.data), tensor.byte_offset, &address)) {
    refuse_value(fmt::format("{}: byte_offset {} leaves the address space", name, tensor.byte_offset));
  }
  if (address % static_cast<std::uintptr_t>(element_size) != 0) {
    refuse_value(
        fmt::format("{}: data (with byte_offset {}) is not aligned to its element's {} bytes", name, tensor.byte_offset, element_size));
  }
  return static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
}

std::string names_of(const Axes& axes) {
  std::vector<const char*> names;
  for (const Axis& axis : axes) names.push_back(axis.name);
  return fmt::format("[{}]", fmt::join(names, ", "));
}

void check_shape(const Rule& rule, const DLTensor& tensor) {
  check_rank(rule.name, tensor, rule.axes);
  if (std::equal(rule.axes.begin(), rule.axes.end(), tensor.shape, [](const Axis& axis, std::int64_t size) { return axis.size == size; }))
    return;
  std::vector<std::int64_t> sizes;
  for (const Axis& axis : rule.axes) sizes.push_back(axis.size);
  const int rank = rule.axes.rank();
  refuse_value(fmt::format("{}: shape is {}; it must be {} = {}", rule.name, shape_text(tensor.shape, rank), names_of(rule.axes),
                           shape_text(sizes.data(), rank)));
}

std::optional<DType> known_dtype(DLDataType t) {
  if (t.lanes == 1 && t.code == kDLFloat && t.bits == 64) return DType::f64;
  if (t.lanes == 1 && t.code == kDLFloat && t.bits == 32) return DType::f32;
  if (t.lanes == 1 && t.code == kDLFloat && t.bits == 16) return DType::f16;
  if (t.lanes == 1 && t.code == kDLBfloat && t.bits == 16) return DType::bf16;
  if (t.lanes == 1 && t.code == kDLInt && t.bits == 32) return DType::i32;
  return std::nullopt;
}

DType check_dtype(const Rule& rule, const DLTensor& tensor) {
  const std::optional<DType> dtype = known_dtype(tensor.dtype);
  if (dtype && rule.dtypes.has(*dtype)) return *dtype;
  const bool names_another = *rule.wanted != '\0';
  const std::string allowed = names_another ? fmt::format("{} ({})", rule.wanted, list_of(rule.dtypes)) : list_of(rule.dtypes);
  refuse_type(fmt::format("{}: dtype is {}; it must be {}", rule.name, dtype_name(tensor.dtype), allowed));
}

bool holds(const Footprint& dense, std::uintptr_t address) { return dense.dense && dense.low <= address && address < dense.high; }

// The lowest and the highest element of a tensor always exist, what lies between them only where it is dense.
bool certainly_overlap(const Footprint& a, const Footprint& b) {
  if (a.low == a.high || b.low == b.high) return false;
  return a.low == b.low || a.high == b.high || holds(a, b.low) || holds(a, b.high - 1) || holds(b, a.low) || holds(b, a.high - 1);
}

}  // namespace

std::string dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f64: return "float64";
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i32: return "int32";
  }
  return "unknown";
}

std::string dtype_name(DLDataType dtype) {
  static constexpr const char* kCodes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const std::string base = dtype.code < std::size(kCodes)
                               ? fmt::format("{}{}", kCodes[dtype.code], static_cast<int>(dtype.bits))
                               : fmt::format("code {} of {} bits", static_cast<int>(dtype.code), static_cast<int>(dtype.bits));
  return dtype.lanes == 1 ? base : fmt::format("{} x {} lanes", base, static_cast<int>(dtype.lanes));
}

std::int32_t device_type(const DLDevice& device) {
  std::int32_t type = 0;
  static_assert(sizeof(type) == sizeof(device.device_type));
  std::memcpy(&type, &device.device_type, sizeof(type));
  return type;
}

bool on_host(const DLDevice& device) { return device_type(device) == kDLCPU || device_type(device) == kDLCUDAHost; }

std::string device_name(const DLDevice& device) {
  switch (device_type(device)) {
    case kDLCPU: return "cpu";
    case kDLCUDA: return fmt::format("cuda:{}", device.device_id);
    case kDLCUDAHost: return "cuda_host";
    case kDLOpenCL: return "opencl";
    case kDLVulkan: return "vulkan";
    case kDLMetal: return "metal";
    case kDLROCM: return "rocm";
    case kDLCUDAManaged: return "cuda_managed";
    default: return fmt::format("device type {}", device_type(device));
  }
}

std::string shape_text(const std::int64_t* shape, int rank) { return fmt::format("[{}]", fmt::join(shape, shape + rank, ", ")); }

void check_rank(const char* name, const DLTensor& tensor, const Axes& axes) {
  if (tensor.ndim != axes.rank())
    refuse_value(fmt::format("{}: has {} axes; it must have {}: {}", name, tensor.ndim, axes.rank(), names_of(axes)));
  if (tensor.shape == nullptr) refuse_value(fmt::format("{}: shape is null", name));
  check_shape_values(name, tensor);
}

Layout check_layout(const char* name, const DLTensor& tensor, std::int64_t element_size, Use use, Footprint* footprint) {
  check_size_fits(name, tensor, element_size);
  Layout layout = layout_of(tensor);
  *footprint = {name, use, 0, 0, element_size, false};
  if (layout.elements == 0) return layout;

  std::int64_t low = 0, high = 0;
  check_extent(name, layout, tensor.ndim, element_size, &low, &high);
  if (use == Use::output) check_elements_apart(name, layout, tensor.ndim);
  layout.data = address_of(name, tensor, element_size);
  const auto address = reinterpret_cast<std::uintptr_t>(layout.data);
  const std::uintptr_t below = 0 - static_cast<std::uintptr_t>(low);
  if (address < below || __builtin_add_overflow(address, static_cast<std::uintptr_t>(high), &footprint->high)) {
    refuse_value(fmt::format("{}: strides {} leave the address space", name, shape_text(layout.stride.data(), tensor.ndim)));
  }
  footprint->low = address - below;
  footprint->dense = is_dense(layout, tensor.ndim);
  return layout;
}

Tensor check_tensor(const Rule& rule, const DLTensor& tensor, Footprint* footprint) {
  const DType dtype = check_dtype(rule, tensor);
  check_shape(rule, tensor);
  const Layout layout = check_layout(rule.name, tensor, size_of(dtype), rule.use, footprint);
  const int last = tensor.ndim - 1;
  if (rule.contiguous_last && layout.elements > 0 && layout.stride[last] != 1) {
    refuse_value(fmt::format("{}: its last axis has stride {}; it must be contiguous (stride 1)", rule.name, layout.stride[last]));
  }
  return {layout.data, dtype, true, tensor.ndim, layout.shape, layout.stride};
}

bool may_overlap(const std::vector<Footprint>& footprints, std::string_view a, std::string_view b) {
  const auto named = [&](std::string_view name) {
    const auto found = std::find_if(footprints.begin(), footprints.end(), [&](const Footprint& x) { return x.name == name; });
    return found == footprints.end() ? Footprint{} : *found;
  };
  const Footprint x = named(a), y = named(b);
  return x.low < y.high && y.low < x.high;
}

void check_overlap(const std::vector<Footprint>& footprints, bool state_in_place) {
  const auto in_place = [&](const Footprint& a, const Footprint& b) {
    return state_in_place && a.name == std::string_view("initial_state") && b.name == std::string_view("final_state");
  };
  for (std::size_t i = 0; i < footprints.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const Footprint &a = footprints[j], &b = footprints[i];
      if (a.use == Use::input && b.use == Use::input) continue;
      if (!certainly_overlap(a, b) || in_place(a, b)) continue;
      const bool b_is_output = b.use == Use::output;
      refuse_value(fmt::format("{}: shares memory with {}; an output must have its own", b_is_output ? b.name : a.name,
                               b_is_output ? a.name : b.name));
    }
  }
}

}  // namespace flashdelta::op
