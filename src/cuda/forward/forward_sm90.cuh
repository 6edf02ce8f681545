// Device code of the chunk loop. Formulas: algebra.md ("Forward, one chunk"); timeline and budgets: README.md beside this file.
//
// The state is held transposed: consumer w has rows 64 w .. 64 w + 63 of S^T (its value columns) in registers for a whole item, so that
// every product has the state, or a function of it, as its A operand from registers, and the two consumers exchange nothing.
#pragma once

#include "cuda/device/wgmma.cuh"
#include "cuda/forward/factors.cuh"
#include "cuda/forward/hard.cuh"
#include "cuda/forward/producers.cuh"
#include "cuda/forward/state.cuh"

namespace flashdelta::cuda::forward {

// U (64 x 64) = or += A (64 x 64, four k steps) B^T, B lower triangular in staged panels: rows 0..31 meet two panels, 32..63 all four.
template <Operand Type, bool Fresh>
__device__ __forceinline__ void multiply_panels(float (&U)[32], const uint32_t* a, uint64_t panels) {
  device::wgmma_rs_n32<Type, Fresh>(U, a, panels);
  device::wgmma_rs_n32<Type, Fresh>(U + 16, a, device::advance(panels, staged_panel(0) + 1024));
  device::wgmma_rs_n32<Type, false>(U, a + 4, device::advance(panels, staged_panel(1)));
  device::wgmma_rs_n32<Type, false>(U + 16, a + 4, device::advance(panels, staged_panel(1) + 1024));
  device::wgmma_rs_n32<Type, false>(U + 16, a + 8, device::advance(panels, staged_panel(2) + 1024));
  device::wgmma_rs_n32<Type, false>(U + 16, a + 12, device::advance(panels, staged_panel(3) + 1024));
}

// X^T = beta (v - gam k S)^T: (k S)^T in U.
template <Operand Type>
__device__ __forceinline__ void solve_for(uint32_t (&X)[16], const float (&U)[32], const uint32_t (&V)[16], const float4 (&solve)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 v0 = device::unpack<Type>(V[2 * j]), v1 = device::unpack<Type>(V[2 * j + 1]);
    const float4 f = solve[j];
    X[2 * j] = device::pack<Type>(fmaf(U[4 * j], f.x, v0.x * f.z), fmaf(U[4 * j + 1], f.y, v0.y * f.w));
    X[2 * j + 1] = device::pack<Type>(fmaf(U[4 * j + 2], f.x, v1.x * f.z), fmaf(U[4 * j + 3], f.y, v1.y * f.w));
  }
}

// S^T += (factor U)^T k, issued and committed.
template <Operand Type>
__device__ __forceinline__ void write_state(float (&S)[64], const float (&U)[32], const float2 (&factor)[8], const unsigned char* tile) {
  uint32_t U16[16];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    U16[2 * j] = device::pack<Type>(U[4 * j] * factor[j].x, U[4 * j + 1] * factor[j].y);
    U16[2 * j + 1] = device::pack<Type>(U[4 * j + 2] * factor[j].x, U[4 * j + 3] * factor[j].y);
  }
  const uint64_t k_columns = device::describe_columns_128(tile, kChunk * 128);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    device::wgmma_rs_n128_columns<Type>(S, U16 + 4 * step, device::advance(k_columns, step * 2048));
  }
  device::wgmma_commit();
}

template <Operand Type>
__device__ __forceinline__ void multiply_tile(float (&U)[32], const uint32_t* state, uint64_t tile) {
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    if (step == 0) {
      device::wgmma_rs_n64<Type, true>(U, state, tile);
    } else {
      device::wgmma_rs_n64<Type, false>(U, state + 4 * step, device::advance(tile, device::rows_step(step)));
    }
  }
}

constexpr int kMostSteps = 1 << 28;  // more than any scan has

// The stages as a scan sees them.
struct ScanRing {
  Shared& s;
  Place<kStages>& stage;

  __device__ __forceinline__ const unsigned char* part(int half) const { return half == 0 ? s.k[stage.at][0] : s.q[stage.at][0]; }
  __device__ __forceinline__ const unsigned char* state(int half) const { return half == 0 ? s.p[stage.at] : s.t[stage.at].panels; }
  __device__ __forceinline__ void wait() {
    device::barrier_wait(s.made[stage.at], stage.parity);
    device::barrier_wait(s.p_made[stage.at], stage.parity);
  }
  __device__ __forceinline__ void release() {
    device::fence_shared_to_async();  // what was read is here
    device::barrier_arrive(s.released[stage.at]);
    stage.next();
  }
};

template <Operand Type>
__device__ __forceinline__ void consume(const Arguments& a, Shared& s, int w, int tid) {
  using device::pack;
  const int warp = __shfl_sync(~0U, tid / 32, 0), first_row = w * 64 + warp * 16;
  // Through a shuffle, since ptxas would read the thread's number again in every round, which takes longer than what it is needed for.
  const int lane = __shfl_sync(~0U, tid % 32, tid % 32);
  int column = 2 * (lane % 4);
  // This lane's row of a 16 x 16 block of a transposed v or o tile.
  uint32_t v_offset;
  {
    const int row = lane % 8 + (lane >> 4) * 8, unit = 2 * warp + (lane >> 3 & 1);
    v_offset = row * 128 + ((unit ^ (row & 7)) << 4);
  }
  device::keep(column), device::keep(v_offset);
  WorkReader works;
  Place<kStages> stage;
  Place<kValueStages> v_stage;
  float S[64], U[32], O[32];
  const auto replaced = [&](int at) {
    __syncwarp();
    device::barrier_arrive_if(s.v_replaced[at], lane == 0);
  };
  // A chunk's output, into the tile that its values came in. The value thread orders it before the store: here the fence would be waited
  // for.
  const auto put_o = [&](int at) {
    const uint32_t to = device::shared_address(s.v[at][w]) + v_offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t O16[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) O16[e] = pack<Type>(O[8 * i + 2 * e], O[8 * i + 2 * e + 1]);
      device::store_matrices_transposed(to + i * 2048, O16);
    }
    replaced(at);
  };
  const auto load_factors = [&](float2(&to)[8], const float* from) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = device::load_shared_pair(from + 8 * j + column);
  };
  const auto load_solve = [&](float4(&to)[8], const float4* from) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = device::load_shared_quad(from + 4 * j + column / 2);
  };
  const auto load_values = [&](uint32_t (&to)[16], int tile) {
    const uint32_t from = device::shared_address(s.v[tile][w]) + v_offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) device::load_matrices_transposed(to + 4 * i, from + i * 2048);
  };
  // The stages of an item whose columns are the other consumer's.
  const auto let_pass = [&](const Work& work) {
    const int before = work.staged != Staged::no ? 1 : 0, stages = work.item.chunks + before, tiles = work.values() ? 1 : 0;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      device::barrier_wait(s.made[stage.at], stage.parity);
#pragma unroll 1
      for (int tile = i < before ? 2 : tiles; tile > 0; --tile) {
        device::barrier_wait(s.v_loaded[v_stage.at], v_stage.parity);
        replaced(v_stage.at);
        v_stage.next();
      }
      __syncwarp();
      device::barrier_arrive_if(s.released[stage.at], 32, lane == 0);
      stage.next();
    }
  };
  if (w == 1) device::named_arrive(kTurnBarrier, 256);
#pragma unroll 1
  for (;; works.done(s)) {
    const Work& work = works.next(s);
    const Item& item = work.item;
    const int chunks = item.chunks;
    if (chunks < 0) break;
    if (item.scan_steps > 0) {
      if (item.scan_steps > kMostSteps) device::filler<kFiller>();
      ScanRing ring{s, stage};
      segment::scan_boundaries(a.plan, s.scan, item, ring, kScanBarrier, s.scanned, w, warp, lane);
      continue;
    }
    if (!work.takes_part(w)) {
      let_pass(work);
      continue;
    }
    if (work.staged == Staged::no) {
      begin_item(a, item, S, first_row, lane);
    } else {
      const int first = v_stage.at;
      device::barrier_wait(s.made[stage.at], stage.parity);
      device::barrier_wait(s.p_made[stage.at], stage.parity);
      device::barrier_wait(s.v_loaded[v_stage.at], v_stage.parity), v_stage.next();
      device::barrier_wait(s.v_loaded[v_stage.at], v_stage.parity);
      const uint32_t pieces[4] = {device::shared_address(s.k[stage.at]), device::shared_address(s.q[stage.at]),
                                  device::shared_address(s.v[first]), device::shared_address(s.v[v_stage.at])};
      read_pieces(S, pieces, work.staged, a.initial_state.rows, w, warp, lane);
      device::fence_shared_to_async();  // what was read is here
      replaced(first), replaced(v_stage.at);
      device::barrier_arrive(s.released[stage.at]);
      stage.next(), v_stage.next();
    }
    tell_initial_read(a, item, w, warp == 0 && lane == 0);
    const bool values = work.values(), turns = item.consumers == kBothConsumers;
    const auto wait_for_chunk = [&] { device::barrier_wait(s.made[stage.at], stage.parity); };
    if (chunks > 0) wait_for_chunk();
    // Runs of chunks of one kind have a loop of their own each: a jump over another kind's instructions takes a hundred cycles and more.
#pragma unroll 1
    for (int c = 0; c < chunks;) {
      const int at = stage.at;
      const bool full = work.full(c);
      if (a.saved_states.data != nullptr && full && (item.first + c) % a.checkpoint_chunks == 0) {
        const std::int64_t slot = (static_cast<std::int64_t>(work.row) * a.sequences.T + work.token) / (kChunk * a.checkpoint_chunks) +
                                  item.sequence + (item.first + c) / a.checkpoint_chunks;
        store_state(S, a.saved_states, slot * a.saved_states.sequence + item.head * a.saved_states.head, first_row, lane);
      }
      if (s.t[at].tail.hard != 0) {
        device::named_sync_if(kTurnBarrier + w, 256, turns);
        device::named_arrive_if(kTurnBarrier + 1 - w, 256, turns);
        device::barrier_wait(s.p_made[at], stage.parity);
        step_through<Type>(a, s, S, at, w, s.v[v_stage.at][w], full, values, warp, lane);
        if (values) replaced(v_stage.at);
        device::barrier_arrive(s.released[at]);
        stage.next();
        if (values) v_stage.next();
        if (++c < chunks) wait_for_chunk();
        continue;
      }
      // Waits for the next chunk. Not 0: there is none, or it does not go the same way.
      const auto waits_for_next = [&](bool same) {
        if (++c >= chunks) return 1;
        wait_for_chunk();
        return same ? device::load_shared_int(&s.t[stage.at].tail.hard) : 1;
      };
      // U of the chunk at hand, issued and committed last; S decayed, and as it was before in S16. Both arrays are read until it is
      // awaited.
      const auto update_values = [&](uint32_t (&S16)[32], uint32_t (&X16)[16], const uint32_t (&V16)[16], float2(&factor)[8]) {
        const int at = stage.at;
        const uint64_t k = device::describe_rows_128(s.k[at][0]);
        const float decay = s.decay[at];
        // Loads stand before products: behind them they would wait until the last product has begun.
        float4 solve[8];
        load_solve(solve, s.solve[at]);
#pragma unroll
        for (int i = 0; i < 32; ++i) S16[i] = device::pack_here<Type>(S[2 * i], S[2 * i + 1]);
        device::named_sync_if(kTurnBarrier + w, 256, turns);
        device::wgmma_fence();
        multiply_tile<Type>(U, S16, k);  // U^T = S^T k^T
        device::wgmma_commit();
        device::barrier_wait(s.p_made[at], stage.parity);  // while it runs
        // Waits for nothing, but ptxas must see that S is free while the product runs.
        device::wgmma_wait<1>();
        device::hold(S);
#pragma unroll
        for (int i = 0; i < 64; ++i) S[i] *= decay;
        device::hold(S);
        device::wgmma_wait<0>();
        device::hold(U);
        solve_for<Type>(X16, U, V16, solve);
        load_factors(factor, s.write[at]);
        device::wgmma_fence();
        multiply_panels<Type, true>(U, X16, device::describe_panel(s.t[at].panels));  // U^T = X^T T^T
        device::wgmma_commit();
      };
      int stop = 0;
      if (!full) {  // the state alone; a branch further down would cross products in flight, which ptxas then serialises
        const int end = min(chunks, item.warm);
#pragma unroll 1
        while (stop == 0) {
          const int at = stage.at;
          uint32_t S16[32], X16[16], V16[16];
          float2 factor[8];
          if (values) {
            load_values(V16, v_stage.at);
          } else {
#pragma unroll
            for (int i = 0; i < 16; ++i) V16[i] = 0;
          }
          update_values(S16, X16, V16, factor);
          device::named_arrive_if(kTurnBarrier + 1 - w, 256, turns);
          if (values) replaced(v_stage.at);
          device::wgmma_wait<0>();
          device::hold(U);
          write_state<Type>(S, U, factor, s.k[at][0]);
          stage.next();
          if (values) v_stage.next();
          stop = waits_for_next(c + 1 < end);
          device::wgmma_wait<0>();
          device::hold(S);
          device::barrier_arrive(s.released[at]);
        }
        continue;
      }
      uint32_t V16[16];
      load_values(V16, v_stage.at);
#pragma unroll 1
      while (stop == 0) {
        const int at = stage.at;
        const uint64_t q = device::describe_rows_128(s.q[at][0]);
        uint32_t S16[32], X16[16];
        float2 factor[8], out_factor[8];
        update_values(S16, X16, V16, factor);
        multiply_tile<Type>(O, S16, q);  // O^T = S^T q^T
        device::wgmma_commit();
        device::named_arrive_if(kTurnBarrier + 1 - w, 256, turns);
        device::wgmma_wait<1>();
        device::hold(U);
        load_factors(out_factor, s.out[at]);
        write_state<Type>(S, U, factor, s.k[at][0]);
        device::wgmma_wait<1>();
        device::hold(O);
        device::hold(U);
        uint32_t Up16[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) Up16[i] = pack<Type>(U[2 * i], U[2 * i + 1]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          O[4 * j] *= out_factor[j].x, O[4 * j + 1] *= out_factor[j].y, O[4 * j + 2] *= out_factor[j].x, O[4 * j + 3] *= out_factor[j].y;
        }
        device::wgmma_fence();
        multiply_panels<Type, false>(O, Up16, device::describe_panel(s.p[at]));  // O^T = gam scale O^T + U^T P^T
        device::wgmma_commit();
        const int v_at = v_stage.at;
        stage.next();
        v_stage.next();
        stop = waits_for_next(a.saved_states.data == nullptr);
        load_values(V16, stop == 0 ? v_stage.at : v_at);  // in any case, but of a tile that is its own
        device::wgmma_wait<1>();
        device::hold(S);
        device::wgmma_wait<0>();
        device::hold(O);
        device::barrier_arrive(s.released[at]);
        put_o(v_at);
      }
    }
    end_item(a, item, S, w, first_row, warp == 0 && lane == 0, lane);
  }
}

template <Operand Type>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                   const __grid_constant__ CUtensorMap map_o, const __grid_constant__ CUtensorMap map_state) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int tid = threadIdx.x % 128, group = __shfl_sync(~0U, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      device::barrier_init(s.loaded[i], 1);
      device::barrier_init(s.normed[i], kChunk);
      device::barrier_init(s.made[i], kChunk);
      device::barrier_init(s.p_made[i], 128);
      device::barrier_init(s.released[i], 256);
    }
    for (int i = 0; i < kValueStages; ++i) {
      device::barrier_init(s.v_loaded[i], 1);
      device::barrier_init(s.v_replaced[i], 8);
      s.output[i].map = nullptr;
    }
    for (int i = 0; i < kWorkRing; ++i) {
      device::barrier_init(s.item_full[i], 1);
      device::barrier_init(s.item_empty[i], 3 * 128 + 1 + kChunk);
    }
    s.scanned = 0, s.announced = 0;
    device::barrier_init_fence();
    if (rehearses(a)) rehearse(s);
    device::prefetch_map(&map_q), device::prefetch_map(&map_k), device::prefetch_map(&map_v), device::prefetch_map(&map_o);
    if (a.initial_staged) device::prefetch_map(&map_state);
  }
  // The rows on top of panels 1 and 3 stay zero for good.
  for (int i = threadIdx.x; i < kStages * 2 * 32; i += kThreads) {
    const int hole = i / 32 % 2, unit = i % 32;
    const int at = (hole == 0 ? staged_panel(1) : staged_panel(3) + 1024) + unit * 16;
    *reinterpret_cast<uint4*>(s.t[i / 64].panels + at) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(s.p[i / 64] + at) = make_uint4(0, 0, 0, 0);
  }
  // What a rehearsal takes for records: easy chunks.
  for (int i = threadIdx.x; i < kStages * static_cast<int>(sizeof(RecordTail)) / 16; i += kThreads) {
    constexpr int kUnits = sizeof(RecordTail) / 16;
    reinterpret_cast<uint4*>(&s.t[i / kUnits].tail)[i % kUnits] = make_uint4(0, 0, 0, 0);
  }
  device::fence_shared_to_async();
  __syncthreads();
  if (group == 3) {
    device::fewer_registers<kProducerRegisters>();
    if (tid == 0) produce_keys(a, s, &map_q, &map_k, &map_state);
    if (tid == 32) produce_values(a, s, &map_v, &map_o, &map_state);
    if (tid >= kChunk) make_factors<Type>(a, s, tid - kChunk);
  } else if (group == 0) {
    device::fewer_registers<kAuxiliaryRegisters>();
    assist<Type>(a, s, tid);
  } else {
    device::more_registers<kConsumerRegisters>();
    consume<Type>(a, s, group - 1, tid);
  }
}

}  // namespace flashdelta::cuda::forward
