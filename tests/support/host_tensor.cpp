#include "support/host_tensor.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace flashdelta::testing {
namespace {

constexpr std::byte kNaN{0xff};  // all bits set is a NaN in every dtype of floats
constexpr std::byte kGuard{0xa5};
constexpr std::size_t kGuardBytes = 64;
constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kPadding = 8;  // elements

std::int64_t count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, [](std::int64_t a, std::int64_t b) { return a * b; });
}

std::int64_t extent(const Shape& shape, const Shape& strides) {
  if (count(shape) == 0) return 0;
  std::int64_t last = 0;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) last += (shape[axis] - 1) * strides[axis];
  return last + 1;
}

std::size_t aligned_start(const std::vector<std::byte>& bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(bytes.data()) + kGuardBytes;
  return kGuardBytes + (kAlignment - address % kAlignment) % kAlignment;
}

DLDataType dl_dtype(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * op::size_of(dtype));
  const auto code = dtype == DType::bf16 ? kDLBfloat : dtype == DType::i32 ? kDLInt : kDLFloat;
  return {static_cast<std::uint8_t>(code), bits, 1};
}

}  // namespace

Shape strides_of(const Shape& shape, Layout layout) {
  Shape strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const std::size_t axis = layout == Layout::transposed ? i : shape.size() - 1 - i;
    strides[axis] = stride;
    stride *= std::max<std::int64_t>(shape[axis], 1);
    if (layout == Layout::padded) stride += kPadding;
  }
  return strides;
}

std::shared_ptr<HostTensor::Buffer> HostTensor::make_buffer(std::size_t bytes) {
  auto buffer = std::make_shared<Buffer>();
  buffer->bytes.assign(bytes + 2 * kGuardBytes + kAlignment, kGuard);
  buffer->first = aligned_start(buffer->bytes);
  return buffer;
}

HostTensor::HostTensor(DType dtype, Shape shape, Layout layout)
    : dtype_(dtype), shape_(std::move(shape)), strides_(strides_of(shape_, layout)) {
  buffer_ = make_buffer(static_cast<std::size_t>(extent(shape_, strides_) * op::size_of(dtype)));
  for (std::int64_t i = 0; i < size(); ++i) std::fill_n(at(i), op::size_of(dtype_), kNaN);
}

HostTensor::HostTensor(const HostTensor& other)
    : dtype_(other.dtype_), shape_(other.shape_), strides_(other.strides_), offset_(other.offset_) {
  if (!other.present()) return;
  const std::size_t used = other.buffer_->bytes.size() - other.buffer_->first;
  buffer_ = make_buffer(used);
  std::copy_n(other.buffer_->bytes.begin() + static_cast<std::ptrdiff_t>(other.buffer_->first), used,
              buffer_->bytes.begin() + static_cast<std::ptrdiff_t>(buffer_->first));
}

HostTensor& HostTensor::operator=(const HostTensor& other) {
  if (this != &other) *this = HostTensor(other);
  return *this;
}

HostTensor HostTensor::view(Shape shape, Shape strides, std::int64_t offset) const {
  HostTensor result;
  result.dtype_ = dtype_;
  result.shape_ = std::move(shape);
  result.strides_ = std::move(strides);
  result.offset_ = offset_ + offset;
  result.buffer_ = buffer_;
  return result;
}

HostTensor HostTensor::converted(DType dtype, Layout layout) const {
  HostTensor result(dtype, shape_, layout);
  for (std::int64_t i = 0; i < size(); ++i) {
    // The same dtype keeps its bits, NaN payloads too.
    if (dtype == dtype_) {
      std::memcpy(result.at(i), at(i), static_cast<std::size_t>(op::size_of(dtype)));
    } else {
      result.put(i, (*this)[i]);
    }
  }
  return result;
}

HostTensor HostTensor::swapped_last_two() const {
  HostTensor result = *this;
  std::swap(result.shape_[shape_.size() - 1], result.shape_[shape_.size() - 2]);
  std::swap(result.strides_[shape_.size() - 1], result.strides_[shape_.size() - 2]);
  return result.with_layout(Layout::contiguous);
}

HostTensor HostTensor::part(std::size_t axis, std::int64_t begin, std::int64_t end) const {
  Shape shape = shape_;
  shape[axis] = end - begin;
  return view(std::move(shape), strides_, begin * strides_[axis]);
}

HostTensor HostTensor::slice(std::size_t axis, std::int64_t begin, std::int64_t end) const {
  return part(axis, begin, end).with_layout(Layout::contiguous);
}

std::int64_t HostTensor::size() const { return present() ? count(shape_) : 0; }

std::byte* HostTensor::at(const Shape& index) const {
  const std::int64_t element = std::inner_product(index.begin(), index.end(), strides_.begin(), offset_);
  return buffer_->bytes.data() + buffer_->first + element * op::size_of(dtype_);
}

std::byte* HostTensor::at(std::int64_t position) const {
  std::int64_t element = offset_;
  for (std::size_t axis = shape_.size(); axis-- > 0;) {
    element += position % shape_[axis] * strides_[axis];
    position /= shape_[axis];
  }
  return buffer_->bytes.data() + buffer_->first + element * op::size_of(dtype_);
}

double HostTensor::get(const Shape& index) const { return op::load_element(dtype_, at(index)); }
void HostTensor::set(const Shape& index, double value) { op::store_element(dtype_, at(index), value); }

std::vector<double> HostTensor::values() const {
  std::vector<double> result(static_cast<std::size_t>(size()));
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = (*this)[static_cast<std::int64_t>(i)];
  return result;
}

void HostTensor::fill(double value) {
  for (std::int64_t i = 0; i < size(); ++i) put(i, value);
}

void HostTensor::assign(const std::vector<double>& values) {
  for (std::int64_t i = 0; i < size(); ++i) put(i, values[static_cast<std::size_t>(i)]);
}

std::vector<std::byte> HostTensor::bits() const {
  std::vector<std::byte> result;
  result.reserve(static_cast<std::size_t>(size() * op::size_of(dtype_)));
  for (std::int64_t i = 0; i < size(); ++i) {
    const std::byte* from = at(i);
    result.insert(result.end(), from, from + op::size_of(dtype_));
  }
  return result;
}

bool HostTensor::guards_intact() const {
  if (!present()) return true;
  std::vector<bool> owned(buffer_->bytes.size(), false);
  for (std::int64_t i = 0; i < size(); ++i) {
    const auto first = static_cast<std::size_t>(at(i) - buffer_->bytes.data());
    std::fill_n(owned.begin() + static_cast<std::ptrdiff_t>(first), op::size_of(dtype_), true);
  }
  for (std::size_t i = 0; i < owned.size(); ++i) {
    if (!owned[i] && buffer_->bytes[i] != kGuard) return false;
  }
  return true;
}

DLTensor* HostTensor::dl() const {
  if (!present()) return nullptr;
  dl_ = {};
  dl_.data = buffer_->bytes.data() + buffer_->first;
  dl_.device = {kDLCPU, 0};
  dl_.ndim = static_cast<int>(shape_.size());
  dl_.dtype = dl_dtype(dtype_);
  dl_.shape = const_cast<std::int64_t*>(shape_.data());
  dl_.strides = const_cast<std::int64_t*>(strides_.data());
  dl_.byte_offset = static_cast<std::uint64_t>(offset_ * op::size_of(dtype_));
  return &dl_;
}

HostOffsets::HostOffsets(std::vector<std::int64_t> values, bool is_int64) : values_(std::move(values)), is_int64_(is_int64) {
  for (const std::int64_t value : values_) values32_.push_back(static_cast<std::int32_t>(value));
}

DLTensor* HostOffsets::dl() const {
  if (values_.empty()) return nullptr;
  length_ = static_cast<std::int64_t>(values_.size());
  dl_ = {};
  dl_.data = is_int64_ ? static_cast<void*>(const_cast<std::int64_t*>(values_.data())) : const_cast<std::int32_t*>(values32_.data());
  dl_.device = {kDLCPU, 0};
  dl_.ndim = 1;
  dl_.dtype = {kDLInt, static_cast<std::uint8_t>(is_int64_ ? 64 : 32), 1};
  dl_.shape = &length_;
  return &dl_;
}

Workspace::Workspace(std::size_t size) : size_(size), bytes_(size + 2 * kGuardBytes + kAlignment, kGuard) {
  first_ = aligned_start(bytes_);
  std::fill_n(bytes_.begin() + static_cast<std::ptrdiff_t>(first_), size_, kNaN);
}

bool Workspace::guards_intact() const {
  const auto guard = [](std::byte b) { return b == kGuard; };
  const auto begin = bytes_.begin() + static_cast<std::ptrdiff_t>(first_);
  return std::all_of(bytes_.begin(), begin, guard) && std::all_of(begin + static_cast<std::ptrdiff_t>(size_), bytes_.end(), guard);
}

}  // namespace flashdelta::testing
