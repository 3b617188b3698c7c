/* perft_kv_write and perft_paged_attention. Contract: perft_kernels/paged_attention.py.
 *
 * One task per (new token, KV head): its scores over the context, softmax, the weighted sum of the values, for the query heads
 * that share the KV head. Keys and values are read once per task, in the pages where they lie.
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

/* `nq` query heads of one token at `position` of sequence `b`, from head `first` on; all read KV head `g`. */
INLINE void attend(const attention *a, const int type, const int nq, int64_t t, int64_t b, int64_t g, int64_t first,
                   int64_t position, float *scores) {
  const int64_t from = a->window && position + 1 > a->window ? position + 1 - a->window : 0, length = position + 1 - from;
  const int64_t stride = (length + 15) / 16 * 16;
  const int64_t *pages = a->pages + b * a->max_pages;
  float q[MAX_GROUP][a->C];
  float most[MAX_GROUP], total[MAX_GROUP];
  for (int i = 0; i < nq; i++) {
    to_float(a->q, t * a->q_token + (first + i) * a->q_head, a->C, type, q[i]);
    most[i] = a->sinks ? a->sinks[first + i] : -INFINITY;
  }
  for (int64_t s = 0; s < length; s++) {
    const int64_t at = from + s, row = pages[at / a->page_size] * a->page_size + at % a->page_size;
    f32x16 acc[MAX_GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < nq; i++) acc[i] = (f32x16){0};
    for (int64_t c = 0; c < a->C; c += 16) {
      const f32x16 k = load16(a->k_pages, row * a->k_row + g * a->C + c, type);
#pragma GCC unroll 8
      for (int i = 0; i < nq; i++) acc[i] += k * *(const f32x16_any *)(q[i] + c);
    }
#pragma GCC unroll 8
    for (int i = 0; i < nq; i++) {
      const float score = sum16(acc[i]) * a->scale;
      scores[i * stride + s] = score;
      most[i] = score > most[i] || score != score ? score : most[i]; /* NaN goes on: its sequence's result is NaN */
    }
  }
  for (int i = 0; i < nq; i++) {
    total[i] = a->sinks ? expf(a->sinks[first + i] - most[i]) : 0.0f;
    float *score = scores + i * stride;
    for (int64_t s = length; s < stride; s++) score[s] = -INFINITY; /* up to whole vectors; e to that is next to nothing ... */
    for (int64_t s = 0; s < stride; s += 16) *(f32x16_any *)(score + s) = exp16(*(f32x16_any *)(score + s) - most[i]);
    for (int64_t s = 0; s < length; s++) total[i] += score[s]; /* ... and is not counted */
  }
  for (int64_t c = 0; c < a->Cv; c += 16) {
    f32x16 acc[MAX_GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < nq; i++) acc[i] = (f32x16){0};
    for (int64_t s = 0; s < length; s++) {
      const int64_t at = from + s, row = pages[at / a->page_size] * a->page_size + at % a->page_size;
      const f32x16 v = load16(a->v_pages, row * a->v_row + g * a->Cv + c, type);
#pragma GCC unroll 8
      for (int i = 0; i < nq; i++) acc[i] += v * scores[i * stride + s];
    }
    for (int i = 0; i < nq; i++) store16(a->out, (t * a->H + first + i) * a->Cv + c, type, acc[i] / total[i]);
  }
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
      float *scores = malloc((size_t)(position[t] + 16) * MIN(group, MAX_GROUP) * sizeof *scores);
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
