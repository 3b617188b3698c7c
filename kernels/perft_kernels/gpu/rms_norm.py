"""`rms_norm` and `add_rms_norm` in Triton: one launch, one program a row. In: what their contract says. Out: the same.

A row is in registers whole, and its squares are added in an order that depends on its length alone. `normalized` is what
`gpu/rotary.py` normalises with too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.launch import options, take_turn


def tile_size(width: int) -> tuple[int, int]:
    """(columns, warps) for rows of this width."""
    tile = triton.next_power_of_2(width)
    return tile, 4 if tile <= 2048 else 8 if tile <= 8192 else 16


@triton.jit
def inverse_rms(x_D, D, epsilon):  # type: ignore[no-untyped-def]
    """1 / sqrt(mean(x^2) + epsilon) of a row in float32 whose columns past D are zero."""
    return 1.0 / tl.sqrt_rn(tl.sum(x_D * x_D, axis=0) / D + epsilon)


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x_TD, residual_TD, weight_D, sum_TD, y_TD, x_stride, residual_stride, D, epsilon, HAS_RESIDUAL: tl.constexpr,
    D_TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, D_TILE)
    is_there_D = d_D < D
    dtype = y_TD.dtype.element_ty
    x_D = tl.load(x_TD + row * x_stride + d_D, mask=is_there_D, other=0.0)
    if HAS_RESIDUAL:
        residual_D = tl.load(residual_TD + row * residual_stride + d_D, mask=is_there_D, other=0.0)
        x_D = (x_D.to(tl.float32) + residual_D.to(tl.float32)).to(dtype)
        tl.store(sum_TD + row * D + d_D, x_D, mask=is_there_D)
    x_D = x_D.to(tl.float32)
    y_D = (x_D * inverse_rms(x_D, D, epsilon)).to(dtype).to(tl.float32)
    weighted_D = y_D * tl.load(weight_D + d_D, mask=is_there_D, other=0.0).to(tl.float32)
    tl.store(y_TD + row * D + d_D, weighted_D.to(dtype), mask=is_there_D)


def rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x + residual, its norm); without a residual the first is x."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    x_TD = rows(x)
    residual_TD = x_TD if residual is None else rows(residual)
    if y.numel():
        tile, num_warps = tile_size(width)
        with gpu.on_device_of(x):
            _rms_norm[(x_TD.shape[0],)](
                *(x_TD, residual_TD, weight_D.contiguous(), total, y, x_TD.stride(0), residual_TD.stride(0)),
                *(width, epsilon),
                HAS_RESIDUAL=residual is not None,
                D_TILE=tile,
                num_warps=num_warps,
                **options(),
            )
    return total, y


def rows(x: Tensor) -> Tensor:
    """`[T, D]` of `[..., D]`, the last axis in one piece; a view where it can be."""
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(1) == 1 or x_TD.shape[1] == 1 else x_TD.contiguous()
