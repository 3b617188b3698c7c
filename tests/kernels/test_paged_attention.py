"""`paged_attention` against plain softmax attention on each sequence's own keys and values, on all backends; and what only the
Triton kernels promise.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from perft_kernels.paged_attention import kv_write, long_pieces, num_long_queries, paged_attention, short_rows

BACKENDS = ("native", "torch", "triton")
PAGE, HEADS, GROUPS = 4, 6, 2
# Relative to the largest output; what is rounded to the dtype besides the output are the softmax's weights.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
GPU_ONLY = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter is wrong in it"),
)


@pytest.mark.parametrize("dims", [(16, 16), (32, 16), (12, 8)], ids=["equal", "value-narrower", "odd"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_mixed_batch(
    window: int | None, sinks: bool, dims: tuple[int, int], backend: str, device: torch.device
) -> None:
    """Decode, whole prefill and later chunks in one call, on scattered pages full of other sequences' NaN."""
    if backend == "triton" and device.type == "cpu" and (dims != (12, 8) or sinks != (window == 5)):
        pytest.skip("interpreting takes a second each: on a CPU, three of these")
    key_dim, value_dim = dims
    g = torch.Generator().manual_seed(0)
    num_queries, context_len = [1, 5, 1, 3, 9, 1, 20, 17], [1, 5, 11, 10, 9, 4, 20, 29]
    k_pages = torch.full((60, PAGE, GROUPS, key_dim), float("nan"))
    v_pages = torch.full((60, PAGE, GROUPS, value_dim), float("nan"))
    k_pages[0], v_pages[0] = 0, 0  # nobody's page
    order = (torch.randperm(59, generator=g) + 1).tolist()
    table, rows = [], []
    keys, values, queries = [], [], []
    for n, length in zip(num_queries, context_len, strict=True):
        own = [order.pop() for _ in range(-(-length // PAGE))]
        k_pages[own], v_pages[own] = 0, 0  # as the engine hands pages out
        table.append(own + [0] * (8 - len(own)))
        rows.append([own[p // PAGE] * PAGE + p % PAGE for p in range(length)])
        keys.append(torch.randn(length, GROUPS, key_dim, generator=g))
        values.append(torch.randn(length, GROUPS, value_dim, generator=g))
        queries.append(torch.randn(n, HEADS, key_dim, generator=g))
    k_pages, v_pages = k_pages.to(device), v_pages.to(device)
    for row, key, value in zip(rows, keys, values, strict=True):
        kv_write(key.to(device), value.to(device), k_pages, v_pages, torch.tensor(row, device=device))
    sinks_H = torch.randn(HEADS, generator=g) if sinks else None
    num_long = num_long_queries(num_queries)
    got = paged_attention(
        torch.cat(queries).to(device),
        k_pages,
        v_pages,
        torch.tensor(table, device=device),
        torch.tensor(short_rows(num_queries, num_long), device=device),
        torch.tensor(
            [p for n, length in zip(num_queries, context_len, strict=True) for p in range(length - n, length)],
            device=device,
        ),
        num_queries,
        context_len,
        num_long,
        scale=0.3,
        window=window,
        sinks_H=None if sinks_H is None else sinks_H.to(device),
    ).cpu()
    want = torch.cat([plain(q, k, v, 0.3, window, sinks_H) for q, k, v in zip(queries, keys, values, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def plain(
    q_nHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """Attention of the last n positions, one query and one head at a time."""
    (n, heads, _), (length, groups, _) = q_nHC.shape, k_SGC.shape
    out = torch.empty(n, heads, v_SGC.shape[-1])
    for i in range(n):
        position = length - n + i
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(heads):
            group = head // (heads // groups)
            scores = scale * k_SGC[first : position + 1, group] @ q_nHC[i, head]
            if sinks_H is not None:
                scores = torch.cat([scores, sinks_H[head : head + 1]])
            weights = torch.softmax(scores, 0)[: position + 1 - first]
            out[i, head] = weights @ v_SGC[first : position + 1, group]
    return out


class Sequences:
    """Sequences on scattered pages; all rows of all pages that hold none of their tokens are NaN."""

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: torch.dtype, device: torch.device, heads: int, groups: int
    ) -> None:
        g = torch.Generator().manual_seed(len(lengths))
        self.lengths, self.device = lengths, device
        num_pages = 1 + sum(-(-length // 16) for length in lengths)
        self.pages = [torch.full((num_pages, 16, groups, width), float("nan"), dtype=dtype) for _ in range(2)]
        free = (torch.randperm(num_pages - 1, generator=g) + 1).tolist()
        self.table = [[free.pop() for _ in range(-(-length // 16))] for length in lengths]
        self.queries, self.keys, self.values = (
            [torch.randn(length, num, width, generator=g).to(dtype) for length in lengths] for num in (heads, groups, groups)
        )  # fmt: skip
        for table, *new in zip(self.table, self.keys, self.values, strict=True):
            rows = torch.tensor([table[p // 16] * 16 + p % 16 for p in range(len(new[0]))])
            for pages, rows_of in zip(self.pages, new, strict=True):
                pages.view(-1, groups, width)[rows] = rows_of
        self.pages = [pages.to(device) for pages in self.pages]

    def attend(
        self,
        which: Sequence[int],
        num_queries: Sequence[int],
        window: int | None = None,
        sinks_H: Tensor | None = None,
        num_long: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Attention of the last queries of some of the sequences in one call, on a table as wide as they need."""

        def ints(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        longest = max(len(self.table[b]) for b in which)
        num_long = num_long_queries(num_queries) if num_long is None else num_long
        lengths = [self.lengths[b] for b in which]
        out = paged_attention(
            torch.cat([self.queries[b][-n:] for b, n in zip(which, num_queries, strict=True)]).to(self.device),
            self.pages[0],
            self.pages[1],
            ints([self.table[b] + [0] * (longest - len(self.table[b])) for b in which]),
            ints(short_rows(num_queries, num_long)),
            ints([p for n, length in zip(num_queries, lengths, strict=True) for p in range(length - n, length)]),
            num_queries,
            lengths,
            num_long,
            scale=0.125,
            window=window,
            sinks_H=None if sinks_H is None else sinks_H.to(self.device),
            long_Q3=ints(long_pieces(num_queries, num_long)).view(-1, 3),
        )
        return [part.cpu() for part in out.split(list(num_queries))]


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_ONLY])
@pytest.mark.parametrize(
    ("width", "heads", "groups"), [(64, 4, 2), (80, 2, 2), (256, 3, 1)], ids=["grouped", "odd", "wide"]
)
def test_triton(width: int, heads: int, groups: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """A context of several splits, a short chunk and a long one; unused rows, neighbours and scratch memory are NaN."""
    if backend != "triton":
        pytest.skip("rows of a page that hold no token must be finite there")
    if device.type == "cpu" and dtype == torch.float16 and width == 80:
        pytest.skip("on a CPU, fewer of these")
    lengths, num_queries = [530, 20, 40], [1, 3, 21]
    sequences = Sequences(lengths, width, dtype, device, heads, groups)
    for window, sinks_H in ((None, None), (300, torch.randn(heads, generator=torch.Generator().manual_seed(0)))):
        found = sequences.attend([0, 1, 2], num_queries, window, sinks_H)
        for b, (n, got) in enumerate(zip(num_queries, found, strict=True)):
            q, k, v = (t[b].float() for t in (sequences.queries, sequences.keys, sequences.values))
            want = plain(q[-n:], k, v, 0.125, window, sinks_H)
            assert (got.float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max(), (window, b)


def test_triton_a_sequence_alone_is_the_same_to_the_bit(backend: str, device: torch.device) -> None:
    if backend != "triton":
        pytest.skip("torch's attention of several sequences sums in another order")
    sequences = Sequences([300, 33, 1, 70], 16, torch.float32, device, 2, 1)
    num_queries = [1, 33, 1, 5]
    together = sequences.attend([0, 1, 2, 3], num_queries)
    for b, n in enumerate(num_queries):
        assert torch.equal(sequences.attend([b], [n])[0], together[b]), b
    assert torch.equal(sequences.attend([3, 0], [5, 1])[1], together[0])
