"""`routed_units` for its tests: inputs, the formula word by word, gradients, and how far a result may be from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import routed_units

RMS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """Inputs of one call."""

    y_TO: Tensor
    h_TI: Tensor
    ids_TX: Tensor
    weights_TX: Tensor
    down_SV: Tensor
    up_SV: Tensor
    down_row_E: Tensor
    up_row_E: Tensor
    rank_E: Tensor
    scale_E: Tensor
    silu_E: Tensor
    mask_TXR: Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def on(self, device: torch.device) -> Case:
        return replace(self, **{name: t.to(device) for name, t in vars(self).items() if t is not None})

    def take(self, tokens: slice) -> Case:
        """Some of the tokens."""
        names = ("y_TO", "h_TI", "ids_TX", "weights_TX", "mask_TXR")
        return replace(self, **{n: getattr(self, n)[tokens] for n in names if getattr(self, n) is not None})


def make(
    tokens: int,
    hidden: int,
    ranks: list[int],
    width: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    out: int | None = None,
    pool: int | None = None,
) -> Case:
    """Random inputs; down and up share one pool, with unused rows of NaN between the blocks.

    Args:
        out: width of the output, if it is not `hidden`.
        pool: width of the pool's rows, if it is not `hidden`.
    """
    out, pool = out or hidden, pool or hidden
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    num_rows = sum(ranks) * (hidden + out) // pool + 2 * len(ranks) + 1
    pool_SV = torch.full((num_rows, pool), float("nan"))
    down_row: list[int] = []
    up_row: list[int] = []
    row = 1
    for rank in ranks:
        for rows, row_width in ((down_row, hidden), (up_row, out)):
            rows.append(row)
            length = rank * row_width // pool
            pool_SV[row : row + length] = random(length, pool) / hidden**0.5
            row += length + 1
    num_experts = len(ranks)
    return Case(
        y_TO=random(tokens, out).to(dtype),
        h_TI=random(tokens, hidden).to(dtype),
        ids_TX=torch.randint(-1, max(num_experts, 1), (tokens, width), generator=g),
        weights_TX=torch.rand(tokens, width, generator=g),
        down_SV=pool_SV.to(dtype),
        up_SV=pool_SV.to(dtype),
        down_row_E=torch.tensor(down_row, dtype=torch.int64),
        up_row_E=torch.tensor(up_row, dtype=torch.int64),
        rank_E=torch.tensor(ranks, dtype=torch.int64),
        scale_E=torch.rand(num_experts, generator=g) + 0.5,
        silu_E=torch.arange(num_experts) % 2 == 1,
    )


def by_the_formula(case: Case) -> Tensor:
    """One token, one slot at a time, in the inputs' dtype promoted to float64."""
    rows = []
    for t in range(case.y_TO.shape[0]):
        row = case.y_TO[t].double()
        for x in range(case.ids_TX.shape[1]):
            e = int(case.ids_TX[t, x])
            if not 0 <= e < case.rank_E.numel():
                continue
            rank, first, last = int(case.rank_E[e]), int(case.down_row_E[e]), int(case.up_row_E[e])
            z_R = rank_rows(case.down_SV, first, rank, case.h_TI.shape[1]) @ case.h_TI[t].double()
            if case.mask_TXR is not None:
                z_R = z_R * case.mask_TXR[t, x].double()
            a_R = F.silu(z_R) if case.silu_E[e] else z_R
            row = row + case.weights_TX[t, x].double() * case.scale_E[e].double() * (
                a_R @ rank_rows(case.up_SV, last, rank, case.y_TO.shape[1])
            )
        rows.append(row)
    return torch.stack(rows)


def rank_rows(pool_SV: Tensor, first: int, rank: int, width: int) -> Tensor:
    """The rank rows of width `width` that begin at pool row `first`."""
    begin = first * pool_SV.shape[1]
    return pool_SV.reshape(-1)[begin : begin + rank * width].view(rank, width).double()


def run(case: Case, device: torch.device) -> Tensor:
    out: Tensor = routed_units(*case.on(device).args())
    return out.cpu()


def gradients(function: Callable[[Case], Tensor], case: Case, grad_TD: Tensor) -> dict[str, Tensor]:
    """Of every differentiable input."""
    names = ("y_TO", "h_TI", "weights_TX", "down_SV", "up_SV")
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in names}
    function(replace(case, **leaves)).backward(grad_TD)
    found = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {name: grad.cpu() for name, grad in found.items()}


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).square().mean().sqrt()
    scale = want.square().mean().sqrt().clamp_min(1e-12)
    assert torch.isfinite(got).all(), name
    assert error / scale < tolerance, f"{name}: relative RMS error {error / scale:.2e}"
