"""`rms_norm`: root-mean-square normalisation; `add_rms_norm`: of a sum, which is wanted too (the residual stream).

Contract
    y = weight * round(x / sqrt(mean(x^2) + epsilon)),   over the last axis, in float32, rounded to the dtype of x in between
    `add_rms_norm`:  s = round(x + residual);  (s, rms_norm(s))

    x, residual, y, s [..., D], weight [D], all of one dtype. A row does not depend on the others. The kernels are for bfloat16
    on a CPU, and for every floating dtype on a GPU (`gpu/rms_norm.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels.native import native


def rms_norm_reference(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """The contract above in plain torch."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return weight_D * (x.float() * scale).to(x.dtype)


def _rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    if gpu.takes(x, weight_D) and x.dtype == weight_D.dtype:
        from perft_kernels.gpu.rms_norm import rms_norm as kernel  # Triton is there on GPUs only

        return kernel(x, None, weight_D, epsilon)[1]
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
    return x.new_empty(x.shape)


def _add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    if gpu.takes(x, residual, weight_D) and x.dtype == residual.dtype == weight_D.dtype and x.shape == residual.shape:
        from perft_kernels.gpu.rms_norm import rms_norm as kernel  # Triton is there on GPUs only

        return kernel(x, residual, weight_D, epsilon)
    total = x + residual
    return total, _rms_norm(total, weight_D, epsilon)


add_rms_norm = Op("add_rms_norm", _add_rms_norm)


@add_rms_norm.register_fake
def _(x, residual, weight_D, epsilon):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape)
