/* perft_elementwise: out = a, -a, a + b, a - b or a * b, over tensors of up to four dimensions and any strides.
 * perft_gather: rows of a table.
 *
 * What models do between their large operations: embeddings, rotary embeddings, residuals, parts put together, conversions.
 * Computed in float32 and rounded once, as torch does. Sizes are given outermost first; strides are in elements, 0 where an
 * input is broadcast.
 */
#include "common.h"

enum { COPY, NEGATE, ADD, SUBTRACT, MULTIPLY };
enum { I64 = 2 }; /* an element type that only inputs have */
#define DIMS 4
/* Below so many numbers, a second thread costs more than it saves. */
#define PARALLEL_WORK 8192

INLINE f32xN applyN(const int op, f32xN a, f32xN b) {
  return op == COPY ? a : op == NEGATE ? -a : op == ADD ? a + b : op == SUBTRACT ? a - b : a * b;
}

INLINE float apply(const int op, float a, float b) {
  return op == COPY ? a : op == NEGATE ? -a : op == ADD ? a + b : op == SUBTRACT ? a - b : a * b;
}

INLINE float element(const void *base, int64_t i, const int type) {
  return type == I64 ? (float)((const int64_t *)base)[i] : load(base, i, type);
}

INLINE f32xN elementsN(const void *base, int64_t i, int64_t stride, const int type) {
  return stride == 0 ? (f32xN){0} + load(base, i, type) : loadN(base, i, type);
}

typedef struct {
  void *base[3]; /* out, a, b */
  int64_t size[DIMS], stride[3][DIMS];
} operands;

/* One run along the innermost dimension, from element at[o] of each operand on. */
INLINE void row(const int op, const int out, const int a, const int b, const operands *x, const int64_t *at) {
  const int64_t so = x->stride[0][DIMS - 1], sa = x->stride[1][DIMS - 1], sb = x->stride[2][DIMS - 1];
  const int64_t length = x->size[DIMS - 1];
  int64_t i = 0;
  if (so == 1 && (sa | sb) <= 1 && a != I64 && b != I64)
    for (; i + LANES <= length; i += LANES)
      storeN(x->base[0], at[0] + i, out,
              applyN(op, elementsN(x->base[1], at[1] + i * sa, sa, a), elementsN(x->base[2], at[2] + i * sb, sb, b)));
  for (; i < length; i++) {
    const float value = apply(op, element(x->base[1], at[1] + i * sa, a), element(x->base[2], at[2] + i * sb, b));
    if (out == BF16)
      ((bf16 *)x->base[0])[at[0] + i * so] = bf16_of(value);
    else
      ((float *)x->base[0])[at[0] + i * so] = value;
  }
}

/* Rows [first, last) of the outer two dimensions. */
INLINE void rows(const int op, const int out, const int a, const int b, const operands *x, int64_t first, int64_t last) {
  int64_t i = first / x->size[1], j = first % x->size[1];
  for (int64_t r = first; r < last; r++) {
    int64_t at[3];
    for (int o = 0; o < 3; o++) at[o] = i * x->stride[o][0] + j * x->stride[o][1];
    for (int64_t k = 0; k < x->size[2]; k++) {
      row(op, out, a, b, x, at);
      for (int o = 0; o < 3; o++) at[o] += x->stride[o][2];
    }
    if (++j == x->size[1]) {
      j = 0;
      i++;
    }
  }
}

INLINE void all(const int op, const int out, const int a, const int b, const operands *x) {
  const int64_t num_rows = x->size[0] * x->size[1];
  if (num_rows * x->size[2] * x->size[3] < PARALLEL_WORK || num_rows == 1) {
    rows(op, out, a, b, x, 0, num_rows);
    return;
  }
#pragma omp parallel
  {
    const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
    rows(op, out, a, b, x, num_rows * me / n, num_rows * (me + 1) / n);
  }
}

/* op; base and type of out, a and b (of ops that have no b: a again); DIMS sizes; DIMS strides each. */
int perft_elementwise(const word *w) {
  const int out = (int)w[2].l, a = (int)w[4].l, b = (int)w[6].l;
  operands x;
  for (int o = 0; o < 3; o++) {
    x.base[o] = w[1 + 2 * o].p;
    for (int d = 0; d < DIMS; d++) x.stride[o][d] = w[7 + (1 + o) * DIMS + d].l;
  }
  for (int d = 0; d < DIMS; d++) x.size[d] = w[7 + d].l;
  /* types that come often are constants in code of their own */
#define PERFT_OP(OP)                                  \
  case OP:                                            \
    if (out == BF16 && a == BF16 && b == BF16)        \
      all(OP, BF16, BF16, BF16, &x);                  \
    else if (out == F32 && a == F32 && b == F32)      \
      all(OP, F32, F32, F32, &x);                     \
    else                                              \
      all(OP, out, a, b, &x);                         \
    break;
  switch (w[0].l) { PERFT_OP(COPY) PERFT_OP(NEGATE) PERFT_OP(ADD) PERFT_OP(SUBTRACT) PERFT_OP(MULTIPLY) }
#undef PERFT_OP
  return 0;
}

/* out, table, indices; how many; bytes of a row. */
int perft_gather(const word *a) {
  const int64_t *index = a[2].p;
  for (int64_t i = 0; i < a[3].l; i++)
    memcpy((char *)a[0].p + i * a[4].l, (const char *)a[1].p + index[i] * a[4].l, (size_t)a[4].l);
  return 0;
}
