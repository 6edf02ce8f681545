/* flashdelta: the gated delta rule (Gated DeltaNet). C ABI.
 *
 * Tensors go in and out as DLPack `DLTensor`s that the caller owns; a null pointer means "absent". Every call checks all of its
 * arguments before it touches memory, returns a status, and leaves the text of a failure with flashdelta_last_error() of the calling
 * thread. No call keeps global state, allocates device memory, or throws.
 *
 * Shapes: B batch rows, T tokens, H query/key heads, HV value heads (HV % H == 0; value head h reads key head h / (HV / H)),
 * K key width, V value width, N sequences (B, or len(cu_seqlens) - 1). Formulas: docs/numerics.md.
 *
 * Memory: inputs take any strides but q, k, v, whose last axis is contiguous. Outputs take any that keep their elements apart (none
 * negative) and share no memory with another argument, except final_state with initial_state. An axis has at most 2^31 - 1 places.
 *
 * CUDA tensors: K = V = 128; q, k, v, o in bf16 or fp16, at addresses and strides of whole 16 bytes. cu_seqlens on the device is not
 * read by the host. A call launches on options.stream and returns without waiting (docs/api.md, "On a GPU").
 */
#ifndef FLASHDELTA_FLASHDELTA_H_
#define FLASHDELTA_FLASHDELTA_H_

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#if defined(FLASHDELTA_BUILD)
#define FLASHDELTA_API __attribute__((visibility("default")))
#else
#define FLASHDELTA_API
#endif

#define FLASHDELTA_VERSION_MAJOR 0
#define FLASHDELTA_VERSION_MINOR 1
#define FLASHDELTA_VERSION_PATCH 0

/* Tokens of a chunk: the unit of saved_c, saved_T, saved_states and of segment boundaries. */
#define FLASHDELTA_CHUNK 64

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flashdelta_status {
  FLASHDELTA_OK = 0,
  FLASHDELTA_VALUE_ERROR = 1,   /* an argument's value, shape, stride or presence is not allowed */
  FLASHDELTA_TYPE_ERROR = 2,    /* an argument's dtype is not allowed */
  FLASHDELTA_UNAVAILABLE = 3,   /* the backend is not in this build or has no usable device, or lacks the operation */
  FLASHDELTA_RUNTIME_ERROR = 4, /* the device or the system failed: out of memory, a CUDA error */
  FLASHDELTA_INTERNAL_ERROR = 5 /* a defect of this library */
} flashdelta_status;

typedef enum flashdelta_backend {
  FLASHDELTA_BACKEND_AUTO = 0, /* by the tensors' device */
  FLASHDELTA_BACKEND_CPU = 1,
  FLASHDELTA_BACKEND_CUDA = 2,
  FLASHDELTA_BACKEND_REFERENCE = 3 /* float64, token by token, CPU tensors: the oracle. Slow. Takes float64 tensors too, any K and V,
                                      and writes o and gradients of any float dtype */
} flashdelta_backend;

typedef enum flashdelta_context_parallel {
  FLASHDELTA_CONTEXT_PARALLEL_AUTO = 0,  /* long sequences of few heads are cut into segments; certified truncation allowed */
  FLASHDELTA_CONTEXT_PARALLEL_EXACT = 1, /* segments, never truncated */
  FLASHDELTA_CONTEXT_PARALLEL_OFF = 2    /* one segment per (sequence, head) */
} flashdelta_context_parallel;

typedef enum flashdelta_instruction_set {
  FLASHDELTA_INSTRUCTION_SET_BEST = 0,
  FLASHDELTA_INSTRUCTION_SET_BASELINE = 1, /* SSSE3 on x86-64, NEON on aarch64 */
  FLASHDELTA_INSTRUCTION_SET_AVX2 = 2,
  FLASHDELTA_INSTRUCTION_SET_AVX512 = 3
} flashdelta_instruction_set;

/* Options common to all operations. All zero is the default. Flags are 0 or 1; anything else is an error. */
typedef struct flashdelta_options {
  double scale;                       /* factor on q; read only when has_scale, must be finite (0 means 0) */
  int32_t has_scale;                  /* 0: scale is K^-0.5 */
  int32_t use_qk_l2norm_in_kernel;    /* q, k <- x * rsqrt(sum x^2 + 1e-6) per token and head */
  int32_t use_gate_in_kernel;         /* g is raw: log gate = -exp(A_log) * softplus(g + dt_bias); needs A_log */
  int32_t use_beta_sigmoid_in_kernel; /* beta is a logit: beta <- sigmoid(beta) */
  int32_t allow_neg_eigval;           /* beta <- 2 sigmoid(beta); needs use_beta_sigmoid_in_kernel */
  int32_t state_v_first;              /* states and their gradients are [N, HV, V, K] instead of [N, HV, K, V] */
  int32_t context_parallel;           /* flashdelta_context_parallel */
  int32_t num_segments;               /* per (sequence, head): 0 planned, 1..64 forced (for tests; refused with OFF) */
  int32_t batch_invariant;            /* a sequence's bits do not depend on what it is packed with */
  int32_t backend;                    /* flashdelta_backend */
  int32_t num_threads;                /* CPU threads: 0 all that the process may use, else 1..1024 */
  int32_t instruction_set;            /* CPU: flashdelta_instruction_set */
  int32_t checkpoint_chunks;          /* saved_states holds every n-th chunk's state, 1..64; 0 means 1 */
  double context_parallel_tolerance;  /* AUTO cuts what is certified below tolerance * |state|; < 1; 0 means 1e-6 (16-bit q: 1e-5) */
  void* stream;                       /* CUDA: the cudaStream_t to run on; ignored for CPU tensors */
} flashdelta_options;

/* Arguments of flashdelta_chunk_forward and flashdelta_recurrent_forward.
 *
 * q, k           [B, T, H, K]   bf16, fp16 or fp32, one dtype; last axis contiguous, other strides free
 * v              [B, T, HV, V]  as q (recurrent: may be 16-bit where q, k are fp32)
 * g              [B, T, HV]     log gate (natural, <= 0, -inf allowed) fp32, bf16 or fp16; null: no gate
 * beta           [B, T, HV]     fp32, bf16 or fp16; null: 1
 * initial_state  [N, HV, K, V]  fp32, bf16 or fp16; null: 0
 * cu_seqlens     [N + 1]        int32 or int64 offsets into T, non-decreasing within [0, T]; B must be 1; null: B sequences of T
 * A_log          [HV]           fp32, bf16 or fp16; with use_gate_in_kernel only
 * dt_bias        [HV]           fp32, bf16 or fp16, may be null; with use_gate_in_kernel only
 * o              [B, T, HV, V]  v's dtype, written completely (zero for tokens of no sequence)
 * final_state    [N, HV, K, V]  fp32, bf16 or fp16; null: not wanted. May be initial_state itself (in place)
 * saved_*        what backward reads; each may be null. chunk_forward only:
 *   saved_c      [B, T, HV]     fp32, inclusive sum of the log gates inside each chunk
 *   saved_T      [B, T, HV, 64] fp32, row i of T = (I + L)^-1 of token i's chunk
 *   saved_states [S, HV, K, V]  fp32 or bf16 (never state_v_first), S = B*T / (64 n) + N with n = checkpoint_chunks; the state before
 *                               chunk i (i % n == 0) of sequence m, whose first token is s, stands at s / (64 n) + m + i / n (integer
 *                               divisions)
 * segment_counts [4]          int32, contiguous; null: not wanted. chunk_forward only. How context parallelism fell out, added up over all
 *                             (sequence, value head) pairs: segments run (a pair that is not cut, or has no tokens, is one), boundaries
 *                             whose state was reached by warming up, boundaries whose state came over from the segment before exactly,
 *                             and chunks that the warm-ups ran. Segments = pairs + boundaries
 * workspace      flashdelta_*_workspace_size bytes, 64-byte aligned, on the tensors' device; contents before and after mean nothing
 */
typedef struct flashdelta_forward_args {
  size_t struct_size; /* sizeof(flashdelta_forward_args) */
  flashdelta_options options;
  const DLTensor* q;
  const DLTensor* k;
  const DLTensor* v;
  const DLTensor* g;
  const DLTensor* beta;
  const DLTensor* initial_state;
  const DLTensor* cu_seqlens;
  const DLTensor* A_log;
  const DLTensor* dt_bias;
  DLTensor* o;
  DLTensor* final_state;
  DLTensor* saved_c;
  DLTensor* saved_T;
  DLTensor* saved_states;
  void* workspace;
  size_t workspace_size;
  DLTensor* segment_counts;
} flashdelta_forward_args;

/* Arguments of flashdelta_chunk_backward: the forward's inputs, its saved tensors, the outputs' gradients, the wanted gradients.
 *
 * d_o [B, T, HV, V] and d_final_state [N, HV, K, V]: fp32, bf16 or fp16, either may be null (zero). saved_states is required (the
 * REFERENCE backend takes null); saved_c and saved_T may be null. dq, dk, dv, dg, dbeta, d_initial_state, dA_log, d_dt_bias: shape and
 * dtype of the argument they belong to, each may be null (not wanted); refused when that argument is absent. With
 * use_gate_in_kernel dg is the gradient of the raw gate, with use_beta_sigmoid_in_kernel dbeta that of the logit.
 */
typedef struct flashdelta_backward_args {
  size_t struct_size; /* sizeof(flashdelta_backward_args) */
  flashdelta_options options;
  const DLTensor* q;
  const DLTensor* k;
  const DLTensor* v;
  const DLTensor* g;
  const DLTensor* beta;
  const DLTensor* initial_state;
  const DLTensor* cu_seqlens;
  const DLTensor* A_log;
  const DLTensor* dt_bias;
  const DLTensor* saved_c;
  const DLTensor* saved_T;
  const DLTensor* saved_states;
  const DLTensor* d_o;
  const DLTensor* d_final_state;
  DLTensor* dq;
  DLTensor* dk;
  DLTensor* dv;
  DLTensor* dg;
  DLTensor* dbeta;
  DLTensor* d_initial_state;
  DLTensor* dA_log;
  DLTensor* d_dt_bias;
  void* workspace;
  size_t workspace_size;
} flashdelta_backward_args;

/* Chunked gated delta rule, forward. `workspace_size` only checks and answers; it ignores args->workspace. */
FLASHDELTA_API flashdelta_status flashdelta_chunk_forward_workspace_size(const flashdelta_forward_args* args, size_t* bytes);
FLASHDELTA_API flashdelta_status flashdelta_chunk_forward(const flashdelta_forward_args* args);

/* Chunked gated delta rule, backward. */
FLASHDELTA_API flashdelta_status flashdelta_chunk_backward_workspace_size(const flashdelta_backward_args* args, size_t* bytes);
FLASHDELTA_API flashdelta_status flashdelta_chunk_backward(const flashdelta_backward_args* args);

/* The same rule token by token: decode of one or a few tokens per sequence (any T works), state in place or out of place. */
FLASHDELTA_API flashdelta_status flashdelta_recurrent_forward_workspace_size(const flashdelta_forward_args* args, size_t* bytes);
FLASHDELTA_API flashdelta_status flashdelta_recurrent_forward(const flashdelta_forward_args* args);

/* Text of the calling thread's last failed call, "" if none failed. Valid until that thread's next failing call. */
FLASHDELTA_API const char* flashdelta_last_error(void);

/* "0.1.0" */
FLASHDELTA_API const char* flashdelta_version(void);

/* What this build holds and this machine offers, as JSON text (version, backends, instruction sets, GPUs).
 * Writes at most `size` bytes with the closing zero; *needed (may be null) gets the size of the whole text with its zero.
 * VALUE_ERROR when buffer is null with size > 0, or size > 0 does not suffice (then buffer is left as it was). */
FLASHDELTA_API flashdelta_status flashdelta_info(char* buffer, size_t size, size_t* needed);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FLASHDELTA_FLASHDELTA_H_ */
