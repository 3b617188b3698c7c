/* What the CPU kernels share: bf16, vectors of floats, and dot products of pool rows with tokens.
 *
 * Vectors are GCC's (Clang has them too), as wide as the processor's: one source for AVX-512, AVX2 and NEON. (Wider ones the
 * compiler would split, but keep in memory.) A tensor's type is a flag that is constant at each call after inlining, so each type has its own code. Sums run in float32 in
 * an order that depends on the row's length alone: a token's result does not depend on its neighbours.
 */
#ifndef PERFT_COMMON_H
#define PERFT_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_num_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* An argument of a kernel. Every kernel takes its arguments as an array of these, in the order of the C function behind it, so
 * that a program (program.c) can hold calls of any kernel. Returns 0, or -1 if there is no memory for intermediate results. */
typedef union {
  void *p;
  int64_t l;
  float f;
} word;

/* Numbers of the element types, as the Python side passes them. */
enum { F32 = 0, BF16 = 1 };

typedef uint16_t bf16;

/* Floats in a vector, and how many vectors of sums stay in registers beside what is being read. */
#if defined(__AVX512F__)
#define LANES 16
#define MAX_SUMS 16
#elif defined(__AVX__)
#define LANES 8
#define MAX_SUMS 12
#else
#define LANES 4
#define MAX_SUMS 24
#endif
typedef float f32xN __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32xN __attribute__((vector_size(4 * LANES)));
typedef float f32xN_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t u32xN_any __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t u16xN_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE float float_of(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE bf16 bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0 : (bf16)rounded;
}

INLINE int64_t size_of(int type) { return type == BF16 ? 2 : 4; }

/* 16-bit numbers from and into 32 bits: compilers make many instructions of what x86 has one for. */
INLINE u32xN widenN(const bf16 *from) {
#ifdef __AVX512F__
  return (u32xN)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
  return (u32xN)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
  return __builtin_convertvector(*(const u16xN_any *)from, u32xN);
#endif
}

INLINE void narrowN(u32xN x, bf16 *to) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)x));
#else
  *(u16xN_any *)to = __builtin_convertvector(x, u16xN_any);
#endif
}

/* Elements i .. i + LANES - 1. */
INLINE f32xN loadN(const void *base, int64_t i, int type) {
  if (type == BF16) return (f32xN)(widenN((const bf16 *)base + i) << 16);
  return *(const f32xN_any *)((const float *)base + i);
}

INLINE void storeN(void *base, int64_t i, int type, f32xN x) {
  if (type == BF16) {
    const u32xN bits = (u32xN)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32xN is_nan = (u32xN)(x != x);
    narrowN((rounded & ~is_nan) | (is_nan & 0x7fc0), (bf16 *)base + i);
  } else {
    *(f32xN_any *)((float *)base + i) = x;
  }
}

INLINE float load(const void *base, int64_t i, int type) {
  return type == BF16 ? float_of(((const bf16 *)base)[i]) : ((const float *)base)[i];
}

INLINE float sumN(f32xN x) {
  typedef float f32x4 __attribute__((vector_size(16)));
#if LANES == 16
  typedef float f32x8 __attribute__((vector_size(32)));
  const union { f32xN whole; f32x8 half[2]; } a = {x};
  const union { f32x8 whole; f32x4 half[2]; } b = {a.half[0] + a.half[1]};
  const f32x4 y = b.half[0] + b.half[1];
#elif LANES == 8
  const union { f32xN whole; f32x4 half[2]; } a = {x};
  const f32x4 y = a.half[0] + a.half[1];
#else
  const f32x4 y = x;
#endif
  return (y[0] + y[2]) + (y[1] + y[3]);
}

/* The sums of LANES vectors, each in its place: a tree of additions that takes two vectors' halves in one. */
INLINE f32xN sumsN(f32xN *x) {
#if defined(__has_builtin) && LANES >= 8
#if __has_builtin(__builtin_shufflevector)
#define PERFT_JOIN(n, d)                                                                                                      \
  for (int i = 0; i < n; i++)                                                                                                 \
    x[i] = __builtin_shufflevector(x[i], x[i + n], PERFT_LANES(PERFT_STAY, d)) +                                              \
           __builtin_shufflevector(x[i], x[i + n], PERFT_LANES(PERFT_SWAP, d));
#define PERFT_STAY(l, d) (((l) & (d)) ? LANES + (l) : (l))
#define PERFT_SWAP(l, d) (((l) & (d)) ? LANES + ((l) ^ (d)) : (l) ^ (d))
#if LANES == 16
#define PERFT_LANES(f, d)                                                                                                     \
  f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), f(8, d), f(9, d), f(10, d), f(11, d), f(12, d),     \
      f(13, d), f(14, d), f(15, d)
#else
#define PERFT_LANES(f, d) f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d)
#endif
#if LANES == 16
#pragma GCC unroll 8
  PERFT_JOIN(8, 8)
#endif
#pragma GCC unroll 4
  PERFT_JOIN(4, 4)
#pragma GCC unroll 2
  PERFT_JOIN(2, 2)
  PERFT_JOIN(1, 1)
  return x[0];
#undef PERFT_JOIN
#undef PERFT_STAY
#undef PERFT_SWAP
#undef PERFT_LANES
#endif
#endif
  f32xN sums;
  for (int i = 0; i < LANES; i++) sums[i] = sumN(x[i]);
  return sums;
}

INLINE f32xN selectN(u32xN mask, f32xN yes, f32xN no) { return (f32xN)((mask & (u32xN)yes) | (~mask & (u32xN)no)); }

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients). NaN stays NaN. */
INLINE f32xN expN(f32xN x) {
  x = selectN((u32xN)(x < -87.0f), (f32xN){0} - 87.0f, x);
  x = selectN((u32xN)(x > 88.0f), (f32xN){0} + 88.0f, x);
  const f32xN shifted = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 leaves the nearest integer in the low bits */
  const f32xN n = shifted - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32xN p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (f32xN)((u32xN)p + ((u32xN)shifted << 23));
}

INLINE f32xN siluN(f32xN x) { return x / (expN(-x) + 1.0f); }

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }

/* A row of `length` floats out of any type. */
INLINE void to_float(const void *from, int64_t first, int64_t length, int type, float *to) {
  for (int64_t i = 0; i < length; i += LANES) *(f32xN_any *)(to + i) = loadN(from, first + i, type);
}

/* Asks for `num_rows` rows of a pool ahead of their use: blocks are short, and the processor's own guess comes too late. */
INLINE void prefetch_rows(const void *pool, int64_t first_row, int64_t num_rows, int64_t D, int type) {
  const char *from = (const char *)pool + first_row * D * size_of(type);
  for (int64_t i = 0; i < num_rows * D * size_of(type); i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* out[t * out_stride + r] = rows[r] . x[t] for `nr` rows of length D that follow one another, and `nt` tokens. */
INLINE void dot_tile(const int nr, const int nt, const void *rows, int64_t first, int64_t D, int type, const float *const *x,
                     float *out, int64_t out_stride) {
  f32xN acc[4][4];
#pragma GCC unroll 4
  for (int r = 0; r < nr; r++)
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) acc[r][t] = (f32xN){0};
  for (int64_t d = 0; d < D; d += LANES) {
    f32xN v[4];
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) v[t] = *(const f32xN_any *)(x[t] + d);
#pragma GCC unroll 4
    for (int r = 0; r < nr; r++) {
      const f32xN row = loadN(rows, first + r * D + d, type);
#pragma GCC unroll 4
      for (int t = 0; t < nt; t++) acc[r][t] += row * v[t];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < nr; r++)
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) out[t * out_stride + r] = sumN(acc[r][t]);
}

/* Rows of a tile with `nt` tokens: all its sums stay in registers. */
#define TILE_ROWS(nt) (MAX_SUMS < 4 * (nt) ? 2 : 4)

/* Dot products of `num_rows` rows from row `first_row` of a pool with up to four tokens. */
INLINE void dots(const void *pool, int64_t first_row, int64_t num_rows, int64_t D, int type, const float *const *x, int nt,
                 float *out, int64_t out_stride) {
  for (int64_t r = 0; r < num_rows; r += TILE_ROWS(nt)) {
    const int64_t first = (first_row + r) * D;
    const int nr = (int)MIN(num_rows - r, TILE_ROWS(nt));
#define PERFT_TILE(R, T)                                                      \
  if (nr == R && nt == T) {                                                   \
    dot_tile(R, T, pool, first, D, type, x, out + r, out_stride);             \
    continue;                                                                 \
  }
#define PERFT_TILES(R) PERFT_TILE(R, 1) PERFT_TILE(R, 2) PERFT_TILE(R, 3) PERFT_TILE(R, 4)
    PERFT_TILES(4) PERFT_TILES(3) PERFT_TILES(2) PERFT_TILES(1)
#undef PERFT_TILES
#undef PERFT_TILE
  }
}

/* The same for bf16 rows and bf16 tokens. Asks for the rows at `ahead`, as many and as long, while it works. */
INLINE void bf16_tile(const int nr, const int nt, const bf16 *rows, const bf16 *ahead, int64_t D, const bf16 *const *x,
                      float *out, int64_t out_stride) {
  f32xN acc[8][4];
#pragma GCC unroll 8
  for (int r = 0; r < nr; r++)
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) acc[r][t] = (f32xN){0};
  int64_t d = 0;
#ifdef __AVX512BF16__
  for (; d + 32 <= D; d += 32) {
    __m512bh v[4];
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) v[t] = (__m512bh)_mm512_loadu_si512(x[t] + d);
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(rows + r * D + d);
      __builtin_prefetch(ahead + r * D + d, 0, 2);
#pragma GCC unroll 4
      for (int t = 0; t < nt; t++) acc[r][t] = (f32xN)_mm512_dpbf16_ps((__m512)acc[r][t], row, v[t]);
    }
  }
#endif
  for (; d < D; d += LANES) {
    f32xN v[4];
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) v[t] = loadN(x[t], d, BF16);
#pragma GCC unroll 8
    for (int r = 0; r < nr; r++) {
      const f32xN row = loadN(rows, r * D + d, BF16);
      if (d % 32 == 0) __builtin_prefetch(ahead + r * D + d, 0, 2);
#pragma GCC unroll 4
      for (int t = 0; t < nt; t++) acc[r][t] += row * v[t];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < nr; r++)
#pragma GCC unroll 4
    for (int t = 0; t < nt; t++) out[t * out_stride + r] = sumN(acc[r][t]);
}

/* Dot products of `num_rows` bf16 rows with up to four bf16 tokens; a row's sum does not depend on how many. */
INLINE void bf16_dots(const bf16 *rows, const bf16 *ahead, int64_t num_rows, int64_t D, const bf16 *const *x, int nt, float *out,
                      int64_t out_stride) {
  int64_t r = 0;
  if (nt == 1) /* sums enough to hide how long one takes */
    for (; r + 8 <= num_rows; r += 8) bf16_tile(8, 1, rows + r * D, ahead + r * D, D, x, out + r, out_stride);
  while (r < num_rows) {
    const int nr = num_rows - r >= TILE_ROWS(nt) ? TILE_ROWS(nt) : 1;
#define PERFT_TILE(R, T) \
  if (nr == R && nt == T) bf16_tile(R, T, rows + r * D, ahead + r * D, D, x, out + r, out_stride);
#define PERFT_TILES(R) PERFT_TILE(R, 1) PERFT_TILE(R, 2) PERFT_TILE(R, 3) PERFT_TILE(R, 4)
    PERFT_TILES(4) PERFT_TILES(2) PERFT_TILES(1)
#undef PERFT_TILES
#undef PERFT_TILE
    r += nr;
  }
}

/* softmax(logits)'s `k` largest, likeliest first; the first of equals first. */
static inline void choose(const float *logits, int64_t M, int64_t k, int norm, int64_t *local, float *weight) {
  float most = logits[0], total = 0.0f, chosen = 0.0f;
  for (int64_t m = 1; m < M; m++) most = logits[m] > most ? logits[m] : most;
  for (int64_t m = 0; m < M; m++) total += expf(logits[m] - most);
  for (int64_t x = 0; x < k; x++) {
    int64_t best = -1;
    for (int64_t m = 0; m < M; m++) {
      int taken = 0;
      for (int64_t y = 0; y < x; y++) taken |= local[y] == m;
      if (!taken && (best < 0 || logits[m] > logits[best])) best = m;
    }
    local[x] = best;
    weight[x] = expf(logits[best] - most) / total;
    chosen += weight[x];
  }
  if (norm)
    for (int64_t x = 0; x < k; x++) weight[x] /= chosen;
}

#endif
