// Which of Highway's targets are built, and what its older versions lack. Comes before any of its headers.
#pragma once

// The baseline (SSSE3 by the compiler's flags), AVX2 and AVX-512 on x86-64, NEON on aarch64. The sets between and beyond them would add
// build time and size for few processors or little gain, and SVE vectors, whose length the compiler does not know, cannot be held in
// arrays.
#define HWY_DISABLED_TARGETS \
  (HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_ZEN4 | HWY_AVX3_SPR | HWY_AVX10_2 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_NEON_BF16)

#include <hwy/detect_targets.h>

// In a preprocessor condition a name that a version does not know is 0; in code it has to be made so.
#ifndef HWY_AVX3_ZEN4
#define HWY_AVX3_ZEN4 0
#endif
#ifndef HWY_AVX3_SPR
#define HWY_AVX3_SPR 0
#endif
#ifndef HWY_AVX10_2
#define HWY_AVX10_2 0
#endif
#ifndef HWY_SVE_256
#define HWY_SVE_256 0
#endif
#ifndef HWY_SVE2_128
#define HWY_SVE2_128 0
#endif
#ifndef HWY_NEON_BF16
#define HWY_NEON_BF16 0
#endif

#define FLASHDELTA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FLASHDELTA_UNROLL(n) FLASHDELTA_PRAGMA(unroll n)
#else
#define FLASHDELTA_UNROLL(n) FLASHDELTA_PRAGMA(GCC unroll n)
#endif
