"""`paged_attention` against plain softmax attention on each sequence's own keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perft_kernels.paged_attention import kv_write, paged_attention, short_rows

PAGE, HEADS, GROUPS = 4, 6, 2


@pytest.mark.parametrize("dims", [(16, 16), (32, 16), (12, 8)], ids=["equal", "value-narrower", "odd"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_mixed_batch(window: int | None, sinks: bool, dims: tuple[int, int]) -> None:
    """Decode, whole prefill and later chunks in one call, on scattered pages full of other sequences' NaN."""
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
    for row, key, value in zip(rows, keys, values, strict=True):
        kv_write(key, value, k_pages, v_pages, torch.tensor(row))
    sinks_H = torch.randn(HEADS, generator=g) if sinks else None
    got = paged_attention(
        torch.cat(queries),
        k_pages,
        v_pages,
        torch.tensor(table),
        torch.tensor(short_rows(num_queries)),
        torch.tensor(
            [p for n, length in zip(num_queries, context_len, strict=True) for p in range(length - n, length)]
        ),
        num_queries,
        context_len,
        scale=0.3,
        window=window,
        sinks_H=sinks_H,
    )
    want = torch.cat([plain(q, k, v, 0.3, window, sinks_H) for q, k, v in zip(queries, keys, values, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def plain(
    q_nHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """Attention of the last n positions, one query and one head at a time."""
    n, length = q_nHC.shape[0], k_SGC.shape[0]
    out = torch.empty(n, HEADS, v_SGC.shape[-1])
    for i in range(n):
        position = length - n + i
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = scale * k_SGC[first : position + 1, group] @ q_nHC[i, head]
            if sinks_H is not None:
                scores = torch.cat([scores, sinks_H[head : head + 1]])
            weights = torch.softmax(scores, 0)[: position + 1 - first]
            out[i, head] = weights @ v_SGC[first : position + 1, group]
    return out
