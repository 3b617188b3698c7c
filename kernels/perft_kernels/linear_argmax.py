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
import torch.nn.functional as F
from torch import Tensor

from perft_kernels._op import Op
from perft_kernels.argmax import argmax_reference
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import linear_reference
from perft_kernels.native import native

ROWS, PIECE = 4, 16
_LARGEST = 127
_ROWS_AT_ONCE = 4096  # bounds the float32 copies while coarse weights are made; divisible by ROWS


@dataclass(frozen=True, slots=True)
class Coarse:
    """A weight `[N, K]` in 8 bits.

    Args:
        q: the nearest whole numbers, int8, four rows side by side in pieces of 16: `[ceil(N / 4), K / 16, 4, 16]`; rows past N
            are zero.
        bounds: float32, of each row the scale, the norm of what `scale * q` misses, and the norm: `[ceil(N / 4), 3, 4]`.
    """

    q: Tensor
    bounds: Tensor


def coarsen(weight_NK: Tensor, memory: HugePages) -> Coarse:
    """The weight in 8 bits, K divisible by 16, in memory of its own.

    A row that holds an infinity or NaN is always among those computed.
    """
    num_rows, num_columns = weight_NK.shape
    q = memory.empty((-(-num_rows // ROWS), num_columns // PIECE, ROWS, PIECE), torch.int8)
    bounds = torch.empty(len(q), 3, ROWS)
    for begin in range(0, num_rows, _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        w_nK = weight_NK[rows].float()
        most_n1 = w_nK.abs().amax(-1, keepdim=True)
        is_finite_n1 = most_n1.isfinite()
        if not is_finite_n1.all():
            w_nK, most_n1 = torch.where(is_finite_n1, w_nK, 0.0), torch.where(is_finite_n1, most_n1, 0.0)
        scale_n1 = most_n1 / _LARGEST
        w_nK = w_nK / scale_n1.where(scale_n1 > 0, 1.0)  # in units of the scale: norms of no row under- or overflow
        whole_nK = w_nK.round().clamp_(-_LARGEST, _LARGEST)
        norm_n1 = w_nK.norm(dim=-1, keepdim=True) * scale_n1
        missed_n1 = w_nK.sub_(whole_nK).norm(dim=-1, keepdim=True) * scale_n1
        missed_n1 = missed_n1.where(is_finite_n1, torch.inf)
        past_end = (0, 0, 0, -len(w_nK) % ROWS)  # a row that may be anything is never the largest at the least
        fours = slice(begin // ROWS, (begin + len(w_nK) + past_end[-1]) // ROWS)
        q[fours] = F.pad(whole_nK.to(torch.int8), past_end).view(-1, ROWS, q.shape[1], PIECE).transpose(1, 2)
        bounds_n3 = torch.cat((scale_n1, missed_n1 * 1.001, norm_n1 * 1.001), dim=-1)
        bounds[fours] = F.pad(bounds_n3, past_end, value=torch.inf).view(-1, ROWS, 3).transpose(1, 2)
    return Coarse(q, bounds)


def linear_argmax_reference(x_TK: Tensor, panels: Tensor, q: Tensor, bounds: Tensor, num_rows: int) -> Tensor:
    """The contract above in plain torch."""
    return argmax_reference(linear_reference(x_TK, panels, None, num_rows))


def _linear_argmax(x_TK: Tensor, panels: Tensor, q: Tensor, bounds: Tensor, num_rows: int) -> Tensor:
    kernels = native(x_TK)
    if kernels is None or x_TK.dtype != torch.bfloat16 or not len(x_TK):
        return linear_argmax_reference(x_TK, panels, q, bounds, num_rows)
    x_TK = x_TK.contiguous()
    num_tokens, num_columns = x_TK.shape
    ids_T = torch.empty(num_tokens, dtype=torch.int64)
    upper_TS = torch.empty(num_tokens, bounds.shape[0] * ROWS)
    kernels("perft_linear_argmax", x_TK, panels, q, bounds, upper_TS, ids_T, num_tokens, num_rows, num_columns)
    return ids_T


linear_argmax = Op("linear_argmax", _linear_argmax)


@linear_argmax.register_fake
def _(x_TK, panels, q, bounds, num_rows):  # type: ignore[no-untyped-def]
    return x_TK.new_empty(x_TK.shape[0], dtype=torch.int64)
