// What segment_counts reports, for the backends that run on the host.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>

#include "op/problem.hpp"

namespace flashdelta::op {

// In segment_counts' order, but for the segments, which follow from the boundaries.
struct SegmentCounts {
  std::int64_t warmed_up = 0, exact = 0, warm_up_chunks = 0;
};

// Nothing where segment_counts is not wanted. Saturates: a pack may hold more empty sequences than an int32 counts.
inline void store_segment_counts(const Problem& p, const SegmentCounts& counts) {
  if (!p.segment_counts) return;
  const std::int64_t wide[] = {p.N * p.HV + counts.warmed_up + counts.exact, counts.warmed_up, counts.exact, counts.warm_up_chunks};
  std::array<std::int32_t, 4> narrow{};
  std::transform(std::begin(wide), std::end(wide), narrow.begin(), [](std::int64_t x) {
    return static_cast<std::int32_t>(std::min<std::int64_t>(x, std::numeric_limits<std::int32_t>::max()));
  });
  std::memcpy(p.segment_counts.data, narrow.data(), sizeof(narrow));
}

}  // namespace flashdelta::op
