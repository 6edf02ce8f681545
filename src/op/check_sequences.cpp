#include "op/check_sequences.hpp"

#include <fmt/format.h>

namespace flashdelta::op {
namespace {

bool is_int64(const DLTensor& tensor) {
  const DLDataType t = tensor.dtype;
  if (t.code == kDLInt && t.lanes == 1 && (t.bits == 32 || t.bits == 64)) return t.bits == 64;
  refuse_type(fmt::format("cu_seqlens: dtype is {}; it must be int32 or int64", dtype_name(t)));
}

}  // namespace

void check_offsets(const Problem& p) {
  std::int64_t before = 0;
  for (std::int64_t i = 0; i <= p.N; ++i) {
    const std::int64_t value = cu_seqlen(p, i);
    if (value < 0) refuse_value(fmt::format("cu_seqlens: entry {} is {}; an offset cannot be negative", i, value));
    if (value > p.T) refuse_value(fmt::format("cu_seqlens: entry {} is {}; it must be at most T = {}", i, value, p.T));
    if (value < before) {
      refuse_value(fmt::format("cu_seqlens: entry {} is {}, below entry {} = {}; offsets must not decrease", i, value, i - 1, before));
    }
    before = value;
  }
}

void check_sequences(const DLTensor* cu_seqlens, Problem* problem, Footprint* footprint) {
  Problem& p = *problem;
  if (cu_seqlens == nullptr) {
    p.N = p.B;
    return;
  }
  const bool int64 = is_int64(*cu_seqlens);
  check_rank("cu_seqlens", *cu_seqlens, {{"N + 1"}});
  if (cu_seqlens->shape[0] < 1) refuse_value("cu_seqlens: has 0 entries; it must have N + 1, so at least 1");
  if (p.B != 1) refuse_value(fmt::format("cu_seqlens: given with B = {}; packed sequences need B = 1", p.B));
  const Layout layout = check_layout("cu_seqlens", *cu_seqlens, int64 ? 8 : 4, Use::input, footprint);
  p.N = layout.shape[0] - 1;
  p.cu_seqlens = layout.data;
  p.cu_seqlens_stride = layout.stride[0];
  p.cu_seqlens_int64 = int64;
  if (p.backend != Backend::cuda) check_offsets(p);
}

}  // namespace flashdelta::op
