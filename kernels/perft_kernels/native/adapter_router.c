/* perft_adapter_router. Contract: perft_kernels/adapter_router.py. One task per token. */
#include "common.h"

enum { ALL, ROUTED, EMBEDDED };
enum { KIND, NUM_EXPERTS, TOP_K, NORM, BASE_RANK, FIRST_EXPERT, NUM_COLUMNS };

/* The `k` largest of `K` weights, largest first. */
static void largest(const float *weights, int64_t K, int64_t k, float *out) {
  for (int64_t x = 0; x < k; x++) {
    for (int64_t i = 0; i < K; i++) { /* the one with exactly x before it */
      int64_t before = 0;
      for (int64_t j = 0; j < K; j++) before += weights[j] > weights[i] || (weights[j] == weights[i] && j < i);
      if (before == x) out[x] = weights[i];
    }
  }
}

/* A thread asks for the gates of so many of its tokens ahead: they are short, and lie where nothing was read before. */
#define GATES_AHEAD 4

INLINE void route(const void *h, int64_t h_type, const int64_t *base_ids, const float *base_weights, const int64_t *adapter,
                  const void *gate, int64_t gate_type, const int64_t *rules, const int64_t *gate_row, int64_t *ids,
                  float *weights, int64_t T, int64_t D, int64_t K, int64_t A, int64_t X) {
#pragma omp parallel for schedule(static, 1) if (T >= 8)
  for (int64_t t = 0; t < T; t++) {
    const int64_t step = omp_get_num_threads();
    int64_t *id = ids + t * X;
    float *weight = weights + t * X;
    for (int64_t x = 0; x < X; x++) {
      id[x] = -1;
      weight[x] = 0.0f;
    }
    for (int64_t next = t + (t < step ? 1 : GATES_AHEAD) * step; next < T && next <= t + GATES_AHEAD * step; next += step)
      if (adapter[next] >= 0 && adapter[next] < A && gate_row[adapter[next]] >= 0)
        prefetch_rows(gate, gate_row[adapter[next]], rules[adapter[next] * NUM_COLUMNS + NUM_EXPERTS], D, gate_type);
    if (adapter[t] < 0 || adapter[t] >= A) continue;
    const int64_t *rule = rules + adapter[t] * NUM_COLUMNS;
    const int64_t M = rule[NUM_EXPERTS], k = rule[TOP_K];
    if (rule[KIND] == ALL) {
      for (int64_t m = 0; m < MIN(M, X); m++) {
        id[m] = rule[FIRST_EXPERT] + m;
        weight[m] = 1.0f;
      }
    } else if (rule[KIND] == EMBEDDED) {
      for (int64_t x = 0; x < MIN(K, X); x++) {
        const int64_t local = base_ids[t * K + x];
        if (local < 0 || local >= M) continue;
        id[x] = rule[FIRST_EXPERT] + local;
        weight[x] = base_weights[t * K + x];
      }
    } else if (gate_row[adapter[t]] >= 0 && k <= X && k <= M) {
      float x[D], logits[M];
      if (h_type == BF16 && gate_type == BF16) {
        const bf16 *const rows[1] = {(const bf16 *)h + t * D}, *own = (const bf16 *)gate + gate_row[adapter[t]] * D;
        bf16_dots(own, own, M, D, rows, 1, logits, M);
      } else {
        const float *const rows[1] = {x};
        to_float(h, t * D, D, h_type, x);
        dots(gate, gate_row[adapter[t]], M, D, gate_type, rows, 1, logits, M);
      }
      choose(logits, M, k, rule[NORM] && !rule[BASE_RANK], id, weight);
      if (rule[BASE_RANK]) largest(base_weights + t * K, K, MIN(k, K), weight);
      for (int64_t i = 0; i < k; i++) id[i] += rule[FIRST_EXPERT];
    }
  }
}

static void adapter_router(const void *h, int64_t h_type, const int64_t *base_ids, const float *base_weights,
                          const int64_t *adapter, const void *gate, int64_t gate_type, const int64_t *rules,
                          const int64_t *gate_row, int64_t *ids, float *weights, int64_t T, int64_t D, int64_t K, int64_t A,
                          int64_t X) {
#define PERFT_ROUTE(H, G)                                                                                                  \
  if (h_type == H && gate_type == G)                                                                                       \
    route(h, H, base_ids, base_weights, adapter, gate, G, rules, gate_row, ids, weights, T, D, K, A, X);
  PERFT_ROUTE(F32, F32)
  PERFT_ROUTE(F32, BF16)
  PERFT_ROUTE(BF16, F32)
  PERFT_ROUTE(BF16, BF16)
#undef PERFT_ROUTE
}

int perft_adapter_router(const word *a) {
  adapter_router(a[0].p, a[1].l, a[2].p, a[3].p, a[4].p, a[5].p, a[6].l, a[7].p, a[8].p, a[9].p, a[10].p,
                 a[11].l, a[12].l, a[13].l, a[14].l, a[15].l);
  return 0;
}
