/* perft_elementwise: out = a, -a, a + b, a - b or a * b, over tensors of up to four dimensions and any strides.
 *
 * What models do between their large operations: rotary embeddings, residuals, parts put together, conversions. Computed in
 * float32 and rounded once, as torch does. Sizes are given outermost first; strides are in elements, 0 where an input is
 * broadcast.
 */
#include "common.h"

enum { COPY, NEGATE, ADD, SUBTRACT, MULTIPLY };
#define DIMS 4

INLINE f32x16 apply16(int64_t op, f32x16 a, f32x16 b) {
  return op == COPY ? a : op == NEGATE ? -a : op == ADD ? a + b : op == SUBTRACT ? a - b : a * b;
}

INLINE float apply(int64_t op, float a, float b) {
  return op == COPY ? a : op == NEGATE ? -a : op == ADD ? a + b : op == SUBTRACT ? a - b : a * b;
}

typedef struct {
  void *base;
  int64_t type;
  const word *strides;
} operand;

INLINE f32x16 fetch16(const operand *x, int64_t first, int64_t i) {
  if (x->strides[DIMS - 1].l == 0) return (f32x16){0} + load(x->base, first, (int)x->type);
  return load16(x->base, first + i, (int)x->type);
}

INLINE void row(int64_t op, const operand *out, const operand *a, const operand *b, const int64_t *at, int64_t length) {
  const int64_t so = out->strides[DIMS - 1].l, sa = a->strides[DIMS - 1].l, sb = b->strides[DIMS - 1].l;
  int64_t i = 0;
  if (so == 1 && (sa | sb) <= 1)
    for (; i + 16 <= length; i += 16)
      store16(out->base, at[0] + i, (int)out->type, apply16(op, fetch16(a, at[1], i), fetch16(b, at[2], i)));
  for (; i < length; i++) {
    const float value = apply(op, load(a->base, at[1] + i * sa, (int)a->type), load(b->base, at[2] + i * sb, (int)b->type));
    if (out->type == BF16)
      ((bf16 *)out->base)[at[0] + i * so] = bf16_of(value);
    else
      ((float *)out->base)[at[0] + i * so] = value;
  }
}

/* op; base and type of out, a and b (of ops that have no b: a again); DIMS sizes; DIMS strides each. */
int perft_elementwise(const word *w) {
  const int64_t op = w[0].l;
  const word *size = w + 7;
  const operand x[3] = {
      {w[1].p, w[2].l, size + DIMS}, {w[3].p, w[4].l, size + 2 * DIMS}, {w[5].p, w[6].l, size + 3 * DIMS}};
  for (int64_t i = 0; i < size[0].l; i++)
    for (int64_t j = 0; j < size[1].l; j++)
      for (int64_t k = 0; k < size[2].l; k++) {
        int64_t at[3];
        for (int o = 0; o < 3; o++) at[o] = i * x[o].strides[0].l + j * x[o].strides[1].l + k * x[o].strides[2].l;
        row(op, &x[0], &x[1], &x[2], at, size[3].l);
      }
  return 0;
}
