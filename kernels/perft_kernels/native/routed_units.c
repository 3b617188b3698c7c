/* perft_routed_units: what the chosen adapter experts add. Contract: perft_kernels/routed_units.py.
 *
 * Where tokens share adapter experts, two passes. Pass 1, over tiles of up to four pairs of one adapter expert: its down rows
 * dotted with their tokens, the activation, weight and scale: a coefficient for each rank. Pass 2, over tokens: up rows times
 * coefficients, in the order of the token's own slots and ranks, whoever else is in the batch. Where they do not (decoding on
 * many adapters), one pass over tokens, with the same sums. Ranks are ragged: nothing is as wide as the widest.
 *
 * | array         | shape    | meaning                                                             |
 * |---------------|----------|---------------------------------------------------------------------|
 * | pair          | [P]      | the active pairs (t * X + x), those of one adapter expert together  |
 * | start_TX      | [T * X]  | where a pair's coefficients begin; -1: the pair adds nothing        |
 * | tile          | [tiles+1]| first of `pair` of each tile                                        |
 * | coefficient   | [sum of the pairs' ranks]                                                     |
 */
#include "common.h"

/* Below so many numbers to read, a second thread costs more than it saves. */
#define PARALLEL_WORK 32768

typedef struct {
  int64_t num_pairs, num_tiles, work; /* work: the sum of the pairs' ranks */
  int32_t *pair, *tile;
  int64_t *start;
  float *coefficient;
} plan;

/* Where everything goes; the memory is one block, at `start`. Returns 0, or -1 if there is no memory. */
static int make_plan(const int64_t *ids, int64_t TX, const int64_t *rank, int64_t E, plan *p) {
  int64_t total = 0, num_pairs = 0;
  for (int64_t i = 0; i < TX; i++)
    if (ids[i] >= 0 && ids[i] < E) total += rank[ids[i]];
  p->start = malloc(TX * sizeof *p->start + (3 * TX + 1) * sizeof(int32_t) + total * sizeof(float));
  if (!p->start) return -1;
  p->pair = (int32_t *)(p->start + TX);
  p->tile = p->pair + TX;
  int32_t *scratch = p->tile + TX + 1;
  p->coefficient = (float *)(scratch + TX);

  total = 0;
  for (int64_t i = 0; i < TX; i++) {
    const int64_t R = ids[i] >= 0 && ids[i] < E ? rank[ids[i]] : 0;
    p->start[i] = R ? total : -1;
    total += R;
    if (R) p->pair[num_pairs++] = (int32_t)i;
  }
  /* those of one adapter expert together, in the order of the tokens: a radix sort, since the tables are larger than a batch */
  for (int shift = 0; num_pairs && (E - 1) >> shift; shift += 8) {
    int32_t place[257] = {0};
    for (int64_t i = 0; i < num_pairs; i++) place[(ids[p->pair[i]] >> shift & 255) + 1]++;
    for (int digit = 0; digit < 256; digit++) place[digit + 1] += place[digit];
    for (int64_t i = 0; i < num_pairs; i++) scratch[place[ids[p->pair[i]] >> shift & 255]++] = p->pair[i];
    memcpy(p->pair, scratch, num_pairs * sizeof *scratch);
  }
  p->num_tiles = 0;
  for (int64_t i = 0; i < num_pairs; i++)
    if (i == 0 || ids[p->pair[i]] != ids[p->pair[i - 1]] || i - p->tile[p->num_tiles - 1] == 4)
      p->tile[p->num_tiles++] = (int32_t)i;
  p->tile[p->num_tiles] = (int32_t)num_pairs;
  p->work = total;
  p->num_pairs = num_pairs;
  return 0;
}

/* Row `row` of a pool. */
INLINE const void *pool_row(const void *pool, int64_t row, int64_t width, int type) {
  return (const char *)pool + row * width * size_of(type);
}

/* sum += coefficient[r] * row r, one row after the other for each column. Asks for the rows at `rows_ahead` while it works. */
INLINE void add_rows(const void *rows, const void *rows_ahead, int64_t num_rows, int64_t D, int type, const float *coefficient,
                     float *sum) {
  const char *ahead = rows_ahead;
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) {
    f32xN acc[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[j] = *(f32xN_any *)(sum + d + LANES * j);
    for (int64_t r = 0; r < num_rows; r++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        if (LANES * j * size_of(type) % 64 == 0) __builtin_prefetch(ahead + (r * D + d + LANES * j) * size_of(type), 0, 2);
        acc[j] += coefficient[r] * loadN(rows, r * D + d + LANES * j, type);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) *(f32xN_any *)(sum + d + LANES * j) = acc[j];
  }
  for (; d < D; d += LANES) {
    f32xN acc = *(f32xN_any *)(sum + d);
    for (int64_t r = 0; r < num_rows; r++) acc += coefficient[r] * loadN(rows, r * D + d, type);
    *(f32xN_any *)(sum + d) = acc;
  }
}

typedef struct {
  const void *y, *h, *down, *up;
  void *out;
  const int64_t *ids, *down_row, *up_row, *rank;
  const float *weights, *scale;
  const uint8_t *silu_of;
  int64_t T, I, O, X, down_width, up_width; /* the widths of the pools' rows */
} operands;

/* The adapter expert of pair `i`, or of pair `other` if `i` is none: whose rows to ask for ahead. */
INLINE int64_t expert_of(const plan *p, const operands *o, int64_t i, int64_t other) {
  return o->ids[i < o->T * o->X && p->start[i] >= 0 ? i : other];
}

/* Coefficients of up to four pairs of one adapter expert; the rows of pair `ahead` are asked for. */
INLINE void coefficients(const plan *p, const operands *o, const int32_t *pair, int nt, int64_t ahead, int type, int pool_type) {
  const int64_t e = o->ids[pair[0]], R = o->rank[e], D = o->I;
  float z[4][R];
  if (type == BF16 && pool_type == BF16) {
    const bf16 *rows[4] = {0}, *pool = o->down;
    const int64_t next = expert_of(p, o, ahead, pair[0]);
    for (int t = 0; t < nt; t++) rows[t] = (const bf16 *)o->h + pair[t] / o->X * D;
    bf16_dots(pool + o->down_row[e] * o->down_width, pool + o->down_row[next] * o->down_width, R, D, rows, nt, z[0], R);
  } else {
    float x[4][D];
    const float *const rows[4] = {x[0], x[1], x[2], x[3]};
    for (int t = 0; t < nt; t++) to_float(o->h, pair[t] / o->X * D, D, type, x[t]);
    dots(pool_row(o->down, o->down_row[e], o->down_width, pool_type), 0, R, D, pool_type, rows, nt, z[0], R);
  }
  for (int t = 0; t < nt; t++) {
    const float factor = o->weights[pair[t]] * o->scale[e];
    float *coefficient = p->coefficient + p->start[pair[t]];
    for (int64_t r = 0; r < R; r++) coefficient[r] = (o->silu_of[e] ? silu(z[t][r]) : z[t][r]) * factor;
  }
}

/* out[t] = y[t] + the up rows of its pairs, times their coefficients; the rows of token `ahead` are asked for. */
INLINE void add_units(const plan *p, const operands *o, int64_t t, int64_t ahead, int type, int pool_type) {
  float sum[o->O];
  to_float(o->y, t * o->O, o->O, type, sum);
  for (int64_t i = t * o->X; i < (t + 1) * o->X; i++)
    if (p->start[i] >= 0) {
      const int64_t e = o->ids[i], next = expert_of(p, o, i + (ahead - t) * o->X, i);
      add_rows(pool_row(o->up, o->up_row[e], o->up_width, pool_type), pool_row(o->up, o->up_row[next], o->up_width, pool_type),
               o->rank[e], o->O, pool_type, p->coefficient + p->start[i], sum);
    }
  for (int64_t d = 0; d < o->O; d += LANES) storeN(o->out, t * o->O + d, type, *(f32xN_any *)(sum + d));
}

INLINE void prefetch_units(const plan *p, const operands *o, int64_t t, int pool_type) {
  for (int64_t i = t * o->X; t < o->T && i < (t + 1) * o->X; i++)
    if (p->start[i] >= 0) {
      const int64_t e = o->ids[i], R = o->rank[e];
      prefetch_rows(pool_row(o->down, o->down_row[e], o->down_width, pool_type), 0, R, o->I, pool_type);
      prefetch_rows(pool_row(o->up, o->up_row[e], o->up_width, pool_type), 0, R, o->O, pool_type);
    }
}

INLINE void run(const plan *p, const operands *o, int type, int pool_type) {
  const int shared = 2 * p->num_tiles < p->num_pairs; /* tiles of more than two pairs on average */
#pragma omp parallel if (p->work * (o->I + o->O) / 2 > PARALLEL_WORK)
  {
    if (shared) {
#pragma omp for schedule(dynamic, 2)
      for (int64_t i = 0; i < p->num_tiles; i++)
        coefficients(p, o, p->pair + p->tile[i], p->tile[i + 1] - p->tile[i], p->pair[p->tile[i]], type, pool_type);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < o->T; t++) add_units(p, o, t, t, type, pool_type);
    } else { /* one pass; the rows of a thread's next token come while it computes this one's */
      const int num_threads = omp_get_num_threads();
      prefetch_units(p, o, omp_get_thread_num(), pool_type);
      for (int64_t t = omp_get_thread_num(); t < o->T; t += num_threads) {
        for (int64_t i = t * o->X; i < (t + 1) * o->X; i++)
          if (p->start[i] >= 0) {
            const int32_t pair = (int32_t)i;
            coefficients(p, o, &pair, 1, i + num_threads * o->X, type, pool_type);
          }
        add_units(p, o, t, t + num_threads, type, pool_type);
      }
    }
  }
}

static int routed_units(const void *y, const void *h, int64_t type, const int64_t *ids, const float *weights,
                        const void *down, const void *up, int64_t pool_type, const int64_t *down_row,
                        const int64_t *up_row, const int64_t *rank, const float *scale, const uint8_t *silu_of, void *out,
                        int64_t T, int64_t I, int64_t O, int64_t X, int64_t E, int64_t down_width, int64_t up_width) {
  plan p;
  if (make_plan(ids, T * X, rank, E, &p)) return -1;
  const operands o = {y, h, down, up, out, ids, down_row, up_row, rank, weights, scale, silu_of, T, I, O, X, down_width, up_width};
#define PERFT_RUN(H, P) \
  if (type == H && pool_type == P) run(&p, &o, H, P);
  PERFT_RUN(F32, F32)
  PERFT_RUN(F32, BF16)
  PERFT_RUN(BF16, F32)
  PERFT_RUN(BF16, BF16)
#undef PERFT_RUN
  free(p.start);
  return 0;
}

int perft_routed_units(const word *a) {
  return routed_units(a[0].p, a[1].p, a[2].l, a[3].p, a[4].p, a[5].p, a[6].p, a[7].l, a[8].p, a[9].p, a[10].p, a[11].p,
                      a[12].p, a[13].p, a[14].l, a[15].l, a[16].l, a[17].l, a[18].l, a[19].l, a[20].l);
}
