/* Matrices of bf16 weights as panels, and the product of a panel with a few tokens: what all base linears are made of.
 *
 * A weight [N, K] is stored as ceil(N / 32) panels of [K / 2][32][2]: 32 output features, pairs of input features side by side,
 * which is how AVX512-BF16 and VNNI-like instructions take them. A panel is read once, front to back, for up to MAX_TOKENS
 * tokens: at decode that is one pass over the weights at the speed of the memory. A token's sum runs over K in order,
 * whatever the number of tokens, so results do not depend on the batch.
 */
#ifndef PERFT_PANELS_H
#define PERFT_PANELS_H

#include "common.h"

#define PANEL 32

#define PANEL_VECTORS (PANEL / LANES)
#ifdef __AVX512BF16__
#define MAX_TOKENS 12 /* two sums each, of 32 registers */
#else
#define MAX_TOKENS (MAX_SUMS / PANEL_VECTORS)
#endif

/* Input features to ask for ahead of their use, 8 KiB of a panel: with a few tokens the processor is busy with products, and its
 * own guess comes too late. */
#define AHEAD 128

INLINE int64_t num_panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

#define PERFT_CASE(n) \
  case n:             \
    PERFT_TILE(n);    \
    break;

#ifdef __AVX512BF16__

INLINE void panel_tile(const int nt, const bf16 *const *x, const bf16 *panel, int64_t K, float (*out)[PANEL]) {
  __m512 acc[MAX_TOKENS][2];
#pragma GCC unroll 12
  for (int t = 0; t < nt; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    __builtin_prefetch(panel + (k + AHEAD) * PANEL);
    __builtin_prefetch(panel + (k + AHEAD) * PANEL + PANEL);
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + PANEL);
#pragma GCC unroll 12
    for (int t = 0; t < nt; t++) {
      int32_t pair;
      memcpy(&pair, x[t] + k, 4);
      const __m512bh v = (__m512bh)_mm512_set1_epi32(pair);
      acc[t][0] = _mm512_dpbf16_ps(acc[t][0], w0, v);
      acc[t][1] = _mm512_dpbf16_ps(acc[t][1], w1, v);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < nt; t++) {
    _mm512_storeu_ps(out[t], acc[t][0]);
    _mm512_storeu_ps(out[t] + 16, acc[t][1]);
  }
}

/* out[t][j] = panel row j . x[t], for `nt` <= MAX_TOKENS tokens. */
static void panel_dots(int nt, const bf16 *const *x, const bf16 *panel, int64_t K, float (*out)[PANEL]) {
#define PERFT_TILE(n) panel_tile(n, x, panel, K, out)
  switch (nt) {
    PERFT_CASE(1) PERFT_CASE(2) PERFT_CASE(3) PERFT_CASE(4) PERFT_CASE(5) PERFT_CASE(6)
    PERFT_CASE(7) PERFT_CASE(8) PERFT_CASE(9) PERFT_CASE(10) PERFT_CASE(11) PERFT_CASE(12)
  }
#undef PERFT_TILE
}

#else

/* Without an instruction that multiplies bf16, weights become floats on their way into the product. */
INLINE void panel_tile(const int nt, const float *const *x, const bf16 *panel, int64_t K, float (*out)[PANEL]) {
  f32xN acc[MAX_TOKENS][PANEL_VECTORS];
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++)
#pragma GCC unroll 8
    for (int j = 0; j < PANEL_VECTORS; j++) acc[t][j] = (f32xN){0};
  for (int64_t k = 0; k < K; k += 2) {
    __builtin_prefetch(panel + (k + AHEAD) * PANEL);
    __builtin_prefetch(panel + (k + AHEAD) * PANEL + PANEL);
#pragma GCC unroll 8
    for (int j = 0; j < PANEL_VECTORS; j++) {
      const u32xN pairs = *(const u32xN_any *)(panel + k * PANEL + 2 * LANES * j);
      const f32xN even = (f32xN)(pairs << 16), odd = (f32xN)(pairs & 0xffff0000u);
#pragma GCC unroll 8
      for (int t = 0; t < nt; t++) {
        acc[t][j] += even * x[t][k];
        acc[t][j] += odd * x[t][k + 1];
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < nt; t++)
#pragma GCC unroll 8
    for (int j = 0; j < PANEL_VECTORS; j++) *(f32xN_any *)(out[t] + LANES * j) = acc[t][j];
}

/* out[t][j] = panel row j . rows[t], for `nt` <= MAX_TOKENS tokens. */
static void panel_dots(int nt, const bf16 *const *rows, const bf16 *panel, int64_t K, float (*out)[PANEL]) {
  float numbers[nt][K];
  const float *x[MAX_TOKENS];
  for (int t = 0; t < nt; t++) {
    for (int64_t k = 0; k < K; k++) numbers[t][k] = float_of(rows[t][k]);
    x[t] = numbers[t];
  }
#define PERFT_TILE(n) panel_tile(n, x, panel, K, out)
  switch (nt) {
    PERFT_CASE(1) PERFT_CASE(2) PERFT_CASE(3)
#if MAX_TOKENS > 3
    PERFT_CASE(4) PERFT_CASE(5) PERFT_CASE(6) PERFT_CASE(7) PERFT_CASE(8)
#endif
  }
#undef PERFT_TILE
}

#endif

#undef PERFT_CASE

#endif
