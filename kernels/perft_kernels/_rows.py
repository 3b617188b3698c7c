"""Rows of a pool gathered by ragged groups: the one primitive under the CPU backends of both adapter ops.

A *pool* holds rows of width V, which divides the width D of activations. A *pair* p joins one token to a block of `count_P[p]`
consecutive rows of width D that starts at pool row `first_row_P[p]`: the down rows of an adapter expert, or the gate rows of an
adapter's router. Blocks of all sizes come mixed; nothing is padded to the largest, and no Python loop runs over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# From this many tokens on, one block's rows are multiplied in a GEMM of their own; below, rows are gathered per pair.
_MIN_GEMM_TOKENS = 8
# Up to so many rows in all, they are gathered without looking whether pairs share them.
_MAX_GATHERED_ROWS = 512


def row_scores(
    x_TD: Tensor, token_P: Tensor, pool_SV: Tensor, first_row_P: Tensor, count_P: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Dot products of each pair's token with each row of the pair's block.

    Args:
        x_TD: activations, any floating dtype.
        token_P: token of each pair, int64 in [0, T).
        pool_SV: the pool.
        first_row_P: first pool row of each pair's block, int64; the blocks lie inside the pool.
        count_P: rows in each pair's block, int64 >= 1.

    Yields:
        For each distinct count n: the pairs `sel_p` (ascending) that have it, and their scores, float32 `[p, n]`,
        computed in float32 from rows and activations as they are.
    """
    counts = torch.unique(count_P).tolist()
    for count in counts:
        sel_p = torch.arange(count_P.numel(), device=count_P.device)
        if len(counts) > 1:
            sel_p = (count_P == count).nonzero().squeeze(1)
        yield sel_p, block_scores(x_TD, token_P[sel_p], pool_SV, first_row_P[sel_p], count)


def block_scores(x_TD: Tensor, token_P: Tensor, pool_SV: Tensor, first_row_P: Tensor, count: int) -> Tensor:
    """`row_scores` of pairs whose blocks all have `count` rows: float32 `[P, count]`."""
    num_pairs = token_P.numel()
    if num_pairs < _MIN_GEMM_TOKENS or num_pairs * count <= _MAX_GATHERED_ROWS:
        return _gathered(x_TD, token_P, pool_SV, first_row_P, count)
    sorted_P, order_P = first_row_P.sort(stable=True)
    blocks_G, sizes_G = torch.unique_consecutive(sorted_P, return_counts=True)
    sizes = sizes_G.tolist()
    if max(sizes) < _MIN_GEMM_TOKENS:
        return _gathered(x_TD, token_P, pool_SV, first_row_P, count)
    scores_Pn = torch.empty(num_pairs, count, dtype=torch.float32, device=x_TD.device)
    cold: list[Tensor] = []
    start = 0
    for first_row, size in zip(blocks_G.tolist(), sizes, strict=True):
        pairs = order_P[start : start + size]
        start += size
        if size < _MIN_GEMM_TOKENS:
            cold.append(pairs)
        else:
            end = first_row + count * x_TD.shape[1] // pool_SV.shape[1]
            rows_nD = pool_SV[first_row:end].float().view(count, -1)
            scores_Pn[pairs] = x_TD[token_P[pairs]].float() @ rows_nD.T
    if cold:
        pairs = torch.cat(cold)
        scores_Pn[pairs] = _gathered(x_TD, token_P[pairs], pool_SV, first_row_P[pairs], count)
    return scores_Pn


def _gathered(x_TD: Tensor, token_P: Tensor, pool_SV: Tensor, first_row_P: Tensor, count: int) -> Tensor:
    num_rows = count * x_TD.shape[1] // pool_SV.shape[1]
    row_Pn = first_row_P.unsqueeze(1) + torch.arange(num_rows, device=first_row_P.device)
    rows_PnD = pool_SV.index_select(0, row_Pn.view(-1)).view(-1, count, x_TD.shape[1]).float()
    return torch.bmm(rows_PnD, x_TD.index_select(0, token_P).float().unsqueeze(2)).squeeze(2)
