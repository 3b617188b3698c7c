"""`linear`: the base's linear layers on a CPU, with the weight laid out so that decoding runs at the speed of the memory.

Contract
    y = x W^T + bias          x [T, K], W [N, K], bias [N] or none, y [T, N]; sums in float32

    W comes as panels, made once by `to_panels`: `[ceil(N / 32), K / 2, 32, 2]`, 32 output features wide, rows past N zero. A
    panel is read once, front to back, for up to 12 tokens. A token's result does not depend on the other tokens. bfloat16
    and even K only; where the CPU kernels cannot be had, nobody makes panels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
