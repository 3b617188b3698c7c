"""`rms_norm`: root-mean-square normalisation on a CPU.

Contract
    y = weight * bfloat16(x / sqrt(mean(x^2) + epsilon)),   over the last axis, in float32;  x [..., D], weight [D], bfloat16
"""

from __future__ import annotations

import torch
from torch import Tensor

from perft_kernels._op import Op
from perft_kernels.native import native


def rms_norm_reference(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """The contract above in plain torch."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return weight_D * (x.float() * scale).to(x.dtype)


def _rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    kernels = native(x, weight_D)
    if kernels is None or not x.dtype == weight_D.dtype == torch.bfloat16:
        return rms_norm_reference(x, weight_D, epsilon)
    x = x.contiguous()
    y = torch.empty_like(x)
    kernels("perft_rms_norm", x, weight_D, y, x.numel() // x.shape[-1], x.shape[-1], epsilon)
    return y


rms_norm = Op("rms_norm", _rms_norm)


@rms_norm.register_fake
def _(x, weight_D, epsilon):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
