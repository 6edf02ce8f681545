// Schedules the forward pass: one item per (sequence, value head), or per segment of it; the last of them are shared.
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/cpu.hpp"
#include "cpu/scratch.hpp"
#include "cpu/segments.hpp"
#include "cpu/sharing.hpp"
#include "cpu/threads.hpp"
#include "op/segment_counts.hpp"

namespace flashdelta::cpu {
namespace {

// Multiply-adds of the whole call, triangular products halved.
double macs(const op::Problem& p) {
  const auto tokens = static_cast<double>(p.B * p.T), k = static_cast<double>(p.K), v = static_cast<double>(p.V);
  return tokens * static_cast<double>(p.HV) * (3 * k * v + kChunk * (k + v));
}

struct Layout : SegmentLayout {
  std::int64_t flags_at;  // in bytes
  std::size_t bytes;

  explicit Layout(const op::Problem& p)
      : SegmentLayout(p, useful_threads(p, macs(p)), forward_scratch(p) + state_floats(p.K, p.V)),
        flags_at(end),
        bytes(static_cast<std::size_t>(flags_at + boundaries)) {}
};

// Value columns of an item from a chunk on. They depend on one another through T and P alone, which everyone who has some makes.
struct Part {
  std::int64_t item = 0, chunk = 0;
  Columns columns;
};

// How many threads can work side by side on that many chunks of some columns.
std::int64_t shares(const Columns& columns, std::int64_t chunks) {
  return chunks < kLeastShared ? 1 : (columns.last - columns.first + kValueBlock - 1) / kValueBlock;
}

// What Sharing's asker goes by.
std::int64_t to_share(const Columns& columns, std::int64_t chunks) {
  return shares(columns, chunks) > 1 ? chunks * (columns.last - columns.first) : 0;
}

class Run {
 public:
  explicit Run(const op::Problem& p)
      : p_(p), kernels_(*find_kernels(p.instruction_set)), at_(p), base_(static_cast<std::byte*>(p.workspace)) {}

  void run() {
    if (at_.boundaries > 0) {
      find_boundary_states();
      scan();
    }
    items_ = items_of(at_.cuts, p_.HV, [](const Cut&, std::int64_t) { return true; });
    std::int64_t busy = 0;
    for (const Item& x : items_) {
      const Span span = segment(p_, *x.cut, x.j);
      // A thread that gets no item of its own takes as long to start as any.
      busy += span.last - span.first < 4 * kLeastShared ? 1 : shares({0, p_.V}, span.last - span.first);
    }
    parallel_for(busy, at_.threads, [&](std::int64_t, int thread) { work(thread); });
    for (const op::Tensor* x : {&p_.o, &p_.saved_c, &p_.saved_T}) clear_outside(p_, *x);
    if (p_.saved_states) clear_unused_states();
    op::store_segment_counts(p_, {warmed_up_, at_.boundaries - warmed_up_, warm_up_chunks_});
  }

 private:
  // The state before segment j >= 1, segment j's transition, and whether that is needed.
  [[nodiscard]] std::int64_t boundary(const Item& x, std::int64_t j) const {
    return x.cut->first_boundary + x.head * (x.cut->count - 1) + j - 1;
  }
  [[nodiscard]] float* state(const Item& x, std::int64_t j) const { return floats(at_.states_at) + boundary(x, j) * at_.state; }
  [[nodiscard]] float* transition(const Item& x, std::int64_t j) const {
    return floats(at_.transitions_at) + boundary(x, j) * at_.transition;
  }
  [[nodiscard]] std::byte& exact(const Item& x, std::int64_t j) const { return base_[at_.flags_at + boundary(x, j)]; }
  [[nodiscard]] float* floats(std::int64_t byte) const { return reinterpret_cast<float*>(base_ + byte); }
  [[nodiscard]] float* scratch(int thread) const { return floats(0) + thread * at_.scratch; }

  // Segment j's own part of the state before segment j + 1, and, where the gates do not cut off what came before it, its transition.
  void find_boundary_states() {
    const auto items = items_of(at_.cuts, p_.HV, [](const Cut& cut, std::int64_t j) { return j + 1 < cut.count; });
    parallel_for(2 * static_cast<std::int64_t>(items.size()), at_.threads, [&](std::int64_t i, int thread) {
      const Item& x = items[static_cast<std::size_t>(i / 2)];
      const bool want_transition = i % 2 == 1;
      Span span = segment(p_, *x.cut, x.j);
      const std::int64_t warm_up = x.j == 0 ? 0 : warm_up_chunks(p_, span, x.head, false);
      if (want_transition) {
        if (x.j == 0 || warm_up > 0) return;
        float* m = transition(x, x.j);
        std::memset(m, 0, static_cast<std::size_t>(at_.transition) * sizeof(float));
        for (std::int64_t k = 0; k < p_.K; ++k) m[state_at(p_.K, p_.K, k, k)] = 1;
        return kernels_.forward(p_, span, x.head, {0, p_.K}, Pass::transition, m, scratch(thread));
      }
      if (x.j > 0) exact(x, x.j) = std::byte{warm_up == 0};
      if (warm_up > 0) {
        span.first = span.last - warm_up;
        ++warmed_up_;
        warm_up_chunks_ += warm_up;
      }
      float* s = state(x, x.j + 1);
      kernels_.load_state(x.j == 0 ? p_.initial_state : op::Tensor{}, x.cut->n, x.head, p_.K, p_.V, s);
      kernels_.forward(p_, span, x.head, {0, p_.V}, Pass::state, s, scratch(thread));
    });
  }

  void scan() {
    const auto heads = items_of(at_.cuts, p_.HV, [](const Cut&, std::int64_t j) { return j == 0; });
    parallel_for(static_cast<std::int64_t>(heads.size()), at_.threads, [&](std::int64_t i, int) {
      const Item& x = heads[static_cast<std::size_t>(i)];
      for (std::int64_t j = 1; j + 1 < x.cut->count; ++j) {
        if (exact(x, j) != std::byte{0}) kernels_.apply_transition(p_.K, p_.V, transition(x, j), state(x, j), state(x, j + 1));
      }
    });
  }

  // Slots of saved_states between one sequence's last checkpoint and the next one's first.
  void clear_unused_states() const {
    const std::vector<float> zero(static_cast<std::size_t>(at_.state));
    std::int64_t slot = 0;
    for (std::int64_t n = 0; n <= p_.N; ++n) {
      const bool end = n == p_.N;
      const std::int64_t base = end ? op::saved_states_slots(p_) : op::saved_states_base(p_, n);
      for (; slot < base; ++slot) {
        for (std::int64_t h = 0; h < p_.HV; ++h) kernels_.store_state(p_.saved_states, slot, h, p_.K, {0, p_.V}, zero.data());
      }
      if (!end) slot = base + (chunks_of(p_, n) + p_.checkpoint_chunks - 1) / p_.checkpoint_chunks;
    }
  }

  // A thread's share of the items, and of what others have begun.
  void work(int thread) {
    const auto count = static_cast<std::int64_t>(items_.size());
    for (std::int64_t i = next_++; i < count; i = next_++) {
      const Item& x = items_[static_cast<std::size_t>(i)];
      float* s = x.j > 0 ? state(x, x.j) : own_state(thread);
      if (x.j == 0) kernels_.load_state(p_.initial_state, x.cut->n, x.head, p_.K, p_.V, s);
      full({i, segment(p_, *x.cut, x.j).first, {0, p_.V}}, s, thread);
    }
    for (Part part; sharing_.ask(thread, false, &part);) full(part, own_state(thread), thread);
  }

  void full(Part part, float* s, int thread) {
    const Item& x = items_[static_cast<std::size_t>(part.item)];
    const Span span = segment(p_, *x.cut, x.j);
    sharing_.open(thread, to_share(part.columns, span.last - part.chunk));
    while (part.chunk < span.last) {
      kernels_.forward(p_, {span.n, part.chunk, part.chunk + 1}, x.head, part.columns, Pass::full, s, scratch(thread));
      ++part.chunk;
      const int asking = sharing_.asking(thread);
      if (asking >= 0 && shares(part.columns, span.last - part.chunk) > 1) {
        give_half(&part, s, thread, asking);
      } else if (asking >= 0) {
        sharing_.refuse(thread, asking);
      }
      sharing_.set_left(thread, to_share(part.columns, span.last - part.chunk));
    }
    sharing_.close(thread);
    if (p_.final_state && x.j + 1 == x.cut->count) {
      kernels_.store_state(p_.final_state, x.cut->n, x.head, p_.K, part.columns, s);
    }
  }

  void give_half(Part* part, const float* s, int thread, int asking) {
    Columns& kept = part->columns;
    const std::int64_t blocks = (kept.last - kept.first + kValueBlock - 1) / kValueBlock;
    const Columns given = {kept.first + (blocks + 1) / 2 * kValueBlock, kept.last};
    kept.last = given.first;
    const std::int64_t from = state_at(p_.K, p_.V, 0, given.first),
                       to = given.last == p_.V ? at_.state : state_at(p_.K, p_.V, 0, given.last);
    std::memcpy(own_state(asking) + from, s + from, static_cast<std::size_t>(to - from) * sizeof(float));
    sharing_.give(thread, asking, {part->item, part->chunk, given});
  }

  [[nodiscard]] float* own_state(int thread) const { return scratch(thread) + at_.scratch - at_.state; }

  const op::Problem& p_;
  const Kernels& kernels_;
  Layout at_;
  std::byte* base_;
  std::vector<Item> items_;
  std::atomic<std::int64_t> next_{0};
  Sharing<Part> sharing_{at_.threads};
  std::atomic<std::int64_t> warmed_up_{0}, warm_up_chunks_{0};  // boundaries and chunks; for segment_counts
};

}  // namespace

std::size_t chunk_forward_workspace(const op::Problem& problem) { return Layout(problem).bytes; }

void chunk_forward(const op::Problem& problem) { Run(problem).run(); }

}  // namespace flashdelta::cpu
