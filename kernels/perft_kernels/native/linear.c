/* perft_linear: y = x W^T + bias with W as panels. Contract: perft_kernels/linear.py. */
#include "panels.h"

static void linear(const bf16 *x, const bf16 *panels, const bf16 *bias, void *y, int64_t y_type, int64_t T, int64_t N, int64_t K) {
#pragma omp parallel for schedule(dynamic, 4)
  for (int64_t p = 0; p < num_panels(N); p++) {
    const int64_t width = MIN(PANEL, N - p * PANEL);
    for (int64_t first = 0; first < T; first += MAX_TOKENS) {
      const int nt = (int)MIN(T - first, MAX_TOKENS);
      const bf16 *rows[MAX_TOKENS];
      float out[MAX_TOKENS][PANEL];
      for (int t = 0; t < nt; t++) rows[t] = x + (first + t) * K;
      panel_dots(nt, rows, panels + p * PANEL * K, K, out);
      for (int t = 0; t < nt; t++)
        if (width == PANEL && !bias && y_type == BF16) {
          for (int64_t j = 0; j < PANEL; j += LANES)
            storeN(y, (first + t) * N + p * PANEL + j, BF16, *(f32xN_any *)(out[t] + j));
        } else
          for (int64_t j = 0; j < width; j++) {
          const int64_t n = p * PANEL + j, at = (first + t) * N + n;
          const float value = out[t][j] + (bias ? float_of(bias[n]) : 0.0f);
          if (y_type == BF16)
            ((bf16 *)y)[at] = bf16_of(value);
          else
            ((float *)y)[at] = value;
        }
    }
  }
}

int perft_linear(const word *a) {
  linear(a[0].p, a[1].p, a[2].p, a[3].p, a[4].l, a[5].l, a[6].l, a[7].l);
  return 0;
}
