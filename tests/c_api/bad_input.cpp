#include "c_api/bad_input.hpp"

#include <cmath>
#include <limits>

namespace flashdelta::abi_test {
namespace {

constexpr auto kValue = FLASHDELTA_VALUE_ERROR;
constexpr auto kType = FLASHDELTA_TYPE_ERROR;
const std::vector<Entry> kForwards{Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_forward_workspace_size,
                                   Entry::recurrent_forward_workspace_size};
const std::vector<Entry> kChunkForward{Entry::chunk_forward, Entry::chunk_forward_workspace_size};
const std::vector<Entry> kRecurrent{Entry::recurrent_forward, Entry::recurrent_forward_workspace_size};
const std::vector<Entry> kBackwards{Entry::chunk_backward, Entry::chunk_backward_workspace_size};

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

BadCase option(const char* name, std::int32_t flashdelta_options::* field, std::int32_t value) {
  return {std::string(name) + " " + std::to_string(value),
          kEntries,
          [=](Call& c) { c.options.*field = value; },
          kValue,
          {std::string(name) + ": is " + std::to_string(value)}};
}

BadCase scale(const char* text, double value) {
  return {std::string("scale ") + text,
          kEntries,
          [=](Call& c) {
            c.options.has_scale = 1;
            c.options.scale = value;
          },
          kValue,
          {"scale: is ", "finite"}};
}

BadCase tolerance(const char* text, double value) {
  return {std::string("context_parallel_tolerance ") + text,
          kEntries,
          [=](Call& c) { c.options.context_parallel_tolerance = value; },
          kValue,
          {"context_parallel_tolerance: is "}};
}

BadCase offsets(const char* name, std::int32_t a, std::int32_t b, std::int32_t c, std::vector<std::string> text) {
  return {name, kEntries,
          [=](Call& call) {
            auto* values = call["cu_seqlens"].as<std::int32_t>();
            values[0] = a;
            values[1] = b;
            values[2] = c;
          },
          kValue, std::move(text)};
}

BadCase sizes(const char* name, std::int64_t h, std::int64_t hv, std::int64_t k, std::int64_t v, std::vector<std::string> text,
              bool cpu_only = false) {
  return {name,
          kEntries,
          [=](Call& c) {
            c.drop_cu_seqlens();
            c.resize(1, 2, h, hv, k, v);
          },
          kValue,
          std::move(text),
          cpu_only};
}

BadCase orphan_gradient(const char* argument, const char* gradient) {
  return {std::string(gradient) + " without " + argument,
          kBackwards,
          [=](Call& c) { c.drop(argument); },
          kValue,
          {std::string(gradient) + ": is given, but " + argument + " is null"}};
}

}  // namespace

std::vector<BadCase> bad_structs() {
  return {
      {"args null", kEntries, [](Call& c) { c.null_args = true; }, kValue, {"args: is null"}},
      {"struct_size 0", kEntries, [](Call& c) { c.struct_size = 0; }, kValue, {"struct_size: is 0", "sizeof"}},
      {"struct_size one short", kEntries, [](Call& c) { c.struct_size -= 1; }, kValue, {"struct_size: is ", "sizeof"}},
      {"struct_size of a larger struct", kEntries, [](Call& c) { c.struct_size += 8; }, kValue, {"struct_size: is ", "sizeof"}},
      {"bytes null", kQueries, [](Call& c) { c.null_bytes = true; }, kValue, {"bytes: is null"}},
  };
}

std::vector<BadCase> bad_options() {
  using O = flashdelta_options;
  std::vector<BadCase> cases{
      option("has_scale", &O::has_scale, 2),
      option("has_scale", &O::has_scale, -1),
      option("use_qk_l2norm_in_kernel", &O::use_qk_l2norm_in_kernel, 2),
      option("use_gate_in_kernel", &O::use_gate_in_kernel, -1),
      option("use_beta_sigmoid_in_kernel", &O::use_beta_sigmoid_in_kernel, 255),
      option("allow_neg_eigval", &O::allow_neg_eigval, 3),
      option("state_v_first", &O::state_v_first, 2),
      option("batch_invariant", &O::batch_invariant, 7),
      option("context_parallel", &O::context_parallel, -1),
      option("context_parallel", &O::context_parallel, 3),
      option("num_segments", &O::num_segments, -1),
      option("num_segments", &O::num_segments, 65),
      option("backend", &O::backend, 4),
      option("backend", &O::backend, -2),
      option("num_threads", &O::num_threads, -1),
      option("num_threads", &O::num_threads, 1025),
      option("instruction_set", &O::instruction_set, 4),
      option("instruction_set", &O::instruction_set, -1),
      option("checkpoint_chunks", &O::checkpoint_chunks, -1),
      option("checkpoint_chunks", &O::checkpoint_chunks, 65),
      scale("NaN", kNaN),
      scale("inf", kInf),
      scale("-inf", -kInf),
      tolerance("NaN", kNaN),
      tolerance("-1e-9", -1e-9),
      tolerance("1", 1),
      tolerance("inf", kInf),
      {"num_segments 2 with context_parallel off",
       kEntries,
       [](Call& c) {
         c.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
         c.options.num_segments = 2;
       },
       kValue,
       {"num_segments: is 2", "context_parallel off"}},
      {"backend cuda for cpu tensors",
       kEntries,
       [](Call& c) { c.options.backend = FLASHDELTA_BACKEND_CUDA; },
       kValue,
       {"backend: is cuda, but q is on cpu"}},
      {"backend cpu for cuda tensors",
       kEntries,
       [](Call& c) {
         c.options.backend = FLASHDELTA_BACKEND_CPU;
         for (const std::string& name : c.names()) c[name].dl.device = {kDLCUDA, 0};
       },
       kValue,
       {"backend: is cpu, but q is on cuda:0"}},
      {"backend reference for cuda tensors",
       kEntries,
       [](Call& c) {
         c.options.backend = FLASHDELTA_BACKEND_REFERENCE;
         for (const std::string& name : c.names()) c[name].dl.device = {kDLCUDA, 1};
       },
       kValue,
       {"backend: is reference, but q is on cuda:1"}},
      {"q with a negative cuda device id",
       kEntries,
       [](Call& c) {
         c.options.backend = FLASHDELTA_BACKEND_AUTO;
         c["q"].dl.device = {kDLCUDA, -1};
       },
       kValue,
       {"q: device id is -1"}},
  };
  return cases;
}

std::vector<BadCase> bad_combinations() {
  const auto drop = [](const char* name) { return [=](Call& c) { c.drop(name); }; };
  return {
      {"q null", kEntries, drop("q"), kValue, {"q: is null"}},
      {"k null", kEntries, drop("k"), kValue, {"k: is null"}},
      {"v null", kEntries, drop("v"), kValue, {"v: is null"}},
      {"o null", kForwards, drop("o"), kValue, {"o: is null"}},
      {"use_gate_in_kernel without g", kForwards, drop("g"), kValue, {"g: is null", "use_gate_in_kernel"}},
      {"use_gate_in_kernel without A_log", kForwards, drop("A_log"), kValue, {"A_log: is null", "use_gate_in_kernel"}},
      {"use_gate_in_kernel without g, backward", kBackwards, drop("g"), kValue, {"g: is null", "use_gate_in_kernel"}},
      {"use_gate_in_kernel without A_log, backward", kBackwards, drop("A_log"), kValue, {"A_log: is null", "use_gate_in_kernel"}},
      {"A_log without use_gate_in_kernel",
       kEntries,
       [](Call& c) { c.options.use_gate_in_kernel = 0; },
       kValue,
       {"A_log: is given", "use_gate_in_kernel"}},
      {"dt_bias without use_gate_in_kernel",
       kEntries,
       [](Call& c) {
         c.options.use_gate_in_kernel = 0;
         c.drop("A_log");
       },
       kValue,
       {"dt_bias: is given", "use_gate_in_kernel"}},
      {"use_beta_sigmoid_in_kernel without beta", kEntries, drop("beta"), kValue, {"beta: is null", "use_beta_sigmoid_in_kernel"}},
      {"allow_neg_eigval without use_beta_sigmoid_in_kernel",
       kEntries,
       [](Call& c) { c.options.use_beta_sigmoid_in_kernel = 0; },
       kValue,
       {"allow_neg_eigval: is 1", "use_beta_sigmoid_in_kernel"}},
      {"saved_states null in backward", kBackwards, drop("saved_states"), kValue, {"saved_states: is null", "cpu backend"}, true},
      orphan_gradient("initial_state", "d_initial_state"),
      orphan_gradient("dt_bias", "d_dt_bias"),
      {"dA_log without use_gate_in_kernel",
       kBackwards,
       [](Call& c) {
         c.options.use_gate_in_kernel = 0;
         c.drop("A_log");
         c.drop("dt_bias");
       },
       kValue,
       {"dA_log: is given, but A_log is null"}},
      {"dg without g",
       kBackwards,
       [](Call& c) {
         c.drop_gate_in_kernel();
         c.drop("g");
       },
       kValue,
       {"dg: is given, but g is null"}},
      {"dbeta without beta",
       kBackwards,
       [](Call& c) {
         c.options.use_beta_sigmoid_in_kernel = c.options.allow_neg_eigval = 0;
         c.drop("beta");
       },
       kValue,
       {"dbeta: is given, but beta is null"}},
      sizes("more q heads than v heads", 4, 2, 3, 5, {"q: more q heads than v heads (H = 4, HV = 2)"}),
      sizes("v heads no multiple of q heads", 2, 5, 3, 5, {"v: has 5 heads", "H = 2"}),
      sizes("no q heads", 0, 4, 3, 5, {"q: has 0 heads"}),
      sizes("no v heads", 1, 0, 3, 5, {"q: more q heads than v heads (H = 1, HV = 0)"}),
      sizes("K 0", 2, 4, 0, 5, {"q: head dim K is 0"}),
      sizes("V 0", 2, 4, 3, 0, {"v: head dim V is 0"}),
      sizes("K 257", 2, 4, 257, 5, {"q: head dim K is 257; the cpu backend takes 1..256"}, true),
      sizes("V 300", 2, 4, 3, 300, {"v: head dim V is 300; the cpu backend takes 1..256"}, true),
      {"k float16 beside q bfloat16",
       kEntries,
       [](Call& c) { c["k"].dl.dtype = kF16; },
       kType,
       {"k: dtype is float16", "q's dtype (bfloat16)"}},
      {"v float16 beside q bfloat16",
       kEntries,
       [](Call& c) { c["v"].dl.dtype = kF16; },
       kType,
       {"v: dtype is float16", "q's dtype (bfloat16)"}},
      {"v float32 beside q bfloat16",
       kEntries,
       [](Call& c) { c["v"].reset(kF32, {1, 6, 4, 5}, Call::kInput); },
       kType,
       {"v: dtype is float32", "q's dtype (bfloat16)"}},
      {"q float32 beside v bfloat16 in chunk_forward",
       kChunkForward,
       [](Call& c) {
         c["q"].reset(kF32, {1, 6, 2, 3}, Call::kInput);
         c["k"].reset(kF32, {1, 6, 2, 3}, Call::kInput);
       },
       kType,
       {"v: dtype is bfloat16", "q's dtype (float32)"}},
      {"q float32 beside k bfloat16 in decode",
       kRecurrent,
       [](Call& c) { c["q"].reset(kF32, {1, 6, 2, 3}, Call::kInput); },
       kType,
       {"k: dtype is bfloat16", "q's dtype (float32)"}},
      {"o float32 beside v bfloat16",
       kForwards,
       [](Call& c) { c["o"].reset(kF32, {1, 6, 4, 5}, Call::kPoison); },
       kType,
       {"o: dtype is float32", "v's dtype (bfloat16)"},
       true},
      {"dq float32 beside q bfloat16",
       kBackwards,
       [](Call& c) { c["dq"].reset(kF32, {1, 6, 2, 3}, Call::kPoison); },
       kType,
       {"dq: dtype is float32", "q's dtype (bfloat16)"},
       true},
      {"dg bfloat16 beside g float32",
       kBackwards,
       [](Call& c) { c["dg"].dl.dtype = kBF16; },
       kType,
       {"dg: dtype is bfloat16", "g's dtype (float32)"},
       true},
      {"d_initial_state float16 beside float32",
       kBackwards,
       [](Call& c) { c["d_initial_state"].dl.dtype = kF16; },
       kType,
       {"d_initial_state: dtype is float16", "initial_state's dtype (float32)"},
       true},
      {"saved_c bfloat16",
       {Entry::chunk_forward, Entry::chunk_backward},
       [](Call& c) { c["saved_c"].dl.dtype = kBF16; },
       kType,
       {"saved_c: dtype is bfloat16"}},
      {"saved_T float16",
       {Entry::chunk_forward, Entry::chunk_backward},
       [](Call& c) { c["saved_T"].dl.dtype = kF16; },
       kType,
       {"saved_T: dtype is float16"}},
      {"saved_states float16",
       {Entry::chunk_forward, Entry::chunk_backward},
       [](Call& c) { c["saved_states"].dl.dtype = kF16; },
       kType,
       {"saved_states: dtype is float16", "bfloat16"}},
      {"saved_states for other checkpoint_chunks",
       {Entry::chunk_forward, Entry::chunk_backward},
       [](Call& c) {
         c.drop_cu_seqlens();
         c.resize(1, 256, 2, 4, 3, 5);
         c.options.checkpoint_chunks = 4;
       },
       kValue,
       {"saved_states: shape is [5, 4, 3, 5]; it must be [S, HV, K, V] = [2, 4, 3, 5]"}},
      {"initial_state in the other layout",
       kEntries,
       [](Call& c) { c.options.state_v_first = 1; },
       kValue,
       {"initial_state: shape is [2, 4, 3, 5]; it must be [N, HV, V, K] = [2, 4, 5, 3]"}},
      {"initial_state of one sequence for two",
       kEntries,
       [](Call& c) { c["initial_state"].shape[0] = 1; },
       kValue,
       {"initial_state: shape is [1, 4, 3, 5]; it must be [N, HV, K, V] = [2, 4, 3, 5]"}},
      {"saved_c in decode",
       kRecurrent,
       [](Call& c) { c.add("saved_c", kF32, {1, 6, 4}); },
       kValue,
       {"saved_c: is given; only chunk_forward writes it"}},
      {"saved_T in decode",
       kRecurrent,
       [](Call& c) { c.add("saved_T", kF32, {1, 6, 4, 64}); },
       kValue,
       {"saved_T: is given; only chunk_forward writes it"}},
      {"saved_states in decode",
       kRecurrent,
       [](Call& c) { c.add("saved_states", kF32, {2, 4, 3, 5}); },
       kValue,
       {"saved_states: is given; only chunk_forward writes it"}},
      {"segment_counts in decode",
       kRecurrent,
       [](Call& c) { c.add("segment_counts", kInt32, {4}); },
       kValue,
       {"segment_counts: is given; only chunk_forward writes it"}},
  };
}

std::vector<BadCase> bad_sequences() {
  return {
      offsets("cu_seqlens negative first", -1, 4, 6, {"cu_seqlens: entry 0 is -1"}),
      offsets("cu_seqlens negative in the middle", 0, -4, 6, {"cu_seqlens: entry 1 is -4"}),
      offsets("cu_seqlens decreasing", 0, 5, 4, {"cu_seqlens: entry 2 is 4, below entry 1 = 5"}),
      offsets("cu_seqlens decreasing from the first", 3, 2, 6, {"cu_seqlens: entry 1 is 2, below entry 0 = 3"}),
      offsets("cu_seqlens beyond T", 0, 4, 7, {"cu_seqlens: entry 2 is 7", "T = 6"}),
      offsets("cu_seqlens far beyond T", 0, std::numeric_limits<std::int32_t>::max(), 6, {"cu_seqlens: entry 1 is 2147483647", "T = 6"}),
      offsets("cu_seqlens begins beyond T", 9, 9, 9, {"cu_seqlens: entry 0 is 9", "T = 6"}),
      {"cu_seqlens int64 beyond int32",
       kEntries,
       [](Call& c) {
         c["cu_seqlens"].reset(kInt64, {3}, std::byte{0});
         c["cu_seqlens"].as<std::int64_t>()[2] = 0x100000006;
       },
       kValue,
       {"cu_seqlens: entry 2 is 4294967302"}},
      {"cu_seqlens int64 negative",
       kEntries,
       [](Call& c) {
         c["cu_seqlens"].reset(kInt64, {3}, std::byte{0});
         c["cu_seqlens"].as<std::int64_t>()[1] = std::numeric_limits<std::int64_t>::min();
       },
       kValue,
       {"cu_seqlens: entry 1 is -9223372036854775808"}},
      {"cu_seqlens without entries", kEntries, [](Call& c) { c["cu_seqlens"].shape[0] = 0; }, kValue, {"cu_seqlens: has 0 entries"}},
      {"cu_seqlens one entry too few for initial_state",
       kEntries,
       [](Call& c) { c["cu_seqlens"].shape[0] = 2; },
       kValue,
       {"initial_state: shape is [2, 4, 3, 5]; it must be [N, HV, K, V] = [1, 4, 3, 5]"}},
      {"cu_seqlens with two batch rows",
       kEntries,
       [](Call& c) {
         c.resize(2, 6, 2, 4, 3, 5);
         c.add("cu_seqlens", kInt32, {3});
       },
       kValue,
       {"cu_seqlens: given with B = 2"}},
      {"cu_seqlens int16",
       kEntries,
       [](Call& c) { c["cu_seqlens"].dl.dtype = {kDLInt, 16, 1}; },
       kType,
       {"cu_seqlens: dtype is int16", "int32 or int64"}},
      {"cu_seqlens uint32", kEntries, [](Call& c) { c["cu_seqlens"].dl.dtype = {kDLUInt, 32, 1}; }, kType, {"cu_seqlens: dtype is uint32"}},
  };
}

std::vector<BadCase> bad_memory() {
  const auto same_data = [](const char* output, const char* other) { return [=](Call& c) { c[output].dl.data = c[other].dl.data; }; };
  const auto shares = [](const char* output, const char* other) {
    return std::vector<std::string>{std::string(output) + ": shares memory with " + other};
  };
  return {
      {"o is v", kForwards, same_data("o", "v"), kValue, shares("o", "v")},
      {"o inside v's bytes", kForwards, [](Call& c) { c["o"].dl.data = static_cast<std::byte*>(c["v"].dl.data) + 16; }, kValue,
       shares("o", "v")},
      {"o and final_state share", kForwards, same_data("final_state", "o"), kValue, shares("final_state", "o")},
      {"final_state one row into initial_state", kForwards, [](Call& c) { c["final_state"].dl.data = c["initial_state"].as<float>() + 15; },
       kValue, shares("final_state", "initial_state")},
      {"final_state at initial_state with another dtype", kForwards,
       [](Call& c) {
         c["final_state"].dl.dtype = kBF16;
         c["final_state"].dl.data = c["initial_state"].dl.data;
       },
       kValue, shares("final_state", "initial_state")},
      {"final_state at initial_state with other strides", kForwards,
       [](Call& c) {
         c["final_state"].strides = {60, 15, 1, 3};
         c["final_state"].dl.data = c["initial_state"].dl.data;
       },
       kValue, shares("final_state", "initial_state")},
      {"o at one row of a padded v", kForwards,
       [](Call& c) {
         c["v"].reset(kBF16, {1, 6, 8, 5}, Call::kInput);
         c["v"].strides = {240, 40, 5, 1};
         c["v"].shape[2] = 4;
         c["o"].dl.data = c["v"].dl.data;
       },
       kValue, shares("o", "v")},
      {"segment_counts inside final_state", kChunkForward, [](Call& c) { c["segment_counts"].dl.data = c["final_state"].as<float>() + 8; },
       kValue, shares("segment_counts", "final_state")},
      {"dq is dk", kBackwards, same_data("dq", "dk"), kValue, shares("dk", "dq")},
      {"dv is d_o", kBackwards, same_data("dv", "d_o"), kValue, shares("dv", "d_o")},
      {"dq over saved_states", kBackwards, same_data("dq", "saved_states"), kValue, shares("dq", "saved_states")},
      {"workspace null",
       kRuns,
       [](Call& c) {
         c.workspace = nullptr;
         c.workspace_size = 4096;
       },
       kValue,
       {"workspace: is null, but workspace_size is 4096"}},
      {"workspace misaligned",
       kRuns,
       [](Call& c) { c.workspace = static_cast<std::byte*>(c.workspace) + 8; },
       kValue,
       {"workspace: is not aligned to 64 bytes"}},
      {"workspace beyond the address space",
       kRuns,
       [](Call& c) { c.workspace_size = std::numeric_limits<std::size_t>::max(); },
       kValue,
       {"workspace_size: is 18446744073709551615"}},
      {"workspace over q",
       kRuns,
       [](Call& c) {
         const auto address = reinterpret_cast<std::uintptr_t>(c["q"].dl.data) / 64 * 64;
         c.workspace = reinterpret_cast<void*>(address);
         c.workspace_size = 128;
       },
       kValue,
       {"workspace: shares memory with "}},
  };
}

}  // namespace flashdelta::abi_test
