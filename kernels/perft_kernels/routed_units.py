"""`routed_units`: what the chosen adapter experts add to a MoE block's output, or the chosen LoRAs to a linear map's.

Contract
    out[t] = y[t] + sum over x of  weights[t, x] * scale[e] * up_e( act_e( down_e(h[t]) ) ),     e = ids[t, x]

    down_e is `rank[e]` rank rows of width I, each dotted with h; up_e is `rank[e]` rank rows of width O, summed with the
    bottleneck's values as coefficients. They lie in pools: memory of rows of a width V that divides I, or O. The rank rows of
    down_e follow one another from pool row `down_row[e]` on, each on I / V pool rows; those of up_e from `up_row[e]` on.
    act_e is SiLU where `silu[e]`, else the identity (`parallel` and `lora` units of PERFT, arXiv 2411.08212).
    At a MoE block I, O and the pool's width are all D. At a linear map of another shape (a LoRA on v_proj) they are not.

    | tensor      | shape  | dtype           | meaning                                                        |
    |-------------|--------|-----------------|----------------------------------------------------------------|
    | y_TO        | [T, O] | float           | output of the base experts; `out` has its shape and dtype      |
    | h_TI        | [T, I] | float           | input of the MoE block                                         |
    | ids_TX      | [T, X] | int64           | adapter experts of each token; outside [0, E): no contribution |
    | weights_TX  | [T, X] | float32         | combine weights                                                |
    | down_SV     | [S, V] | float           | pool that holds the rank rows (down and up may be one pool)    |
    | up_SV       | [S, V] | as down_SV      | its S and V are its own                                        |
    | down_row_E  | [E]    | int64           | first pool row of each adapter expert in `down_SV`             |
    | up_row_E    | [E]    | int64           | the same in `up_SV`                                            |
    | rank_E      | [E]    | int64           | rank of each adapter expert; 0: it adds nothing                |
    | scale_E     | [E]    | float32         | `alpha / r`, or 1                                              |
    | silu_E      | [E]    | bool            | SiLU in the bottleneck                                         |
    | mask_TXR    | or none| float32         | multiplies the bottleneck before act (dropout in training;     |
    |             |        |                 | R: the one rank that all adapter experts then have)            |

    Ranks are ragged: cost follows the active pairs and their own ranks, never the largest. Arithmetic inside the bottleneck
    and over the sum is float32. A pair reads only its own rows, so NaN in one adapter stays with that adapter's tokens.
    Gradients: y, h, weights, down, up; for those of down and up, rows belong to one adapter expert each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels._rows import row_scores
from perft_kernels.native import element_type, native

# up to so many tokens, gathering every pair's rows is cheaper than finding the pairs that share them
_MAX_DECODE_TOKENS = 64


def routed_units_reference(
    y_TO: Tensor,
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SV: Tensor,
    up_SV: Tensor,
    down_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None = None,
) -> Tensor:
    """The contract above in plain torch, without a loop over tokens: the specification."""
    if ids_TX.numel() == 0 or rank_E.numel() == 0:
        return y_TO.clone()
    units = _Units(down_SV, up_SV, down_row_E, up_row_E, rank_E, scale_E, silu_E)
    rank = _common_rank(ids_TX, rank_E) if ids_TX.shape[0] <= _MAX_DECODE_TOKENS else 0
    if rank:
        delta_TO = _delta_of_one_rank(h_TI, ids_TX, weights_TX, units, mask_TXR, rank, y_TO.shape[1])
    else:
        delta_TO = _ragged_delta(h_TI, ids_TX, weights_TX, units, mask_TXR, y_TO.shape[1])
    return (y_TO.float() + delta_TO.float()).to(y_TO.dtype)


class _Units(NamedTuple):
    """The adapter experts' rows and tables, as in the contract."""

    down_SV: Tensor
    up_SV: Tensor
    down_row_E: Tensor
    up_row_E: Tensor
    rank_E: Tensor
    scale_E: Tensor
    silu_E: Tensor


def _common_rank(ids_TX: Tensor, rank_E: Tensor) -> int:
    """The rank of all pairs, if every slot of every token holds a pair and all have one rank; else 0."""
    least, most = ids_TX.aminmax()
    if int(least) < 0 or int(most) >= rank_E.shape[0]:
        return 0
    least, most = rank_E[ids_TX].aminmax()
    return int(least) if least == most else 0


def _delta_of_one_rank(
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    units: _Units,
    mask_TXR: Tensor | None,
    rank: int,
    out_width: int,
) -> Tensor:
    """The delta of a small batch of equals, such as a decode step of a fleet of like adapters: no bookkeeping per pair."""
    num_tokens, width = ids_TX.shape
    in_width = h_TI.shape[1]

    def rows(first_row_E: Tensor, count: int, step: int) -> Tensor:
        offset = torch.arange(0, count * step, step, device=ids_TX.device)
        return (first_row_E[ids_TX].unsqueeze(2) + offset).view(num_tokens, width * count)

    pool_rows = rows(units.down_row_E, rank * in_width // units.down_SV.shape[1], 1)
    rows_TXRI = units.down_SV.index_select(0, pool_rows.view(-1)).float().view(num_tokens, width * rank, in_width)
    z_TXR = torch.bmm(rows_TXRI, h_TI.float().unsqueeze(2)).view(num_tokens, width, rank)
    if mask_TXR is not None:
        z_TXR = z_TXR * mask_TXR
    a_TXR = torch.where(units.silu_E[ids_TX].unsqueeze(2), F.silu(z_TXR), z_TXR)
    a_TXR = a_TXR * (weights_TX * units.scale_E[ids_TX]).unsqueeze(2)
    coefficients = a_TXR.view(num_tokens, width * rank)
    return _summed(rows(units.up_row_E, rank, out_width // units.up_SV.shape[1]), units.up_SV, out_width, coefficients)


def _summed(row: Tensor, up_SV: Tensor, out_width: int, coefficient: Tensor, offset_T: Tensor | None = None) -> Tensor:
    """Sums of rank rows of `up_SV` times their coefficients, `[T, O]`: `row` is the first pool row of each. Bags as in
    `embedding_bag`.
    """
    weights = coefficient.to(up_SV.dtype)
    columns = [
        F.embedding_bag(row + j, up_SV, offset_T, mode="sum", per_sample_weights=weights)
        for j in range(out_width // up_SV.shape[1])
    ]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _ragged_delta(
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    units: _Units,
    mask_TXR: Tensor | None,
    out_width: int,
) -> Tensor:
    """The delta of any batch: each pair with its own rank, hot adapter experts in GEMMs of their own."""
    token_P, slot_P, expert_P = _active_pairs(ids_TX, units.rank_E)
    if token_P.numel() == 0:
        return h_TI.new_zeros(h_TI.shape[0], out_width)
    rank_P = units.rank_E[expert_P]
    end_P = rank_P.cumsum(0)  # pair p owns the coefficients [end - rank, end)
    start_P = end_P - rank_P
    coefficient_S = torch.empty(int(end_P[-1]), dtype=torch.float32, device=h_TI.device)
    row_S = torch.empty_like(coefficient_S, dtype=torch.int64)
    factor_P = weights_TX[token_P, slot_P].float() * units.scale_E[expert_P]
    for sel_p, z_pR in row_scores(h_TI, token_P, units.down_SV, units.down_row_E[expert_P], rank_P):
        if mask_TXR is not None:
            z_pR = z_pR * mask_TXR[token_P[sel_p], slot_P[sel_p]]
        a_pR = torch.where(units.silu_E[expert_P[sel_p]].unsqueeze(1), F.silu(z_pR), z_pR) * factor_P[sel_p].unsqueeze(
            1
        )
        offset_R = torch.arange(z_pR.shape[1], device=z_pR.device)
        at_pR = start_P[sel_p].unsqueeze(1) + offset_R
        coefficient_S[at_pR] = a_pR
        row_S[at_pR] = units.up_row_E[expert_P[sel_p]].unsqueeze(1) + offset_R * (out_width // units.up_SV.shape[1])
    # one bag per token: pairs are in token order, so a token's sum always runs in the order of its own slots
    rows_T = torch.zeros(h_TI.shape[0], dtype=torch.int64, device=h_TI.device).index_add_(0, token_P, rank_P)
    return _summed(row_S, units.up_SV, out_width, coefficient_S, rows_T.cumsum(0) - rows_T)


def _active_pairs(ids_TX: Tensor, rank_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, slot, adapter expert) of every pair that contributes, in token order."""
    inside_TX = (ids_TX >= 0) & (ids_TX < rank_E.shape[0])
    active_TX = inside_TX & (rank_E[torch.where(inside_TX, ids_TX, 0)] > 0) if rank_E.numel() else inside_TX
    token_P, slot_P = active_TX.nonzero(as_tuple=True)
    return token_P, slot_P, ids_TX[token_P, slot_P]


def routed_units_backward_reference(
    grad_TO: Tensor,
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SV: Tensor,
    up_SV: Tensor,
    down_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, weights, down and up, each with the shape and dtype of what it belongs to.

    The bottleneck is computed again, in one pass over the active adapter experts.
    """
    grad_h_TI = torch.zeros(h_TI.shape, dtype=torch.float32, device=h_TI.device)
    grad_weights_TX = torch.zeros(weights_TX.shape, dtype=torch.float32, device=h_TI.device)
    grad_down_SV = torch.zeros_like(down_SV)
    grad_up_SV = torch.zeros_like(up_SV)
    token_P, slot_P, expert_P = _active_pairs(ids_TX, rank_E)
    order_P = torch.argsort(expert_P, stable=True)
    experts_G, sizes_G = torch.unique_consecutive(expert_P[order_P], return_counts=True)
    start = 0
    for expert, size in zip(experts_G.tolist(), sizes_G.tolist(), strict=True):
        pairs = order_P[start : start + size]
        start += size
        token_p, slot_p = token_P[pairs], slot_P[pairs]
        rank = int(rank_E[expert])
        down_rows = _pool_rows(down_row_E, expert, rank, h_TI.shape[1], down_SV)
        up_rows = _pool_rows(up_row_E, expert, rank, grad_TO.shape[1], up_SV)
        x_pI, grad_pO = h_TI[token_p].float(), grad_TO[token_p].float()
        down_RI, up_RO = down_SV[down_rows].float().view(rank, -1), up_SV[up_rows].float().view(rank, -1)
        factor_p = weights_TX[token_p, slot_p].float().unsqueeze(1) * scale_E[expert]
        mask_pR = None if mask_TXR is None else mask_TXR[token_p, slot_p]

        z_pR = x_pI @ down_RI.T
        if mask_pR is not None:
            z_pR = z_pR * mask_pR
        silu = bool(silu_E[expert])
        a_pR = F.silu(z_pR) if silu else z_pR
        b_pR = grad_pO @ up_RO.T  # the gradient seen through up, before the weight
        grad_weights_TX[token_p, slot_p] = (a_pR * b_pR).sum(1) * scale_E[expert]
        grad_up_SV[up_rows] += ((a_pR * factor_p).T @ grad_pO).to(grad_up_SV.dtype).view(-1, up_SV.shape[1])
        grad_z_pR = b_pR * factor_p
        if silu:
            sigmoid_pR = torch.sigmoid(z_pR)
            grad_z_pR = grad_z_pR * sigmoid_pR * (1 + z_pR * (1 - sigmoid_pR))
        if mask_pR is not None:
            grad_z_pR = grad_z_pR * mask_pR
        grad_down_SV[down_rows] += (grad_z_pR.T @ x_pI).to(grad_down_SV.dtype).view(-1, down_SV.shape[1])
        grad_h_TI.index_add_(0, token_p, grad_z_pR @ down_RI)
    return grad_h_TI.to(h_TI.dtype), grad_weights_TX.to(weights_TX.dtype), grad_down_SV, grad_up_SV


def _pool_rows(first_row_E: Tensor, expert: int, rank: int, width: int, pool_SV: Tensor) -> slice:
    """The pool rows that hold an adapter expert's rank rows."""
    first = int(first_row_E[expert])
    return slice(first, first + rank * width // pool_SV.shape[1])


def _routed_units(
    y_TO: Tensor,
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SV: Tensor,
    up_SV: Tensor,
    down_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None = None,
) -> Tensor:
    assert h_TI.shape[1] % down_SV.shape[1] == 0
    assert y_TO.shape[1] % up_SV.shape[1] == 0
    if gpu.takes(h_TI):
        from perft_kernels.gpu import routed_units as on_gpu

        return on_gpu.routed_units(
            *(y_TO, h_TI, ids_TX, weights_TX, down_SV, up_SV),
            *(down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_TXR),
        )
    kernels = native(y_TO, h_TI, down_SV, up_SV) if mask_TXR is None and weights_TX.dtype == torch.float32 else None
    if kernels is None or y_TO.dtype != h_TI.dtype or down_SV.dtype != up_SV.dtype:
        return routed_units_reference(
            *(y_TO, h_TI, ids_TX, weights_TX, down_SV, up_SV),
            *(down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_TXR),
        )
    y_TO, h_TI, out_TO = y_TO.contiguous(), h_TI.contiguous(), torch.empty(y_TO.shape, dtype=y_TO.dtype)
    kernels(
        "perft_routed_units",
        *(y_TO, h_TI, element_type(h_TI), ids_TX.contiguous(), weights_TX.contiguous()),
        *(down_SV.contiguous(), up_SV.contiguous(), element_type(down_SV)),
        *(down_row_E.contiguous(), up_row_E.contiguous(), rank_E.contiguous(), scale_E, silu_E),
        *(out_TO, h_TI.shape[0], h_TI.shape[1], y_TO.shape[1], ids_TX.shape[1], rank_E.shape[0]),
        *(down_SV.shape[1], up_SV.shape[1]),
    )
    return out_TO


routed_units = Op("routed_units", _routed_units)


@routed_units.register_fake
def _(y_TO, h_TI, *_args, **_kwargs):  # type: ignore[no-untyped-def]
    return torch.empty_like(y_TO)


def _routed_units_backward(
    grad_TO: Tensor,
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SV: Tensor,
    up_SV: Tensor,
    down_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad_TO, h_TI, ids_TX, weights_TX, down_SV, up_SV)
    tables = (down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_TXR)
    if gpu.takes(h_TI):
        from perft_kernels.gpu import routed_units as on_gpu

        return on_gpu.routed_units_backward(*arguments, *tables)
    return routed_units_backward_reference(*arguments, *tables)


routed_units_backward = Op("routed_units_backward", _routed_units_backward)


@routed_units_backward.register_fake
def _(grad_TO, h_TI, ids_TX, weights_TX, down_SV, up_SV, *_args, **_kwargs):  # type: ignore[no-untyped-def]
    return torch.empty_like(h_TI), torch.empty_like(weights_TX), torch.empty_like(down_SV), torch.empty_like(up_SV)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
    grad_h, grad_weights, grad_down, grad_up = routed_units_backward(grad_TO.contiguous(), *ctx.saved_tensors)
    return grad_TO, grad_h, None, grad_weights, grad_down, grad_up, None, None, None, None, None, None


routed_units.register_autograd(_backward, setup_context=_setup_context)
