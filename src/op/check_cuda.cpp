#include "op/check_cuda.hpp"

#include <fmt/format.h>

#include <tuple>

#include "op/check_tensor.hpp"

namespace flashdelta::op {
namespace {

// q, k, v and o are moved by tensor maps, whose addresses and strides count 16 bytes and whose strides end below 2^40.
constexpr std::int64_t kUnit = 16;
constexpr std::int64_t kStrideLimit = std::int64_t{1} << 40;

void check_tile(const char* name, const Tensor& tensor) {
  if (tensor.data == nullptr) return;  // absent, or without elements
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % kUnit != 0) {
    refuse_value(fmt::format("{}: data (with byte_offset) is not aligned to {} bytes, as the cuda backend needs it", name, kUnit));
  }
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    if (tensor.shape[i] <= 1) continue;
    const std::int64_t bytes = tensor.stride[i] * size_of(tensor.dtype);
    if (bytes >= 0 && bytes < kStrideLimit && bytes % kUnit == 0) continue;
    refuse_value(
        fmt::format("{}: axis {} has stride {} = {} bytes; the cuda backend takes multiples of {} bytes, none negative, each below 2^40",
                    name, i, tensor.stride[i], bytes, kUnit));
  }
}

}  // namespace

void check_cuda(const Problem& p) {
  for (const auto& [name, tensor] : {std::tuple{"q", &p.q}, {"k", &p.k}, {"v", &p.v}, {"o", &p.o}}) check_tile(name, *tensor);
}

}  // namespace flashdelta::op
