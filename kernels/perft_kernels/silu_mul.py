"""`silu_mul`: the activation of a gated MLP (a shared expert, a dense layer), in one operation.

Contract
    y = round(silu(gate)) * up,   gate, up [..., I] of one floating dtype, y likewise in one piece; element by element

    The kernel is in `gpu/silu_mul.py`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The contract above in plain torch."""
    return (F.silu(gate) * up).contiguous()


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    if not gpu.takes(gate, up):
        return silu_mul_reference(gate, up)
    from perft_kernels.gpu.silu_mul import silu_mul as kernel  # Triton is there on GPUs only

    return kernel(gate, up)


silu_mul = Op("silu_mul", _silu_mul)


@silu_mul.register_fake
def _(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)
