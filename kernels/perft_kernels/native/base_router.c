/* perft_base_router. Contract: perft_kernels/base_router.py. Tiles of up to four tokens. */
#include "common.h"

static void base_router(const bf16 *h, const bf16 *weight, bf16 *logits, float *weights, int64_t *ids, int64_t T, int64_t D,
                        int64_t N, int64_t K, int64_t norm) {
#pragma omp parallel for schedule(static) if (T * N * D > 65536)
  for (int64_t first = 0; first < T; first += 4) {
    const int nt = (int)MIN(T - first, 4);
    float scores[4][N];
    const bf16 *rows[4] = {0};
    for (int t = 0; t < nt; t++) rows[t] = h + (first + t) * D;
    bf16_dots(weight, weight, N, D, rows, nt, scores[0], N);
    for (int t = 0; t < nt; t++) {
      for (int64_t n = 0; n < N; n++) {
        logits[(first + t) * N + n] = bf16_of(scores[t][n]);
        scores[t][n] = float_of(logits[(first + t) * N + n]);
      }
      choose(scores[t], N, K, (int)norm, ids + (first + t) * K, weights + (first + t) * K);
    }
  }
}

int perft_base_router(const word *a) {
  base_router(a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].l, a[6].l, a[7].l, a[8].l, a[9].l);
  return 0;
}
