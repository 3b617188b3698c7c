/* perft_linear_argmax: the feature at which a linear layer's output is largest. Contract: perft_kernels/linear_argmax.py.
 *
 * First all rows in integers: a row's 8-bit numbers times the token in 16 bits, whose sum is exact, and by how much the layer's
 * own result can differ from it at the most. Then only the rows that may yet be the largest, as `perft_linear` has them. */
#include "panels.h"

#define ROWS 4   /* of a tile: all its sums, and what is being read, stay in registers */
#define BLOCK 64 /* rows that one thread takes at a time */

/* A token in whole numbers of `unit`, and what it takes to say how wrong the integers can be. */
typedef struct {
  float unit, norm, slack;
} coarse_token;

/* sums[r * nt + t] = row r . token t, of 8-bit rows and 16-bit tokens. */
INLINE void coarse_tile(const int nr, const int nt, const int8_t *rows, const int16_t *const *x, int64_t K, int32_t *sums) {
#ifdef __AVX2__
  __m256i acc[ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < nr; r++)
#pragma GCC unroll 2
    for (int t = 0; t < nt; t++) acc[r][t] = _mm256_setzero_si256();
  for (int64_t k = 0; k < K; k += 16) {
    __m256i v[2];
#pragma GCC unroll 2
    for (int t = 0; t < nt; t++) v[t] = _mm256_loadu_si256((const __m256i *)(x[t] + k));
#pragma GCC unroll 4
    for (int r = 0; r < nr; r++) {
      const __m256i row = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(rows + r * K + k)));
#pragma GCC unroll 2
      for (int t = 0; t < nt; t++) acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(row, v[t]));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < nr; r++)
#pragma GCC unroll 2
    for (int t = 0; t < nt; t++) {
      const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(acc[r][t]), _mm256_extracti128_si256(acc[r][t], 1));
      const __m128i two = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
      sums[r * nt + t] = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
    }
#else
  for (int r = 0; r < nr; r++)
    for (int t = 0; t < nt; t++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < K; k++) sum += (int32_t)rows[r * K + k] * x[t][k];
      sums[r * nt + t] = sum;
    }
#endif
}

/* Dot products of up to four rows with up to two tokens. */
static void coarse_dots(int nr, int nt, const int8_t *rows, const int16_t *const *x, int64_t K, int32_t *sums) {
#define PERFT_TILE(R, T) \
  if (nr == R && nt == T) coarse_tile(R, T, rows, x, K, sums);
  PERFT_TILE(4, 1) PERFT_TILE(4, 2) PERFT_TILE(3, 1) PERFT_TILE(3, 2)
  PERFT_TILE(2, 1) PERFT_TILE(2, 2) PERFT_TILE(1, 1) PERFT_TILE(1, 2)
#undef PERFT_TILE
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

/* upper[t][n]: what output n of token t is at the most; least[t]: what the largest output is at the least. */
static void bounds(const int16_t *coarse_x, const coarse_token *tokens, const int8_t *rows, const float *scale_error_norm,
                   float *upper, float *least, int64_t T, int64_t N, int64_t K) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t block = 0; block < (N + BLOCK - 1) / BLOCK; block++)
    for (int64_t n = block * BLOCK; n < MIN(N, (block + 1) * BLOCK); n += ROWS) {
      const int nr = (int)MIN(N - n, ROWS);
      for (int64_t i = 0; i < nr * K; i += 64) __builtin_prefetch(rows + (n + 2 * ROWS) * K + i);
      for (int64_t t = 0; t < T; t += 2) {
        const int nt = (int)MIN(T - t, 2);
        const int16_t *x[2] = {coarse_x + t * K, coarse_x + (t + nt - 1) * K};
        int32_t sums[ROWS * 2];
        coarse_dots(nr, nt, rows + n * K, x, K, sums);
        for (int j = 0; j < nt; j++) {
          const coarse_token *token = tokens + t + j;
          for (int r = 0; r < nr; r++) {
            const float *of_row = scale_error_norm + (n + r) * 3;
            const float y = (float)sums[r * nt + j] * (of_row[0] * token->unit);
            const float error = of_row[1] * token->norm + of_row[2] * token->slack;
            upper[(t + j) * N + n + r] = y + error;
            least[t + j] = y - error > least[t + j] ? y - error : least[t + j];
          }
        }
      }
    }
}

/* The rows of panel `p` whose upper bounds are not below what the largest output is at the least, for the tokens that have any. */
static void refine(const bf16 *x, const bf16 *panels, const float *upper, const float *least, best *found, int64_t p, int64_t T,
                   int64_t N, int64_t K) {
  const int64_t first = p * PANEL, width = MIN(PANEL, N - first);
  int64_t chosen[MAX_TOKENS];
  int nt = 0;
  for (int64_t t = 0; t < T; t++) {
    int any = 0;
    for (int64_t j = 0; j < width; j++) any |= !(upper[t * N + first + j] < least[t]);
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
  int16_t *coarse_x = malloc((size_t)T * K * sizeof(int16_t));
  coarse_token *tokens = malloc((size_t)T * sizeof(coarse_token));
  best *found = malloc((size_t)T * sizeof(best));
  float *least = malloc((size_t)T * sizeof(float));
  int failed = !coarse_x || !tokens || !found || !least;
  if (!failed) {
    for (int64_t t = 0; t < T; t++) {
      tokens[t] = coarsen(x + t * K, K, coarse_x + t * K);
      found[t] = (best){0.0f, -1, 0};
      least[t] = -INFINITY;
    }
#pragma omp parallel
    {
      float own_least[T];
      best own[T];
      for (int64_t t = 0; t < T; t++) {
        own_least[t] = -INFINITY;
        own[t] = (best){0.0f, -1, 0};
      }
      bounds(coarse_x, tokens, rows, scale_error_norm, upper, own_least, T, N, K);
#pragma omp critical
      for (int64_t t = 0; t < T; t++) least[t] = own_least[t] > least[t] ? own_least[t] : least[t];
#pragma omp barrier
      /* outputs that are rounded to the same bf16 are equal, and the first of them counts: one unit in the last place lower */
      for (int64_t t = 0; t < T; t++) own_least[t] = least[t] - fabsf(least[t]) * 0x1p-7f - 1e-37f;
#pragma omp for schedule(dynamic, 16)
      for (int64_t p = 0; p < num_panels(N); p++) refine(x, panels, upper, own_least, own, p, T, N, K);
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
