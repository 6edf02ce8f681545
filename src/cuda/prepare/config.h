// Constants of `prepare`, each with its reason.
#pragma once

namespace flashdelta::cuda::prepare {

// Above this largest beta |k|^2 of a chunk, and where T itself is wanted, operands of the inverse are held as two fp16 numbers. At 1 with
// keys of cosine 0.9 one number gives T an error of 1.4e-3, at 2 with equal keys 7.5e-3 (two: 2.0e-3). The loop needs no such T: it takes
// chunks of that kind token by token.
constexpr float kSplitAbove = 1.1F;

// Where 16-bit operands no longer hold the contract: U is then what is left of much larger terms, and their rounding shows. Such a chunk is
// marked hard, and the loop takes it token by token. Three things cancel, or last: keys like one another (ratio: the mean of (k_i . k_j)^2
// over neighbours, weighted by beta and the gates between them; 1 for equal keys), large betas, and betas near 2 (reflections forget
// nothing), where the same few keys come with them. With D = exp(sum of the chunk's gates), a chunk is hard where
//     (beta_square (1 + lasting D) mean(beta^2) + reflections D^4 mean(max(0, beta - 1)^4)) (1 + both * the ratio) + ratio * the ratio > 1
// or the ratio alone is above ratio_alone.
//
// bf16, measured on 512 tokens, a quarter of the heads without gate (error of o, contract 5e-3): beta 1 with cosine 0 / 0.7 / 0.9: 4.1e-3 /
// 4.7e-3 / 5.4e-3; beta 0.5 with cosine 0.9 / 0.99: 4.6e-3 / 6.3e-3; beta 1.5, cosine 0: 5.1e-3. final_state, contract 4e-3, without any
// gate: beta 1: 4.1e-3, beta uniform in 0..2: 4.5e-3. Beta uniform in 0..1, no gate, 16 to 192 tokens (emulated), cosine 0.6 / 0.7 / 0.8: o
// 4.9e-3 / 5.1e-3 / 5.9e-3, state 3.4e-3 / 3.8e-3 / 4.4e-3; beta 0.5: o 4.4e-3 / 5.0e-3 / 5.1e-3.
//
// fp16, measured on 256 to 8192 tokens with gates of 0, -0.003 and -0.03: the larger error of o and final_state, contract 1e-3, of what
// is not hard is 8.2e-4 at most. Without gates, betas in 0..2 with cosine 0 / 0.3 / 0.5: 7.6e-4 / 1.26e-3 / 1.68e-3; beta 1: 6.1e-4
// / 7.7e-4 / 1.04e-3; beta 1.6, cosine 0: 1.08e-3.
//
// reflections: one of sixteen keys in turn, always with beta 2, the others 0.3, no gates (emulated): 25 times the contract in bf16, 4 in
// fp16.
struct Hardness {
  float beta_square, lasting, reflections, both, ratio, ratio_alone;
};
constexpr Hardness kHardBf16{0.57F, 0.8F, 32.F, 0.F, 1.9F, 0.5F};
constexpr Hardness kHardF16{0.226F, 1.63F, 32.F, 7.7F, 0.F, 0.35F};
// The ratio says nothing where all of L is small: below this sum of squares of what weighs it.
constexpr float kSmallestWeight = 0.5F;
// fp16 alone: keys of |k|^2 >= 512 come with values below its normal numbers on one side of a product.
constexpr int kHardExponentF16 = 5;
// fp16 alone: where no token of a chunk is written with more than this (beta times what the gates after it leave, over |k|), because the
// last keys are zero and gates are strong, what is written comes below fp16's normal numbers.
constexpr float kSmallestWriteF16 = 0x1p-10F;

// Keys up to this |k|^2 go into fp16 products as they are; larger ones (or with the l2-norm, all) are first scaled to length 1, since fp16
// ends at 65504. Products of smaller keys only lose what is negligible beside the identity.
constexpr float kLargestPlainNorm = 4.F;
// |k|^2 below this counts as this: a zero key then has a finite 1 / |k|, which only ever meets zeros.
constexpr float kSmallestNorm = 1e-24F;

// Sequences up to which a warp of `prepare` measures them all for the plan.
constexpr int kMostTold = 1024;

// Places of items found at once; items of a CTA up to which all that gates tell of its chunks is told before its first one. Of one head,
// whose four warps share that out, as many as 16 key heads with 32,768 tokens come to.
constexpr int kBatch = 13;
constexpr int most_told_early(int heads) { return heads == 1 ? kBatch : 8; }

// Warps of a CTA that takes so many value heads of a key head at once: one each. A single head has four, which share its work out
// (team.cuh): alone, a warp mostly waits. Not where T itself is wanted.
constexpr int warps_of(int heads, bool split) { return heads == 1 && !split ? 4 : heads; }
constexpr bool is_team(int heads, int warps) { return warps != heads; }

// CTAs per multiprocessor for so many heads: what shared memory allows (16 KB of keys, 6 KB of exchange, 7 KB a head), and registers: where
// one CTA's place is free, the plan of segments (two warps of 64 registers a quarter) fits there.
constexpr int ctas_per_multiprocessor(int heads, bool split) {
  constexpr int kPlain[] = {5, 6, 5, 4}, kSplit[] = {6, 5, 4, 4};
  return (split ? kSplit : kPlain)[heads - 1];
}
// Registers of a thread that leave room for as many, a quarter of them on each quarter of a multiprocessor's registers.
constexpr int most_registers(int heads, bool split) {
  constexpr int kPlain[] = {96, 168, 128, 128}, kSplit[] = {248, 168, 168, 128};
  return (split ? kSplit : kPlain)[heads - 1];
}

}  // namespace flashdelta::cuda::prepare
