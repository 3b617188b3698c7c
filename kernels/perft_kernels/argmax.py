"""`argmax`: each row's largest number, which is what greedy decoding chooses.

Contract
    ids[b] = the first index at which x[b] is largest, -1 if x[b] holds a NaN;  x [B, V] float32, ids [B] int64
"""

from __future__ import annotations

import torch
from torch import Tensor

from perft_kernels._op import Op
from perft_kernels.native import library


def argmax_reference(x_BV: Tensor) -> Tensor:
    """The contract above in plain torch."""
    most_B, ids_B = x_BV.max(dim=-1)  # NaN counts as the largest
    return torch.where(most_B.isnan(), -1, ids_B)


def _argmax(x_BV: Tensor) -> Tensor:
    kernels = library() if x_BV.device.type == "cpu" and x_BV.dtype == torch.float32 else None
    if kernels is None:
        return argmax_reference(x_BV)
    x_BV = x_BV.contiguous()
    ids_B = torch.empty(x_BV.shape[0], dtype=torch.int64)
    kernels("perft_argmax", x_BV, ids_B, *x_BV.shape)
    return ids_B


argmax = Op("argmax", _argmax)


@argmax.register_fake
def _(x_BV):  # type: ignore[no-untyped-def]
    return x_BV.new_empty(x_BV.shape[0], dtype=torch.int64)
