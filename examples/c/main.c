/* Prefill and decode through the C ABI: 200 tokens at once, then 4 one by one from the state that the prefill left. */
#include <flashdelta/flashdelta.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 2, VALUE_HEADS = 4, KEY_WIDTH = 32, VALUE_WIDTH = 48, PREFILL = 200, DECODE = 4, TOKENS = PREFILL + DECODE };

static float q[TOKENS][HEADS][KEY_WIDTH], k[TOKENS][HEADS][KEY_WIDTH], v[TOKENS][VALUE_HEADS][VALUE_WIDTH];
static float g[TOKENS][VALUE_HEADS], beta[TOKENS][VALUE_HEADS];
static float o[TOKENS][VALUE_HEADS][VALUE_WIDTH], o_at_once[TOKENS][VALUE_HEADS][VALUE_WIDTH];
static float state[VALUE_HEADS][KEY_WIDTH][VALUE_WIDTH];

typedef struct {
  DLTensor tensor;
  int64_t shape[4];
} Tensor;

/* A row-major fp32 tensor [1, first, second, third] over `data`; third is 0 for a tensor of three axes. */
static DLTensor* tensor(Tensor* t, void* data, int64_t first, int64_t second, int64_t third) {
  t->shape[0] = 1;
  t->shape[1] = first;
  t->shape[2] = second;
  t->shape[3] = third;
  t->tensor = (DLTensor){.data = data, .device = {kDLCPU, 0}, .ndim = third ? 4 : 3, .dtype = {kDLFloat, 32, 1}, .shape = t->shape};
  return &t->tensor;
}

static void stop_on_error(flashdelta_status status) {
  if (status == FLASHDELTA_OK) return;
  fprintf(stderr, "error: %s\n", flashdelta_last_error());
  exit(1);
}

/* Runs `count` tokens from `first` on: in chunks, or token by token. Starts from `from` and leaves the state in `to`; either may be
 * null, and both may be the same. */
static void forward(int recurrent, int first, int count, void* from, void* to, float out[TOKENS][VALUE_HEADS][VALUE_WIDTH]) {
  Tensor tq, tk, tv, tg, tb, to_, ti, tf;
  flashdelta_forward_args args = {.struct_size = sizeof args};
  args.options.use_qk_l2norm_in_kernel = 1;
  args.q = tensor(&tq, q[first], count, HEADS, KEY_WIDTH);
  args.k = tensor(&tk, k[first], count, HEADS, KEY_WIDTH);
  args.v = tensor(&tv, v[first], count, VALUE_HEADS, VALUE_WIDTH);
  args.g = tensor(&tg, g[first], count, VALUE_HEADS, 0);
  args.beta = tensor(&tb, beta[first], count, VALUE_HEADS, 0);
  args.o = tensor(&to_, out[first], count, VALUE_HEADS, VALUE_WIDTH);
  if (from) args.initial_state = tensor(&ti, from, VALUE_HEADS, KEY_WIDTH, VALUE_WIDTH);
  if (to) args.final_state = tensor(&tf, to, VALUE_HEADS, KEY_WIDTH, VALUE_WIDTH);

  stop_on_error(recurrent ? flashdelta_recurrent_forward_workspace_size(&args, &args.workspace_size)
                          : flashdelta_chunk_forward_workspace_size(&args, &args.workspace_size));
  /* aligned_alloc wants a multiple of the alignment. */
  args.workspace = args.workspace_size ? aligned_alloc(64, (args.workspace_size + 63) / 64 * 64) : NULL;
  if (args.workspace_size && !args.workspace) {
    fputs("error: out of memory\n", stderr);
    exit(1);
  }
  stop_on_error(recurrent ? flashdelta_recurrent_forward(&args) : flashdelta_chunk_forward(&args));
  free(args.workspace);
}

static void fill(float* values, size_t count, unsigned seed) {
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525U + 1013904223U;
    values[i] = (float)(seed >> 8) / (float)(1 << 23) - 1.0F;
  }
}

int main(void) {
  fill(&q[0][0][0], sizeof q / sizeof(float), 1);
  fill(&k[0][0][0], sizeof k / sizeof(float), 2);
  fill(&v[0][0][0], sizeof v / sizeof(float), 3);
  fill(&g[0][0], sizeof g / sizeof(float), 4);
  fill(&beta[0][0], sizeof beta / sizeof(float), 5);
  for (size_t i = 0; i < sizeof g / sizeof(float); ++i) {
    (&g[0][0])[i] = 0.1F * ((&g[0][0])[i] - 1.0F);       /* log gates in [-0.2, 0] */
    (&beta[0][0])[i] = 0.5F * ((&beta[0][0])[i] + 1.0F); /* in [0, 1] */
  }

  forward(0, 0, PREFILL, NULL, state, o);
  for (int token = PREFILL; token < TOKENS; ++token) forward(1, token, 1, state, state, o);
  forward(0, 0, TOKENS, NULL, NULL, o_at_once);

  double difference = 0, largest = 0;
  for (size_t i = 0; i < sizeof o / sizeof(float); ++i) {
    difference = fmax(difference, fabs((double)(&o[0][0][0])[i] - (&o_at_once[0][0][0])[i]));
    largest = fmax(largest, fabs((double)(&o_at_once[0][0][0])[i]));
  }
  printf("flashdelta %s: %d tokens prefilled, %d decoded; differs from %d at once by %.1e (values up to %.2f)\n", flashdelta_version(),
         PREFILL, DECODE, TOKENS, difference, largest);
  return difference <= 1e-5 * largest && largest > 0 ? 0 : 1;
}
