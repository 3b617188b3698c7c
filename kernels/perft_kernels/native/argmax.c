/* perft_argmax. Contract: perft_kernels/argmax.py. One task per row: the largest number first, then where it stands. */
#include "common.h"

static void argmax(const float *x, int64_t *ids, int64_t B, int64_t V) {
#pragma omp parallel for schedule(static) if (B > 1)
  for (int64_t b = 0; b < B; b++) {
    const float *row = x + b * V;
    f32xN most = {0};
    u32xN is_nan = {0};
    most += -INFINITY;
    int64_t v = 0;
    for (; v + LANES <= V; v += LANES) {
      const f32xN y = *(const f32xN_any *)(row + v);
      is_nan |= (u32xN)(y != y);
      most = selectN((u32xN)(y > most), y, most);
    }
    float highest = -INFINITY;
    int nan = 0;
    for (int j = 0; j < LANES; j++) {
      highest = most[j] > highest ? most[j] : highest;
      nan |= is_nan[j] != 0;
    }
    for (; v < V; v++) {
      highest = row[v] > highest ? row[v] : highest;
      nan |= row[v] != row[v];
    }
    int64_t first = 0;
    while (!nan && row[first] != highest) first++;
    ids[b] = nan ? -1 : first;
  }
}

int perft_argmax(const word *a) {
  argmax(a[0].p, a[1].p, a[2].l, a[3].l);
  return 0;
}
