/* perft_run: calls of kernels, one after the other. What they are and where they lie, program.py says. */
#include "common.h"

typedef struct {
  int (*kernel)(const word *);
  const word *arguments;
} call;

/* Returns 0, or -1 as soon as a kernel does. */
int perft_run(const word *a) {
  const call *calls = a[0].p;
  for (int64_t i = 0; i < a[1].l; i++)
    if (calls[i].kernel(calls[i].arguments)) return -1;
  return 0;
}
