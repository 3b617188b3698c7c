"""`linear_argmax`: which output of a linear layer is largest, without computing most of them: the head of greedy decoding.

Contract
    ids[t] = argmax(linear(x, W)[t]), to the bit: the first of equals after rounding to bfloat16, -1 if one is NaN
    x [T, K] bfloat16, ids [T] int64

    W comes twice: as the panels of `linear`, and coarse, in 8 bits (`Coarse`). Every row's product with the token is computed
    in integers, which says within what bounds the layer's own output lies; rows whose upper bound is below the largest
    lower bound cannot be the largest, and only the others are computed as `linear` does. At decode that reads half the
    bytes. How well it goes depends on the weights alone in how many rows are left, never in what comes out.

    For a row w = scale * q + e (q whole numbers) and a token x = unit * z + d (z whole numbers),
    |w.x - scale * unit * q.z| <= |e| |x| + |w| |d|  (Cauchy and Schwarz), to which the roundings of a sum in float32 come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perft_kernels._op import Op
from perft_kernels.argmax import argmax_reference
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import linear_reference
from perft_kernels.native import native

_LARGEST = 127
_ROWS_AT_ONCE = 4096  # bounds the float64 copies while coarse weights are made


@dataclass(frozen=True, slots=True)
class Coarse:
    """A weight `[N, K]` in 8 bits.

    Args:
        q_NK: the nearest whole numbers, int8.
        bounds_N3: float32; of each row the scale, the norm of what `scale * q` misses, and the norm.
    """

    q_NK: Tensor
    bounds_N3: Tensor


def coarsen(weight_NK: Tensor, memory: HugePages) -> Coarse:
    """The weight in 8 bits, in memory of its own. A row that holds an infinity or NaN is always among those computed."""
    q_NK = memory.empty(weight_NK.shape, torch.int8)
    bounds_N3 = torch.empty(weight_NK.shape[0], 3)
    for begin in range(0, weight_NK.shape[0], _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        w_nK = weight_NK[rows].double()
        is_finite_n1 = w_nK.isfinite().all(-1, keepdim=True)
        w_nK = torch.where(is_finite_n1, w_nK, 0.0)
        scale_n1 = (w_nK.abs().amax(-1, keepdim=True) / _LARGEST).float().double()
        whole_nK = (w_nK / scale_n1.where(scale_n1 > 0, 1.0)).round().clamp(-_LARGEST, _LARGEST)
        missed_n1 = (w_nK - scale_n1 * whole_nK).norm(dim=-1, keepdim=True).where(is_finite_n1, torch.inf)
        norm_n1 = w_nK.norm(dim=-1, keepdim=True)
        q_NK[rows] = whole_nK.to(torch.int8)
        bounds_N3[rows] = torch.cat((scale_n1, missed_n1 * 1.001, norm_n1 * 1.001), dim=-1).float()
    return Coarse(q_NK, bounds_N3)


def linear_argmax_reference(x_TK: Tensor, panels: Tensor, q_NK: Tensor, bounds_N3: Tensor) -> Tensor:
    """The contract above in plain torch."""
    return argmax_reference(linear_reference(x_TK, panels, None, q_NK.shape[0]))


def _linear_argmax(x_TK: Tensor, panels: Tensor, q_NK: Tensor, bounds_N3: Tensor) -> Tensor:
    kernels = native(x_TK)
    if kernels is None or x_TK.dtype != torch.bfloat16 or not len(x_TK):
        return linear_argmax_reference(x_TK, panels, q_NK, bounds_N3)
    x_TK = x_TK.contiguous()
    (num_tokens, num_columns), num_rows = x_TK.shape, q_NK.shape[0]
    ids_T = torch.empty(num_tokens, dtype=torch.int64)
    upper_TN = torch.empty(num_tokens, num_rows)
    kernels(
        "perft_linear_argmax", x_TK, panels, q_NK, bounds_N3, upper_TN, ids_T, num_tokens, num_rows, num_columns
    )
    return ids_T


linear_argmax = Op("linear_argmax", _linear_argmax)


@linear_argmax.register_fake
def _(x_TK, panels, q_NK, bounds_N3):  # type: ignore[no-untyped-def]
    return x_TK.new_empty(x_TK.shape[0], dtype=torch.int64)
