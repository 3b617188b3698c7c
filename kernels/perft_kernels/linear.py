"""A linear layer: `linear` with the weight laid out so that decoding on a CPU runs at the speed of the memory, `stored_linear`
with the weight as `nn.Linear` stores it, for GPUs.

Contract of `linear`
    y = x W^T + bias          x [T, K], W [N, K], bias [N] or none, y [T, N]; sums in float32

    W comes as panels, made once by `to_panels`: `[ceil(N / 32), K / 2, 32, 2]`, 32 output features wide, rows past N zero. A
    panel is read once, front to back, for up to 12 tokens. A token's result does not depend on the other tokens. bfloat16
    and even K only; where the CPU kernels cannot be had, nobody makes panels.

Contract of `stored_linear`
    y = x W^T + bias

    | tensor    | shape       | meaning                                                |
    |-----------|-------------|--------------------------------------------------------|
    | x_TK      | [T, K]      | y is [T, N] and has its dtype                          |
    | weight_NK | [N, K]      | the last axis in one piece; rows may lie further apart |
    | bias_N    | [N] or none | in one piece                                           |

    All of one dtype: float32, float16 or bfloat16. Sums are in float32 and rounded once. On a GPU a token's result does not
    depend, to the bit, on the other tokens or on how many there are, which torch's own does: cuBLAS has other kernels for
    other sizes. The kernel is in `gpu/linear.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels.huge_pages import HugePages
from perft_kernels.native import element_type, native

PANEL = 32


def to_panels(weight_NK: Tensor, memory: HugePages) -> Tensor:
    """The panels of a weight `[..., N, K]` (K even), in memory of their own: `[..., ceil(N / 32), K / 2, 32, 2]`."""
    num_rows, num_columns = weight_NK.shape[-2:]
    padded = F.pad(weight_NK, (0, 0, 0, -num_rows % PANEL))
    panels = padded.unflatten(-1, (num_columns // 2, 2)).unflatten(-3, (-1, PANEL)).transpose(-3, -2)
    return memory.empty(panels.shape, panels.dtype).copy_(panels)


def from_panels(panels: Tensor, num_rows: int) -> Tensor:
    """The weight `[..., N, K]` that `to_panels` was given."""
    return panels.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :num_rows, :]


def linear_reference(x_TK: Tensor, panels: Tensor, bias_N: Tensor | None, num_rows: int) -> Tensor:
    """The contract above in plain torch."""
    bias = None if bias_N is None else bias_N.float()
    return F.linear(x_TK.float(), from_panels(panels, num_rows).float(), bias).to(x_TK.dtype)


def _linear(x_TK: Tensor, panels: Tensor, bias_N: Tensor | None, num_rows: int) -> Tensor:
    kernels = native(x_TK)
    if kernels is None or x_TK.dtype != torch.bfloat16:
        return linear_reference(x_TK, panels, bias_N, num_rows)
    num_tokens, num_columns = x_TK.shape
    x_TK = x_TK.contiguous()
    y_TN = x_TK.new_empty(num_tokens, num_rows)
    kernels("perft_linear", x_TK, panels, bias_N, y_TN, element_type(y_TN), num_tokens, num_rows, num_columns)
    return y_TN


linear = Op("linear", _linear)


@linear.register_fake
def _(x_TK, panels, bias_N, num_rows):  # type: ignore[no-untyped-def]
    return x_TK.new_empty(x_TK.shape[0], num_rows)


def stored_linear_reference(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """The contract above in plain torch."""
    bias = None if bias_N is None else bias_N.float()
    return F.linear(x_TK.float(), weight_NK.float(), bias).to(x_TK.dtype)


def _stored_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if not gpu.takes(x_TK, weight_NK):
        return stored_linear_reference(x_TK, weight_NK, bias_N)
    from perft_kernels.gpu.linear import stored_linear as kernels  # Triton is there on GPUs only

    return kernels(x_TK if x_TK.stride(1) == 1 else x_TK.contiguous(), weight_NK, bias_N)


stored_linear = Op("stored_linear", _stored_linear)


@stored_linear.register_fake
def _(x_TK, weight_NK, bias_N):  # type: ignore[no-untyped-def]
    return x_TK.new_empty(x_TK.shape[0], weight_NK.shape[0])
