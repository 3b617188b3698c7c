/* perft_kv_write and perft_paged_attention. Contract: perft_kernels/paged_attention.py.
 *
 * One task per (new token, KV head): its scores over the context, a vector of keys at a time, softmax, the weighted sum of the
 * values, for the query heads that share the KV head. Keys and values are read in the pages where they lie.
 */
#include "common.h"

#define MAX_GROUP 8

/* Strides and sizes in bytes: from one token, and from one head, to the next; of one head's key or value. */
static void kv_write(const char *k, int64_t k_token, int64_t k_head, const char *v, int64_t v_token, int64_t v_head,
                     char *k_pages, char *v_pages, const int64_t *slot, int64_t T, int64_t G, int64_t k_size, int64_t v_size) {
  for (int64_t t = 0; t < T; t++)
    for (int64_t g = 0; g < G; g++) {
      memcpy(k_pages + (slot[t] * G + g) * k_size, k + t * k_token + g * k_head, k_size);
      memcpy(v_pages + (slot[t] * G + g) * v_size, v + t * v_token + g * v_head, v_size);
    }
}

int perft_kv_write(const word *a) {
  kv_write(a[0].p, a[1].l, a[2].l, a[3].p, a[4].l, a[5].l, a[6].p, a[7].p, a[8].p, a[9].l, a[10].l, a[11].l,
           a[12].l);
  return 0;
}

typedef struct {
  const void *q, *k_pages, *v_pages;
  void *out;
  const int64_t *pages;
  int64_t q_token, q_head, k_row, v_row, page_size, max_pages, H, G, C, Cv;
  float scale;
  int64_t window; /* 0: none */
  const float *sinks;
} attention;

/* Walks over the rows of a sequence, whichever pages they are in. */
typedef struct {
  const int64_t *page;
  int64_t page_size, in_page;
} walk;

INLINE walk walk_from(const attention *a, int64_t b, int64_t position) {
  return (walk){a->pages + b * a->max_pages + position / a->page_size, a->page_size, position % a->page_size};
}

INLINE int64_t next_row(walk *w) {
  const int64_t row = *w->page * w->page_size + w->in_page;
  if (++w->in_page == w->page_size) {
    w->in_page = 0;
    w->page++;
  }
  return row;
}

/* Dot products of a query with as many keys as a vector has lanes; each an address of C numbers. */
INLINE f32xN dot_keys(const char *q, const char *const *key, int64_t C, const int type) {
  f32xN acc[LANES];
#pragma GCC unroll 16
  for (int s = 0; s < LANES; s++) acc[s] = (f32xN){0};
  int64_t c = 0;
#ifdef __AVX512BF16__
  if (type == BF16)
    for (; c + 32 <= C; c += 32) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(q + 2 * c);
#pragma GCC unroll 16
      for (int s = 0; s < LANES; s++)
        acc[s] = (f32xN)_mm512_dpbf16_ps((__m512)acc[s], (__m512bh)_mm512_loadu_si512(key[s] + 2 * c), x);
    }
#endif
  for (; c < C; c += LANES) {
    const f32xN x = loadN(q, c, type);
#pragma GCC unroll 16
    for (int s = 0; s < LANES; s++) acc[s] += x * loadN(key[s], c, type);
  }
  return sumsN(acc);
}

/* out[i] += score[i][s] * v[s] over `length` rows, for `nq` heads and `chunks` vectors from column `c` on; then / total[i]. */
INLINE void add_values(const attention *a, const int type, const int nq, const int chunks, walk w, int64_t length, int64_t g,
                       int64_t c, const float *scores, int64_t stride, const float *total, int64_t to) {
  f32xN acc[MAX_GROUP][4];
#pragma GCC unroll 8
  for (int i = 0; i < nq; i++)
#pragma GCC unroll 4
    for (int j = 0; j < chunks; j++) acc[i][j] = (f32xN){0};
  for (int64_t s = 0; s < length; s++) {
    const int64_t row = next_row(&w) * a->v_row + g * a->Cv + c;
#pragma GCC unroll 4
    for (int j = 0; j < chunks; j++) {
      const f32xN v = loadN(a->v_pages, row + LANES * j, type);
#pragma GCC unroll 8
      for (int i = 0; i < nq; i++) acc[i][j] += v * scores[i * stride + s];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < nq; i++)
#pragma GCC unroll 4
    for (int j = 0; j < chunks; j++) storeN(a->out, to + i * a->Cv + c + LANES * j, type, acc[i][j] / total[i]);
}

/* `nq` query heads of one token at `position` of sequence `b`, from head `first` on; all read KV head `g`. */
INLINE void attend(const attention *a, const int type, const int nq, int64_t t, int64_t b, int64_t g, int64_t first,
                   int64_t position, float *scores) {
  const int64_t from = a->window && position + 1 > a->window ? position + 1 - a->window : 0, length = position + 1 - from;
  const int64_t stride = (length + LANES - 1) / LANES * LANES, size = size_of(type);
  const walk begin = walk_from(a, b, from);
  f32xN most[MAX_GROUP];
  float total[MAX_GROUP];
#pragma GCC unroll 8
  for (int i = 0; i < nq; i++) most[i] = (f32xN){0} + (a->sinks ? a->sinks[first + i] : -INFINITY);
  walk w = begin;
  for (int64_t s = 0; s < length; s += LANES) {
    const char *key[LANES];
    for (int j = 0; j < LANES; j++) /* past the end the last one again, whose scores are not used */
      key[j] = s + j < length ? (const char *)a->k_pages + (next_row(&w) * a->k_row + g * a->C) * size : key[j - 1];
    for (int i = 0; i < nq; i++) {
      const char *q = (const char *)a->q + (t * a->q_token + (first + i) * a->q_head) * size;
      f32xN score = dot_keys(q, key, a->C, type) * a->scale;
      for (int64_t j = length - s; j < LANES; j++) score[j] = -INFINITY;
      *(f32xN_any *)(scores + i * stride + s) = score;
      const u32xN higher = (u32xN)(score > most[i]) | (u32xN)(score != score); /* NaN goes on: the result is NaN */
      most[i] = selectN(higher, score, most[i]);
    }
  }
  for (int i = 0; i < nq; i++) {
    float highest = most[i][0];
    for (int j = 1; j < LANES; j++) highest = most[i][j] > highest || most[i][j] != most[i][j] ? most[i][j] : highest;
    f32xN sum = {0};
    float *score = scores + i * stride;
    for (int64_t s = 0; s < stride; s += LANES) {
      f32xN e = expN(*(f32xN_any *)(score + s) - highest);
      for (int64_t j = length - s; j < LANES; j++) e[j] = 0.0f;
      *(f32xN_any *)(score + s) = e;
      sum += e;
    }
    total[i] = sumN(sum) + (a->sinks ? expf(a->sinks[first + i] - highest) : 0.0f);
  }
  const int64_t to = (t * a->H + first) * a->Cv;
  const int chunks = MAX_SUMS / nq < 4 ? MAX_SUMS / nq : 4;
  int64_t c = 0;
  for (; c + LANES * chunks <= a->Cv; c += LANES * chunks)
    add_values(a, type, nq, chunks, begin, length, g, c, scores, stride, total, to);
  for (; c < a->Cv; c += LANES) add_values(a, type, nq, 1, begin, length, g, c, scores, stride, total, to);
}

/* seq [T]: the sequence of each new token, -1: leave it out; position [T]: where it stands in its sequence. */
static int paged_attention(const void *q, int64_t q_token, int64_t q_head, const void *k_pages, const void *v_pages,
                           int64_t type, const int64_t *pages, const int64_t *seq, const int64_t *position,
                           const float *sinks, void *out, int64_t T, int64_t H, int64_t G, int64_t C, int64_t Cv,
                           int64_t page_size, int64_t max_pages, float scale, int64_t window) {
  const attention a = {q,     k_pages, v_pages,   out,       pages, q_token, q_head, G * C, G * Cv,
                       page_size, max_pages, H, G, C, Cv, scale, window, sinks};
  const int64_t group = H / G;
  int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) collapse(2) if (T * G > 1)
  for (int64_t t = 0; t < T; t++)
    for (int64_t g = 0; g < G; g++) {
      if (seq[t] < 0) continue;
      float *scores = malloc((size_t)(position[t] + LANES) * MIN(group, MAX_GROUP) * sizeof *scores);
      if (!scores) {
        failed = 1;
        continue;
      }
      for (int64_t i = 0; i < group; i += MAX_GROUP) {
        const int nq = (int)MIN(group - i, MAX_GROUP);
#define PERFT_ATTEND(N)                                                                         \
  if (nq == N) {                                                                                \
    if (type == BF16)                                                                           \
      attend(&a, BF16, N, t, seq[t], g, g * group + i, position[t], scores);            \
    else                                                                                        \
      attend(&a, F32, N, t, seq[t], g, g * group + i, position[t], scores);             \
  }
        PERFT_ATTEND(1) PERFT_ATTEND(2) PERFT_ATTEND(3) PERFT_ATTEND(4)
        PERFT_ATTEND(5) PERFT_ATTEND(6) PERFT_ATTEND(7) PERFT_ATTEND(8)
#undef PERFT_ATTEND
      }
      free(scores);
    }
  return failed ? -1 : 0;
}

int perft_paged_attention(const word *a) {
  return paged_attention(a[0].p, a[1].l, a[2].l, a[3].p, a[4].p, a[5].l, a[6].p, a[7].p, a[8].p, a[9].p, a[10].p,
                    a[11].l, a[12].l, a[13].l, a[14].l, a[15].l, a[16].l, a[17].l, a[18].f, a[19].l);
}
