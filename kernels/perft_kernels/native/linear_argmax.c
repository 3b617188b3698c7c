/* perft_linear_argmax: the feature at which a linear layer's output is largest. Contract: perft_kernels/linear_argmax.py.
 *
 * First all rows in integers: a row's 8-bit numbers times the token in 16 bits, whose sum is exact, and by how much the layer's
 * own result can differ from it at the most. Then only the rows that may yet be the largest, as `perft_linear` has them. */
#include "panels.h"

#define ROWS 4   /* of a tile, of whose pieces of 16 columns each is a line of the cache */
#define COARSE_TILE 3 /* tokens of one: all sums, and what is being read, stay in 16 registers */
#define BLOCK 64 /* rows that one thread takes at a time */

/* With more tokens than this, products cost more than memory, and an instruction that multiplies bf16 does them quicker. */
#ifndef COARSE_TOKENS
#ifdef __AVX512BF16__
#define COARSE_TOKENS 4
#else
#define COARSE_TOKENS INT64_MAX
#endif
#endif

/* Bytes to ask for ahead of their use, as in panels.h. */
#define COARSE_AHEAD 8192

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef float f32x4_any __attribute__((vector_size(16), aligned(4), may_alias));

/* A token in whole numbers of `unit`, and what it takes to say how wrong the integers can be. */
typedef struct {
  float unit, norm, slack;
} coarse_token;

/* sums[t][r] = row r . token t, of four 8-bit rows, which lie side by side in pieces of 16, and a few 16-bit tokens. */
INLINE void coarse_tile(const int nt, const int8_t *rows, const int16_t *const *x, int64_t K, i32x4 *sums) {
#ifdef __AVX2__
  __m256i acc[ROWS][COARSE_TILE];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
    for (int t = 0; t < nt; t++) acc[r][t] = _mm256_setzero_si256();
  for (int64_t k = 0; k < K; k += 16) {
    const int8_t *piece = rows + k * ROWS;
    __builtin_prefetch(piece + COARSE_AHEAD);
    __m256i v[COARSE_TILE];
#pragma GCC unroll 3
    for (int t = 0; t < nt; t++) v[t] = _mm256_loadu_si256((const __m256i *)(x[t] + k));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const __m256i row = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(piece + r * 16)));
#pragma GCC unroll 3
      for (int t = 0; t < nt; t++) acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(row, v[t]));
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < nt; t++) {
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[0][t], acc[1][t]), _mm256_hadd_epi32(acc[2][t], acc[3][t]));
    sums[t] = (i32x4)_mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  }
#else
  for (int t = 0; t < nt; t++)
    for (int r = 0; r < ROWS; r++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < K; k += 16)
        for (int64_t i = 0; i < 16; i++) sum += (int32_t)rows[k * ROWS + r * 16 + i] * x[t][k + i];
      sums[t][r] = sum;
    }
#endif
}

static void coarse_dots(int nt, const int8_t *rows, const int16_t *const *x, int64_t K, i32x4 *sums) {
  switch (nt) {
    case 1: coarse_tile(1, rows, x, K, sums); break;
    case 2: coarse_tile(2, rows, x, K, sums); break;
    case 3: coarse_tile(3, rows, x, K, sums); break;
  }
}

/* A token as whole numbers, as large as sums of K products with 8-bit numbers allow. */
static coarse_token coarsen(const bf16 *x, int64_t K, int16_t *to) {
  const int64_t largest = MIN(32767, INT32_MAX / (127 * K));
  float most = 0.0f;
  double squares = 0.0;
  int finite = 1;
  for (int64_t k = 0; k < K; k++) {
    const float v = float_of(x[k]);
    most = fabsf(v) > most ? fabsf(v) : most;
    squares += (double)v * v;
    finite &= isfinite(v) != 0;
  }
  const float unit = most / (float)largest;
  double missed = 0.0;
  for (int64_t k = 0; k < K; k++) {
    const float v = finite && unit > 0.0f ? rintf(float_of(x[k]) / unit) : 0.0f;
    to[k] = (int16_t)(v > (float)largest ? (float)largest : v < -(float)largest ? -(float)largest : v);
    const double difference = (double)float_of(x[k]) - (double)unit * to[k];
    missed += difference * difference;
  }
  /* sums in float32 over K products may be off by K roundings of what they add up to in absolute value; four times that */
  const double norm = sqrt(squares);
  return (coarse_token){unit, finite ? (float)norm * 1.001f : INFINITY, (float)(sqrt(missed) + norm * (double)K * 0x1p-22)};
}

/* The largest output found so far of a token; `id` of its first row, -1: none yet. */
typedef struct {
  float value;
  int64_t id;
  int is_nan;
} best;

INLINE void improve(best *b, float value, int64_t id) {
  b->is_nan |= value != value;
  if (b->id < 0 || value > b->value || (value == b->value && id < b->id)) *b = (best){value, id, b->is_nan};
}

/* upper[t][n]: what output n of token t is at the most, S numbers a token; least[t]: of some outputs, what the largest is at the
 * least. A NaN leaves `least` as it is. */
static void bounds(const int16_t *coarse_x, const coarse_token *tokens, const int8_t *rows, const float *scale_error_norm,
                   float *upper, f32x4 *least, int64_t T, int64_t S, int64_t K) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t block = 0; block < (S + BLOCK - 1) / BLOCK; block++)
    for (int64_t n = block * BLOCK; n < MIN(S, (block + 1) * BLOCK); n += ROWS) {
      const f32x4_any *of_rows = (const f32x4_any *)(scale_error_norm + n * 3);
      for (int64_t t = 0; t < T; t += COARSE_TILE) {
        const int nt = (int)MIN(T - t, COARSE_TILE);
        const int16_t *x[COARSE_TILE];
        for (int j = 0; j < nt; j++) x[j] = coarse_x + (t + j) * K;
        i32x4 sums[COARSE_TILE];
        coarse_dots(nt, rows + n * K, x, K, sums);
        for (int j = 0; j < nt; j++) {
          const coarse_token *token = tokens + t + j;
          const f32x4 y = __builtin_convertvector(sums[j], f32x4) * (of_rows[0] * token->unit);
          const f32x4 error = of_rows[1] * token->norm + of_rows[2] * token->slack, lower = y - error;
          *(f32x4_any *)(upper + (t + j) * S + n) = y + error;
          const i32x4 is_more = lower > least[t + j];
          least[t + j] = (f32x4)((is_more & (i32x4)lower) | (~is_more & (i32x4)least[t + j]));
        }
      }
    }
}

/* The rows of panel `p` for the tokens of which one has an upper bound that is not below what the largest output is at the least;
 * for all tokens where there are no bounds. */
static void refine(const bf16 *x, const bf16 *panels, const float *upper, const float *least, best *found, int64_t p, int64_t T,
                   int64_t S, int64_t N, int64_t K) {
  const int64_t first = p * PANEL, width = MIN(PANEL, N - first);
  int64_t chosen[MAX_TOKENS];
  int nt = 0;
  for (int64_t t = 0; t < T; t++) {
    int any = !upper;
    for (int64_t j = 0; upper && j < width; j++) any |= !(upper[t * S + first + j] < least[t]);
    if (any) chosen[nt++] = t;
    if (nt && (nt == MAX_TOKENS || t == T - 1)) {
      const bf16 *rows[MAX_TOKENS];
      float out[MAX_TOKENS][PANEL];
      for (int i = 0; i < nt; i++) rows[i] = x + chosen[i] * K;
      panel_dots(nt, rows, panels + first * K, K, out);
      for (int i = 0; i < nt; i++)
        for (int64_t j = 0; j < width; j++) improve(found + chosen[i], float_of(bf16_of(out[i][j])), first + j);
      nt = 0;
    }
  }
}

static int linear_argmax(const bf16 *x, const bf16 *panels, const int8_t *rows, const float *scale_error_norm, float *upper,
                         int64_t *ids, int64_t T, int64_t N, int64_t K) {
  const int64_t S = (N + ROWS - 1) / ROWS * ROWS;
  int16_t *coarse_x = malloc((size_t)T * K * sizeof(int16_t));
  coarse_token *tokens = malloc((size_t)T * sizeof(coarse_token));
  best *found = malloc((size_t)T * sizeof(best));
  float *least = malloc((size_t)T * sizeof(float));
  const int failed = !coarse_x || !tokens || !found || !least;
  if (T > COARSE_TOKENS) upper = NULL;
  if (!failed) {
    for (int64_t t = 0; t < T; t++) {
      tokens[t] = coarsen(x + t * K, K, coarse_x + t * K);
      found[t] = (best){0.0f, -1, 0};
      least[t] = -INFINITY;
    }
#pragma omp parallel
    {
      f32x4 own_least[T];
      float threshold[T];
      best own[T];
      for (int64_t t = 0; t < T; t++) {
        own_least[t] = (f32x4){-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        own[t] = (best){0.0f, -1, 0};
      }
      if (upper) {
        bounds(coarse_x, tokens, rows, scale_error_norm, upper, own_least, T, S, K);
#pragma omp critical
        for (int64_t t = 0; t < T; t++)
          for (int r = 0; r < ROWS; r++) least[t] = own_least[t][r] > least[t] ? own_least[t][r] : least[t];
#pragma omp barrier
      }
      /* outputs that are rounded to the same bf16 are equal, and the first of them counts: one unit in the last place lower */
      for (int64_t t = 0; t < T; t++) threshold[t] = least[t] - fabsf(least[t]) * 0x1p-7f - 1e-37f;
#pragma omp for schedule(dynamic, 16)
      for (int64_t p = 0; p < num_panels(N); p++) refine(x, panels, upper, threshold, own, p, T, S, N, K);
#pragma omp critical
      for (int64_t t = 0; t < T; t++) {
        if (own[t].id >= 0) improve(found + t, own[t].value, own[t].id);
        found[t].is_nan |= own[t].is_nan;
      }
    }
    for (int64_t t = 0; t < T; t++) ids[t] = found[t].is_nan ? -1 : found[t].id;
  }
  free(coarse_x);
  free(tokens);
  free(found);
  free(least);
  return failed ? -1 : 0;
}

int perft_linear_argmax(const word *a) {
  return linear_argmax(a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].p, a[6].l, a[7].l, a[8].l);
}
