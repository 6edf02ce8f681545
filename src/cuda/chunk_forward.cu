// Host side of the forward pass: workspace, tensor maps, launches. Nothing here waits for the device or reads from it, except the check
// of offsets that FLASHDELTA_CHECK_CU_SEQLENS asks for.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "cuda/cuda.hpp"
#include "cuda/forward/config.h"
#include "cuda/forward/forward.hpp"
#include "cuda/prepare/prepare.hpp"
#include "cuda/segment/config.h"
#include "cuda/segment/segment.hpp"
#include "cuda/segment/uncut.cuh"
#include "cuda/status.hpp"
#include "cuda/tensor_map.hpp"
#include "op/check_sequences.hpp"

namespace flashdelta::cuda {
namespace {

using op::Problem;

// The caller's device and no other afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "choosing the device");
    changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

std::int64_t chunk_numbers(const Problem& p) { return p.cu_seqlens == nullptr ? p.B * ((p.T + kChunk - 1) / kChunk) : p.T / kChunk + p.N; }

segment::Mode mode_of(const Problem& p) {
  // Token by token means few tokens: nothing to cut.
  if (p.context_parallel == FLASHDELTA_CONTEXT_PARALLEL_OFF || p.operation == op::Operation::recurrent_forward) return segment::Mode::off;
  return p.context_parallel == FLASHDELTA_CONTEXT_PARALLEL_EXACT ? segment::Mode::exact : segment::Mode::automatic;
}

// The call without cuts if all its sequences had the same length, as they have where there is no pack.
segment::Uncut uncut_alike(const Problem& p, int multiprocessors) {
  const int N = static_cast<int>(std::max<std::int64_t>(p.N, 1)), chunks = static_cast<int>((p.B * p.T / N + kChunk - 1) / kChunk);
  return segment::uncut(segment::all_alike(N, chunks), N, static_cast<int>(p.HV), multiprocessors);
}

// What every call counts, at the workspace's first multiple of 128.
struct Counters {
  int tickets, grown;
};

// Bytes from the workspace's first multiple of 128, which tensor maps want; the workspace itself is aligned to 64.
struct Layout {
  std::int64_t counters = 0, maps = 0, header = 0, items = 0, arrived = 0, scanned = 0, warm = 0, initial_read = 0, bounds = 0;
  std::int64_t states = 0, transitions = 0, records = 0, size = 0;
  segment::Mode mode = segment::Mode::off;
  segment::Room room;
  bool overwrites_initial = false;  // final_state may, while another item still reads
};

Layout layout_of(const Problem& p) {
  const auto aligned = [](std::int64_t at) { return (at + 127) / 128 * 128; };
  const std::int64_t numbers = chunk_numbers(p);
  Layout layout;
  layout.mode = mode_of(p);
  const bool cuts = layout.mode != segment::Mode::off;
  layout.overwrites_initial = cuts && p.states_overlap;
  layout.maps = aligned(layout.counters + static_cast<std::int64_t>(sizeof(Counters)));
  const std::int64_t maps = p.cu_seqlens == nullptr ? 0 : p.N * kMaps * static_cast<std::int64_t>(sizeof(CUtensorMap));
  layout.room = segment::room_of(p.N * p.HV, numbers, p.HV, layout.mode, p.batch_invariant, p.num_segments);
  const std::int64_t counts = layout.room.boundaries * 4, boundary = layout.room.boundaries * kHead * kHead * 4;
  layout.header = aligned(layout.maps + maps);
  layout.items = aligned(layout.header + static_cast<std::int64_t>(sizeof(PlanHeader)));
  layout.arrived = aligned(layout.items + layout.room.items * static_cast<std::int64_t>(sizeof(Item)));
  layout.scanned = aligned(layout.arrived + counts);
  layout.warm = aligned(layout.scanned + counts);
  layout.initial_read = aligned(layout.warm + counts);
  layout.bounds = aligned(layout.initial_read + (layout.overwrites_initial ? p.N * p.HV * 4 : 0) + kForgottenGroup);
  layout.states = aligned(layout.bounds + (cuts ? forgotten_row(static_cast<int>(numbers)) * p.HV : 0));
  layout.transitions = aligned(layout.states + boundary);
  layout.records = aligned(layout.transitions + boundary);
  layout.size = layout.records + numbers * p.HV * record_bytes(p.qk_l2norm) + 64;
  return layout;
}

device::Type type_of(op::DType dtype) {
  return dtype == op::DType::f32 ? device::Type::f32 : dtype == op::DType::bf16 ? device::Type::bf16 : device::Type::f16;
}

// Tensors by (b, t, head), or by head alone.
Scalars scalars(const op::Tensor& t) {
  if (t.data == nullptr) return {};
  if (t.rank == 1) return {t.data, type_of(t.dtype), 0, 0, t.stride[0]};
  return {t.data, type_of(t.dtype), t.stride[0], t.stride[1], t.stride[2]};
}

prepare::PerToken per_token(const op::Tensor& t) {
  const Scalars x = scalars(t);
  const std::int64_t bytes = op::size_of(t.dtype);
  return {static_cast<const char*>(x.data), x.type, x.row * bytes, x.token * bytes, x.head * bytes};
}

States states(const op::Tensor& t) {
  if (t.data == nullptr) return {};
  const StateRows rows = t.stride[2] == kHead && t.stride[3] == 1   ? StateRows::k
                         : t.stride[3] == kHead && t.stride[2] == 1 ? StateRows::v
                                                                    : StateRows::other;
  return {t.data, type_of(t.dtype), t.stride[0], t.stride[1], t.stride[2], t.stride[3], rows};
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for the number of multiprocessors");
  return count;
}

void check_limits(const Problem& p) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (chunk_numbers(p) * p.H > kMost || p.N * p.HV > kMost) {
    throw op::Error(FLASHDELTA_VALUE_ERROR, "q: " + std::to_string(p.N) + " sequences of " + std::to_string(p.HV) + " value heads and " +
                                                std::to_string(chunk_numbers(p)) + " chunks of " + std::to_string(p.H) +
                                                " key heads; the cuda backend numbers them in 31 bits");
  }
}

bool wants_offset_check() {
  const char* set = std::getenv("FLASHDELTA_CHECK_CU_SEQLENS");
  return set != nullptr && *set != '\0' && std::string(set) != "0";
}

// For debugging: reads the offsets back, which waits for the stream.
void check_offsets(const Problem& p, cudaStream_t stream) {
  cudaStreamCaptureStatus capture{};
  check(cudaStreamIsCapturing(stream, &capture), "asking whether the stream is being captured");
  if (capture != cudaStreamCaptureStatusNone) return;
  const std::int64_t width = p.cu_seqlens_int64 ? 8 : 4;
  std::vector<unsigned char> bytes(static_cast<std::size_t>((p.N + 1) * width));
  // One by one, because the stride may be anything, 0 and negative included.
  for (std::int64_t i = 0; i <= p.N; ++i) {
    check(cudaMemcpyAsync(bytes.data() + i * width, static_cast<const unsigned char*>(p.cu_seqlens) + i * p.cu_seqlens_stride * width,
                          static_cast<std::size_t>(width), cudaMemcpyDeviceToHost, stream),
          "reading cu_seqlens");
  }
  check(cudaStreamSynchronize(stream), "reading cu_seqlens");
  Problem on_host = p;
  on_host.cu_seqlens = bytes.data(), on_host.cu_seqlens_stride = 1;
  op::check_offsets(on_host);
}

}  // namespace

std::size_t chunk_forward_workspace(const Problem& p) {
  if (p.T == 0 && p.N == 0) return 0;
  check_limits(p);
  return static_cast<std::size_t>(layout_of(p).size);
}

void chunk_forward(const Problem& p) {
  const DeviceGuard guard(p.device_id);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (p.cu_seqlens != nullptr && wants_offset_check()) check_offsets(p, stream);
  if (p.N == 0 && p.B * p.T == 0) {
    if (p.segment_counts.data != nullptr) {
      check(cudaMemsetAsync(p.segment_counts.data, 0, 4 * sizeof(std::int32_t), stream), "clearing segment_counts");
    }
    return;
  }

  const Layout layout = layout_of(p);
  auto* base = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(p.workspace) + 127) / 128 * 128);
  const Sequences sequences{p.cu_seqlens, p.cu_seqlens_stride, p.cu_seqlens_int64 ? 1 : 0, static_cast<int>(p.N), static_cast<int>(p.T)};
  auto* counters = reinterpret_cast<Counters*>(base + layout.counters);
  auto* bounded_maps = p.cu_seqlens == nullptr ? nullptr : reinterpret_cast<CUtensorMap*>(base + layout.maps);
  const int count = multiprocessors(p.device_id);
  const auto operand = p.q.dtype == op::DType::f16 ? device::Operand::f16 : device::Operand::bf16;

  // Without tokens there is no tensor to map, and no kernel uses a map.
  CUtensorMap maps[kMaps] = {};
  if (p.B * p.T > 0) {
    maps[kMapQ] = make_tensor_map(p.q, kTiles, "q");
    maps[kMapK] = make_tensor_map(p.k, kTiles, "k");
    maps[kMapV] = make_tensor_map(p.v, 1, "v");
    maps[kMapO] = make_tensor_map(p.o, 1, "o");
  }
  prepare::Arguments prepared{};
  prepared.sequences = sequences;
  prepared.slots = static_cast<int>(p.B * p.T == 0 ? 0 : chunk_numbers(p));
  prepared.H = static_cast<int>(p.H);
  prepared.group = static_cast<int>(p.HV / p.H);
  prepared.l2norm = p.qk_l2norm;
  prepared.gate_in_kernel = p.gate_in_kernel;
  prepared.beta_sigmoid = p.beta_sigmoid;
  prepared.neg_eigval = p.neg_eigval;
  prepared.g = per_token(p.g);
  prepared.beta = per_token(p.beta);
  prepared.A_log = scalars(p.A_log);
  prepared.dt_bias = scalars(p.dt_bias);
  prepared.records = base + layout.records;
  prepared.bounded_maps = bounded_maps;
  prepared.counter = &counters->tickets;
  prepared.o = static_cast<unsigned char*>(p.o.data);
  prepared.o_token = p.o.stride[1] * op::size_of(p.o.dtype);
  prepared.o_head = p.o.stride[2] * op::size_of(p.o.dtype);
  prepared.saved_c = scalars(p.saved_c);
  prepared.saved_T = scalars(p.saved_T);
  prepared.saved_T_column = p.saved_T.stride[3];
  prepared.saved_states = states(p.saved_states);
  prepared.checkpoint_chunks = p.checkpoint_chunks;
  prepared.saved_slots = static_cast<int>(op::saved_states_slots(p));
  const bool by_cost = layout.mode != segment::Mode::off && !p.batch_invariant && p.num_segments == 0;
  const segment::Uncut alike = uncut_alike(p, count);
  // Lengths that are known here may tell that no cut is worth it; if packed sequences had one length each, whether one may be.
  const bool uncut = by_cost && !alike.worth_cutting && p.cu_seqlens == nullptr && p.segment_counts.data == nullptr;
  const segment::Mode mode = uncut ? segment::Mode::off : layout.mode;
  prepared.bounds = mode == segment::Mode::off ? nullptr : reinterpret_cast<signed char*>(base + layout.bounds);
  Plan plan{};
  if (mode != segment::Mode::off || p.segment_counts.data != nullptr) {
    const auto at = [&](std::int64_t offset) { return reinterpret_cast<std::int32_t*>(base + offset); };
    plan.header = reinterpret_cast<PlanHeader*>(base + layout.header);
    plan.items = reinterpret_cast<Item*>(base + layout.items);
    plan.arrived = at(layout.arrived), plan.scanned = at(layout.scanned), plan.warm = at(layout.warm);
    plan.states = reinterpret_cast<float*>(base + layout.states);
    plan.transitions = reinterpret_cast<std::uint32_t*>(base + layout.transitions);
    plan.initial_read = layout.overwrites_initial ? at(layout.initial_read) : nullptr;
  }
  prepared.plan = plan.header;
  prepared.may_leave_uncut = by_cost;
  prepared.multiprocessors = count;
  const bool early = by_cost && mode == segment::Mode::automatic && p.saved_T.data == nullptr && alike.worth_cutting &&
                     prepare::may_tell_early(static_cast<std::int64_t>(prepared.slots) * p.H, prepared.group, count);
  prepared.grown = early ? &counters->grown : nullptr;
  check(prepare::launch(prepared, maps, operand, count, stream), "launching prepare");
  if (plan.header != nullptr) {
    segment::Arguments planned{};
    planned.sequences = sequences;
    planned.HV = static_cast<int>(p.HV);
    planned.group = prepared.group;
    planned.large = prepared.group > 1 && chunk_numbers(p) * p.H >= segment::kLargeFrom;
    planned.slots = prepared.slots;
    planned.multiprocessors = count;
    planned.mode = mode;
    planned.fixed = p.batch_invariant;
    planned.forced = p.num_segments;
    planned.grown = prepared.grown;
    planned.rehearse = chunk_numbers(p) * p.HV >= segment::kRehearseFrom;
    planned.most_boundaries = static_cast<int>(layout.room.boundaries);
    planned.enough = static_cast<int>(std::ceil(-std::log(p.tolerance) / kForgottenUnit));
    planned.forgotten = prepared.bounds;
    planned.plan = plan;
    planned.counts = static_cast<std::int32_t*>(p.segment_counts.data);
    check(segment::launch(planned, stream), "launching the plan of segments");
  }

  forward::Arguments arguments{};
  arguments.sequences = sequences;
  arguments.group = prepared.group;
  arguments.HV = static_cast<int>(p.HV);
  arguments.l2norm = p.qk_l2norm;
  arguments.scale = static_cast<float>(p.scale);
  arguments.records = prepared.records;
  arguments.bounded_maps = bounded_maps;
  arguments.counter = &counters->tickets;
  arguments.plan = plan;
  arguments.initial_state = states(p.initial_state);
  arguments.final_state = states(p.final_state);
  arguments.initial_staged = has_state_map(p.initial_state);
  arguments.halves = plan.header == nullptr && (uncut ? alike.halves : halves_fit(p.N * p.HV, count));
  arguments.keep_queries = chunk_numbers(p) * p.H >= forward::kKeepQueriesFrom;
  arguments.saved_states = states(p.saved_states);
  arguments.checkpoint_chunks = p.checkpoint_chunks;
  const CUtensorMap state_map = arguments.initial_staged ? make_state_map(p.initial_state, "initial_state") : CUtensorMap{};
  check(forward::launch(arguments, maps, state_map, operand, count, stream), "launching the chunk loop");
}

}  // namespace flashdelta::cuda
