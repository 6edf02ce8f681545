// Schedules the backward pass: one item per (sequence, key head), which sums dq and dk over its value heads, or per segment of it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/cpu.hpp"
#include "cpu/scratch.hpp"
#include "cpu/segments.hpp"
#include "cpu/sharing.hpp"
#include "cpu/threads.hpp"
#include "op/element.hpp"

namespace flashdelta::cpu {
namespace {

double macs(const op::Problem& p) {
  const auto tokens = static_cast<double>(p.B * p.T), k = static_cast<double>(p.K), v = static_cast<double>(p.V);
  return tokens * static_cast<double>(p.HV) * (7 * k * v + kChunk * 2.5 * (k + v));
}

struct Layout : SegmentLayout {
  HeadGroups groups;
  std::int64_t sums_at, flags_at;  // in bytes
  std::size_t bytes;

  explicit Layout(const op::Problem& p)
      : SegmentLayout(p, useful_threads(p, macs(p)), backward_scratch(p)),
        groups(p),
        sums_at(end),
        flags_at(sums_at + (p.gate_in_kernel ? (boundaries + p.N * p.HV) * 2 * 8 : 0)),
        bytes(static_cast<std::size_t>(flags_at + boundaries)) {}
};

// What is left of an item: of the group of value heads that starts at `head`, the chunks before `last`; then the groups after it.
struct Part {
  std::int64_t item = 0, head = 0, last = 0;
};

class Run {
 public:
  explicit Run(const op::Problem& p)
      : p_(p), kernels_(*find_kernels(p.instruction_set)), at_(p), base_(static_cast<std::byte*>(p.workspace)) {}

  void run() {
    if (at_.boundaries > 0) {
      find_boundary_gradients();
      scan();
    }
    items_ = items_of(at_.cuts, p_.H, [](const Cut&, std::int64_t) { return true; });
    parallel_for(static_cast<std::int64_t>(items_.size()), at_.threads, [&](std::int64_t, int thread) { work(thread); });
    if (p_.gate_in_kernel) store_gate_sums();
    for (const op::Tensor* x : {&p_.dq, &p_.dk, &p_.dv, &p_.dg, &p_.dbeta}) clear_outside(p_, *x);
  }

 private:
  // The state's gradient after segment j < count - 1; segment j's transition for j >= 1, and whether that is needed.
  [[nodiscard]] std::int64_t boundary(const Cut& cut, std::int64_t h, std::int64_t j) const {
    return cut.first_boundary + h * (cut.count - 1) + j;
  }
  [[nodiscard]] float* after(const Cut& cut, std::int64_t h, std::int64_t j) const {
    return floats(at_.states_at) + boundary(cut, h, j) * at_.state;
  }
  [[nodiscard]] float* transition(const Cut& cut, std::int64_t h, std::int64_t j) const {
    return floats(at_.transitions_at) + boundary(cut, h, j - 1) * at_.transition;
  }
  [[nodiscard]] std::byte& exact(const Cut& cut, std::int64_t h, std::int64_t j) const {
    return base_[at_.flags_at + boundary(cut, h, j - 1)];
  }
  // Parts of dA_log and d_dt_bias of value head h and segment j: segments of sequence n stand after those of the sequences before it.
  [[nodiscard]] double* sums(const Cut& cut, std::int64_t h, std::int64_t j) const {
    return reinterpret_cast<double*>(base_ + at_.sums_at) + 2 * (cut.first_boundary + cut.n * p_.HV + h * cut.count + j);
  }
  [[nodiscard]] float* floats(std::int64_t byte) const { return reinterpret_cast<float*>(base_ + byte); }
  [[nodiscard]] float* scratch(int thread) const { return floats(0) + thread * at_.scratch; }

  void find_boundary_gradients() {
    const auto items = items_of(at_.cuts, p_.HV, [](const Cut&, std::int64_t j) { return j > 0; });
    parallel_for(2 * static_cast<std::int64_t>(items.size()), at_.threads, [&](std::int64_t i, int thread) {
      const Item& x = items[static_cast<std::size_t>(i / 2)];
      const bool want_transition = i % 2 == 1, last = x.j + 1 == x.cut->count;
      Span span = segment(p_, *x.cut, x.j);
      const std::int64_t warm_up = last ? 0 : warm_up_chunks(p_, span, x.head, true);
      if (want_transition) {
        if (last || warm_up > 0) return;
        float* m = transition(*x.cut, x.head, x.j);
        std::memset(m, 0, static_cast<std::size_t>(at_.transition) * sizeof(float));
        for (std::int64_t k = 0; k < p_.K; ++k) m[state_at(p_.K, p_.K, k, k)] = 1;
        return kernels_.backward_state(p_, span, x.head, Pass::transition, m, scratch(thread));
      }
      exact(*x.cut, x.head, x.j) = std::byte{!last && warm_up == 0};
      if (warm_up > 0) span.last = span.first + warm_up;
      float* s = after(*x.cut, x.head, x.j - 1);
      kernels_.load_state(last ? p_.d_final_state : op::Tensor{}, x.cut->n, x.head, p_.K, p_.V, s);
      kernels_.backward_state(p_, span, x.head, Pass::state, s, scratch(thread));
    });
  }

  void scan() {
    const auto heads = items_of(at_.cuts, p_.HV, [](const Cut&, std::int64_t j) { return j == 0; });
    parallel_for(static_cast<std::int64_t>(heads.size()), at_.threads, [&](std::int64_t i, int) {
      const Item& x = heads[static_cast<std::size_t>(i)];
      for (std::int64_t j = x.cut->count - 2; j > 0; --j) {
        if (exact(*x.cut, x.head, j) == std::byte{0}) continue;
        kernels_.apply_transition(p_.K, p_.V, transition(*x.cut, x.head, j), after(*x.cut, x.head, j), after(*x.cut, x.head, j - 1));
      }
    });
  }

  // A thread's share of the items, and of what slower ones have begun.
  void work(int thread) {
    const auto count = static_cast<std::int64_t>(items_.size());
    for (std::int64_t i = next_++; i < count; i = next_++) {
      const Item& x = items_[static_cast<std::size_t>(i)];
      full({i, 0, segment(p_, *x.cut, x.j).last}, false, thread);
    }
    for (Part part; sharing_.ask(thread, true, &part);) full(part, true, thread);
  }

  // `begun`: what the group has so far stands in the thread's scratch.
  void full(Part part, bool begun, int thread) {
    const HeadGroups& groups = at_.groups;
    const Item& x = items_[static_cast<std::size_t>(part.item)];
    const Span span = segment(p_, *x.cut, x.j);
    while (part.head < groups.ratio) {
      const std::int64_t count = heads(part);
      if (!begun) begin(x, part, thread);
      if (!run_group(x, span, &part, thread)) return;
      finish(x, part, thread);
      part.head += count;
      part.last = span.last;
      begun = false;
    }
  }

  [[nodiscard]] std::int64_t heads(const Part& part) const { return at_.groups.live ? at_.groups.ratio : at_.groups.at(part.head); }
  [[nodiscard]] std::int64_t head(const Item& x, const Part& part) const { return x.head * at_.groups.ratio + part.head; }
  [[nodiscard]] float* d_states(const Part& part, int thread) const { return scratch(thread) + at_.scratch - heads(part) * at_.state; }

  void begin(const Item& x, const Part& part, int thread) {
    gate_sums_[static_cast<std::size_t>(thread)].assign(static_cast<std::size_t>(2 * heads(part)), 0);
    for (std::int64_t i = 0; i < heads(part); ++i) {
      float* s = d_states(part, thread) + i * at_.state;
      if (x.j + 1 == x.cut->count) {
        kernels_.load_state(p_.d_final_state, x.cut->n, head(x, part) + i, p_.K, p_.V, s);
      } else {
        std::memcpy(s, after(*x.cut, head(x, part) + i, x.j), static_cast<std::size_t>(at_.state) * sizeof(float));
      }
    }
  }

  // False where a faster thread took over.
  bool run_group(const Item& x, const Span& span, Part* part, int thread) {
    using Clock = std::chrono::steady_clock;
    double* gate_sums = gate_sums_[static_cast<std::size_t>(thread)].data();
    const auto left = [&] { return part->last - span.first < kLeastShared ? 0 : part->last - span.first; };
    sharing_.open(thread, left());
    while (part->last > span.first) {
      // As much as is recomputed from one checkpoint.
      const std::int64_t first = std::max(span.first, (part->last - 1) / p_.checkpoint_chunks * p_.checkpoint_chunks);
      const auto start = Clock::now();
      kernels_.backward(p_, {span.n, first, part->last}, head(x, *part), heads(*part), d_states(*part, thread), gate_sums, scratch(thread));
      sharing_.set_pace(thread, (Clock::now() - start).count() / (part->last - first));
      part->last = first;
      const int asking = sharing_.asking(thread);
      if (asking >= 0 && left() > 0) {
        hand_over(*part, thread, asking);
        return false;
      }
      if (asking >= 0) sharing_.refuse(thread, asking);
      sharing_.set_left(thread, left());
    }
    sharing_.close(thread);
    return true;
  }

  void hand_over(const Part& part, int thread, int asking) {
    gate_sums_[static_cast<std::size_t>(asking)] = gate_sums_[static_cast<std::size_t>(thread)];
    std::memcpy(d_states(part, asking), d_states(part, thread), static_cast<std::size_t>(heads(part) * at_.state) * sizeof(float));
    sharing_.give(thread, asking, part);
    sharing_.close(thread);
  }

  void finish(const Item& x, const Part& part, int thread) const {
    for (std::int64_t i = 0; i < heads(part); ++i) {
      if (p_.d_initial_state && x.j == 0) {
        kernels_.store_state(p_.d_initial_state, x.cut->n, head(x, part) + i, p_.K, {0, p_.V}, d_states(part, thread) + i * at_.state);
      }
      if (!p_.gate_in_kernel) continue;
      std::memcpy(sums(*x.cut, head(x, part) + i, x.j), &gate_sums_[static_cast<std::size_t>(thread)][static_cast<std::size_t>(2 * i)],
                  2 * sizeof(double));
    }
  }

  // Over sequences and segments in their order, whichever threads made the parts.
  void store_gate_sums() const {
    std::vector<const Cut*> by_sequence(at_.cuts.size());
    for (const Cut& cut : at_.cuts) by_sequence[static_cast<std::size_t>(cut.n)] = &cut;
    for (std::int64_t h = 0; h < p_.HV; ++h) {
      double sum[2] = {};
      for (const Cut* cut : by_sequence) {
        for (std::int64_t j = 0; j < cut->count; ++j) {
          for (int i = 0; i < 2; ++i) sum[i] += sums(*cut, h, j)[i];
        }
      }
      if (p_.dA_log) op::store_element(p_.dA_log.dtype, p_.dA_log.at(h), sum[0]);
      if (p_.d_dt_bias) op::store_element(p_.d_dt_bias.dtype, p_.d_dt_bias.at(h), sum[1]);
    }
  }

  const op::Problem& p_;
  const Kernels& kernels_;
  Layout at_;
  std::byte* base_;
  std::vector<Item> items_;
  std::atomic<std::int64_t> next_{0};
  std::vector<std::vector<double>> gate_sums_{static_cast<std::size_t>(at_.threads)};  // of each thread's group
  Sharing<Part> sharing_{at_.threads};
};

}  // namespace

std::size_t chunk_backward_workspace(const op::Problem& problem) { return Layout(problem).bytes; }

void chunk_backward(const op::Problem& problem) { Run(problem).run(); }

}  // namespace flashdelta::cpu
