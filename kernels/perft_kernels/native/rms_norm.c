/* perft_rms_norm. Contract: perft_kernels/rms_norm.py. */
#include "common.h"

static void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, int64_t T, int64_t D, float epsilon) {
#pragma omp parallel for schedule(static) if (T * D > 16384)
  for (int64_t t = 0; t < T; t++) {
    f32xN squares = {0};
    for (int64_t d = 0; d < D; d += LANES) {
      const f32xN v = loadN(x, t * D + d, BF16);
      squares += v * v;
    }
    const float factor = 1.0f / sqrtf(sumN(squares) / (float)D + epsilon);
    for (int64_t d = 0; d < D; d += LANES) {
      storeN(y, t * D + d, BF16, loadN(x, t * D + d, BF16) * factor); /* rounded once here, as the model does */
      storeN(y, t * D + d, BF16, loadN(y, t * D + d, BF16) * loadN(weight, d, BF16));
    }
  }
}

int perft_rms_norm(const word *a) {
  rms_norm(a[0].p, a[1].p, a[2].p, a[3].l, a[4].l, a[5].f);
  return 0;
}
