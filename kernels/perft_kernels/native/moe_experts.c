/* perft_moe_experts: the base experts of a MoE block. Contract: perft_kernels/moe_experts.py.
 *
 * Pairs of token and base expert are put in the experts' order; then three passes, each over (base expert, panel) or tokens:
 * gate and up with the activation, down, and each token's weighted sum in the order of its own choices.
 *
 * | array      | shape          | meaning                                                              |
 * |------------|----------------|----------------------------------------------------------------------|
 * | first      | [N + 1]        | first pair of each base expert in that order                         |
 * | token_P    | [P]            | token of each pair in that order                                     |
 * | place_TK   | [T, K]         | where pair (t, k) stands in it; -1: the id is none of ours           |
 * | a_PI       | [P, I] bf16    | activations                                                          |
 * | out_PD     | [P, Dp] float  | what each pair adds; Dp is D up to whole panels                      |
 */
#include "panels.h"

static void sort_pairs(const int64_t *ids, int64_t num_pairs, int64_t K, int64_t N, int32_t *first, int32_t *token,
                       int32_t *place) {
  memset(first, 0, (N + 1) * sizeof *first);
  for (int64_t p = 0; p < num_pairs; p++)
    if (ids[p] >= 0 && ids[p] < N) first[ids[p] + 1]++;
  for (int64_t n = 0; n < N; n++) first[n + 1] += first[n];
  for (int64_t p = 0; p < num_pairs; p++) {
    const int inside = ids[p] >= 0 && ids[p] < N;
    place[p] = inside ? first[ids[p]]++ : -1;
    if (inside) token[place[p]] = (int32_t)(p / K);
  }
  for (int64_t n = N; n > 0; n--) first[n] = first[n - 1]; /* counting up has moved each to the next one's */
  first[0] = 0;
}

static int moe_experts(const bf16 *h, const int64_t *ids, const float *weights, const bf16 *gate_up, const bf16 *down,
                       bf16 *y, int64_t T, int64_t D, int64_t N, int64_t I, int64_t K) {
  const int64_t panels_I = num_panels(I), panels_D = num_panels(D), Dp = panels_D * PANEL, P = T * K;
  int32_t *first = malloc((N + 1 + 2 * P) * sizeof *first), *token = first + N + 1, *place = token + P;
  float *out = malloc(P * Dp * sizeof *out + P * I * sizeof(bf16));
  bf16 *a = (bf16 *)(out + P * Dp);
  if (!first || !out) {
    free(first);
    free(out);
    return -1;
  }
  sort_pairs(ids, T * K, K, N, first, token, place);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < N * panels_I; task++) {
      const int64_t n = task / panels_I, p = task % panels_I;
      const bf16 *gate_panel = gate_up + (n * 2 * panels_I + p) * PANEL * D;
      const bf16 *up_panel = gate_panel + panels_I * PANEL * D;
      const int64_t width = MIN(PANEL, I - p * PANEL);
      for (int64_t i = first[n]; i < first[n + 1]; i += MAX_TOKENS) {
        const int nt = (int)MIN(first[n + 1] - i, MAX_TOKENS);
        const bf16 *rows[MAX_TOKENS];
        float gate[MAX_TOKENS][PANEL], up[MAX_TOKENS][PANEL];
        for (int t = 0; t < nt; t++) rows[t] = h + token[i + t] * D;
        panel_dots(nt, rows, gate_panel, D, gate);
        panel_dots(nt, rows, up_panel, D, up);
        for (int t = 0; t < nt; t++) {
          for (int64_t j = 0; j < PANEL; j += LANES) {
            f32xN_any *g = (f32xN_any *)(gate[t] + j);
            *g = siluN(*g) * *(f32xN_any *)(up[t] + j);
          }
          if (width == PANEL)
            for (int64_t j = 0; j < PANEL; j += LANES) storeN(a, (i + t) * I + p * PANEL + j, BF16, *(f32xN_any *)(gate[t] + j));
          else
            for (int64_t j = 0; j < width; j++) a[(i + t) * I + p * PANEL + j] = bf16_of(gate[t][j]);
        }
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < N * panels_D; task++) {
      const int64_t n = task / panels_D, p = task % panels_D;
      const bf16 *panel = down + (n * panels_D + p) * PANEL * I;
      for (int64_t i = first[n]; i < first[n + 1]; i += MAX_TOKENS) {
        const int nt = (int)MIN(first[n + 1] - i, MAX_TOKENS);
        const bf16 *rows[MAX_TOKENS];
        float part[MAX_TOKENS][PANEL];
        for (int t = 0; t < nt; t++) rows[t] = a + (i + t) * I;
        panel_dots(nt, rows, panel, I, part);
        for (int t = 0; t < nt; t++) memcpy(out + (i + t) * Dp + p * PANEL, part[t], sizeof part[t]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++)
      for (int64_t d = 0; d < D; d += LANES) {
        f32xN sum = {0};
        for (int64_t k = t * K; k < (t + 1) * K; k++)
          if (place[k] >= 0) sum += weights[k] * *(f32xN_any *)(out + place[k] * Dp + d);
        storeN(y, t * D + d, BF16, sum);
      }
  }
  free(first);
  free(out);
  return 0;
}

int perft_moe_experts(const word *a) {
  return moe_experts(a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].p, a[6].l, a[7].l, a[8].l, a[9].l, a[10].l);
}
