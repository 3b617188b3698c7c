"""`silu_mul` in Triton: one launch. In: what its contract says; rows may be parts of wider ones. Out: the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.launch import options, take_turn
from perft_kernels.gpu.rms_norm import rows

_TILE = 1024


@triton.jit
def _silu_mul(gate_TI, up_TI, y_TI, gate_stride, up_stride, I, I_TILE: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (T, I / I_TILE)."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * I_TILE + tl.arange(0, I_TILE)
    dtype = y_TI.dtype.element_ty
    gate_I = tl.load(gate_TI + row * gate_stride + i_I, mask=i_I < I, other=0.0).to(tl.float32)
    up_I = tl.load(up_TI + row * up_stride + i_I, mask=i_I < I, other=0.0).to(tl.float32)
    silu_I = (gate_I / (1.0 + tl.exp(-gate_I))).to(dtype).to(tl.float32)
    tl.store(y_TI + row * I + i_I, (silu_I * up_I).to(dtype), mask=i_I < I)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As the contract in `perft_kernels.silu_mul`."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        gate_TI, up_TI = rows(gate), rows(up)
        width = gate.shape[-1]
        tile = min(_TILE, triton.next_power_of_2(width))
        with gpu.on_device_of(gate):
            _silu_mul[gate_TI.shape[0], triton.cdiv(width, tile)](
                *(gate_TI, up_TI, y, gate_TI.stride(0), up_TI.stride(0), width), I_TILE=tile, **options()
            )
    return y
