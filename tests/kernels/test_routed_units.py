"""`routed_units` against a loop that says the formula word by word: values, gradients, and wild ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import routed_units

RMS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """Inputs of one call."""

    y_TD: Tensor
    h_TD: Tensor
    ids_TX: Tensor
    weights_TX: Tensor
    down_SD: Tensor
    up_SD: Tensor
    down_row_E: Tensor
    up_row_E: Tensor
    rank_E: Tensor
    scale_E: Tensor
    silu_E: Tensor
    mask_TXR: Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


def make(
    tokens: int, hidden: int, ranks: list[int], width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    """Random inputs; down and up share one pool, with unused rows of NaN between the blocks."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    num_rows = 2 * sum(ranks) + 2 * len(ranks) + 1
    pool_SD = torch.full((num_rows, hidden), float("nan"))
    down_row: list[int] = []
    up_row: list[int] = []
    row = 1
    for rank in ranks:
        for rows in (down_row, up_row):
            rows.append(row)
            pool_SD[row : row + rank] = random(rank, hidden) / hidden**0.5
            row += rank + 1
    num_experts = len(ranks)
    return Case(
        y_TD=random(tokens, hidden).to(dtype),
        h_TD=random(tokens, hidden).to(dtype),
        ids_TX=torch.randint(-1, max(num_experts, 1), (tokens, width), generator=g),
        weights_TX=torch.rand(tokens, width, generator=g),
        down_SD=pool_SD.to(dtype),
        up_SD=pool_SD.to(dtype),
        down_row_E=torch.tensor(down_row, dtype=torch.int64),
        up_row_E=torch.tensor(up_row, dtype=torch.int64),
        rank_E=torch.tensor(ranks, dtype=torch.int64),
        scale_E=torch.rand(num_experts, generator=g) + 0.5,
        silu_E=torch.arange(num_experts) % 2 == 1,
    )


def by_the_formula(case: Case) -> Tensor:
    """One token, one slot at a time, in the inputs' dtype promoted to float64."""
    rows = []
    for t in range(case.y_TD.shape[0]):
        row = case.y_TD[t].double()
        for x in range(case.ids_TX.shape[1]):
            e = int(case.ids_TX[t, x])
            if not 0 <= e < case.rank_E.numel():
                continue
            rank, first, last = int(case.rank_E[e]), int(case.down_row_E[e]), int(case.up_row_E[e])
            z_R = case.down_SD[first : first + rank].double() @ case.h_TD[t].double()
            if case.mask_TXR is not None:
                z_R = z_R * case.mask_TXR[t, x].double()
            a_R = F.silu(z_R) if case.silu_E[e] else z_R
            row = row + case.weights_TX[t, x].double() * case.scale_E[e].double() * (
                a_R @ case.up_SD[last : last + rank].double()
            )
        rows.append(row)
    return torch.stack(rows)


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).square().mean().sqrt()
    scale = want.square().mean().sqrt().clamp_min(1e-12)
    assert torch.isfinite(got).all(), name
    assert error / scale < tolerance, f"{name}: relative RMS error {error / scale:.2e}"


@pytest.mark.parametrize("dtype", list(RMS_TOLERANCE))
@pytest.mark.parametrize(
    ("tokens", "hidden", "ranks", "width"),
    [
        (1, 16, [4], 1),
        (3, 16, [4, 4, 4], 2),  # fewer pairs than make a GEMM
        (37, 80, [1, 3, 7, 16, 64], 3),  # ragged ranks, odd sizes, some blocks hot enough for a GEMM
        (64, 17, [5], 1),  # all to one
        (40, 16, list(range(1, 33)), 8),  # more adapter experts than one token can see
    ],
)
def test_values(tokens: int, hidden: int, ranks: list[int], width: int, dtype: torch.dtype) -> None:
    case = make(tokens, hidden, ranks, width, dtype)
    got = routed_units(*case.args())
    assert (got.shape, got.dtype) == (case.y_TD.shape, dtype)
    assert_close("out", got, by_the_formula(case), RMS_TOLERANCE[dtype])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", list(RMS_TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_batches_of_equals(tokens: int, dtype: torch.dtype, masked: bool) -> None:
    """One rank and no empty slot: up to 64 tokens take the short way through, with the same result."""
    case = make(tokens, 48, [3] * 7, 2, dtype)
    case.ids_TX.clamp_(min=0)
    if masked:
        case = replace(case, mask_TXR=(torch.rand(tokens, 2, 3) > 0.3).float())
    want = by_the_formula(case)
    assert_close("out", routed_units(*case.args()), want, RMS_TOLERANCE[dtype])
    with_a_gap = replace(case, ids_TX=torch.cat([case.ids_TX, torch.full((tokens, 1), -1)], dim=1))
    if not masked:
        gap_weights = replace(with_a_gap, weights_TX=torch.cat([case.weights_TX, torch.ones(tokens, 1)], dim=1))
        assert_close("the long way", routed_units(*gap_weights.args()), want, RMS_TOLERANCE[dtype])


def test_wild_ids_and_empty_experts_add_nothing() -> None:
    case = make(9, 16, [4, 2, 3], 2)
    case.ids_TX[:, 0] = torch.tensor([-1, -(2**40), 3, 4, 10**9, 2**62, -2, 3, 99])
    case.ids_TX[:, 1] = 1
    case = replace(case, rank_E=torch.tensor([4, 0, 3]))  # the layer is not adapted by this one
    torch.testing.assert_close(routed_units(*case.args()), case.y_TD, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_add(tokens: int) -> None:
    """No token, and no adapter expert at all."""
    case = make(tokens, 8, [], 2)
    out = routed_units(*case.args())
    torch.testing.assert_close(out, case.y_TD, rtol=0, atol=0)
    assert tokens == 0 or out.data_ptr() != case.y_TD.data_ptr()


def test_nan_rows_stay_with_their_tokens() -> None:
    case = make(20, 16, [4, 4], 1)
    case.ids_TX[:, 0] = torch.arange(20) % 2
    want = by_the_formula(case)
    case.down_SD[case.down_row_E[1] : case.down_row_E[1] + 4] = float("nan")
    got = routed_units(*replace(case, up_SD=case.down_SD).args())
    assert_close("even tokens", got[::2], want[::2], RMS_TOLERANCE[torch.float32])
    assert got[1::2].isnan().all()


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """Bit by bit, as long as its blocks are taken the same way (gathered, or in a GEMM)."""
    case = make(6, 16, [4, 2, 8], 2)
    whole = routed_units(*case.args())
    for t in range(6):
        one = replace(
            case,
            y_TD=case.y_TD[t : t + 1],
            h_TD=case.h_TD[t : t + 1],
            ids_TX=case.ids_TX[t : t + 1],
            weights_TX=case.weights_TX[t : t + 1],
        )
        torch.testing.assert_close(routed_units(*one.args())[0], whole[t], rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    """Of every differentiable input, against autograd through the formula."""
    case = make(23, 12, [3, 3, 3], 2, seed=3)
    finite = torch.nan_to_num(case.down_SD)
    case = replace(
        case,
        down_SD=finite,
        up_SD=finite.clone(),
        mask_TXR=(torch.rand(23, 2, 3) > 0.3).float() / 0.7 if masked else None,
    )
    names = ("y_TD", "h_TD", "weights_TX", "down_SD", "up_SD")
    grad_TD = torch.randn(23, 12)
    found = []
    for function in (lambda c: routed_units(*c.args()), by_the_formula):
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in names}
        function(replace(case, **leaves)).backward(grad_TD)
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in names:
        assert_close(name, found[0][name], found[1][name].double(), 1e-5)


def test_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration, as torch checks them."""
    case = make(7, 8, [2, 2], 2)
    case = replace(case, down_SD=torch.nan_to_num(case.down_SD), up_SD=torch.nan_to_num(case.up_SD).clone())
    leaves = [case.y_TD, case.h_TD, case.weights_TX, case.down_SD, case.up_SD]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.library.opcheck(routed_units.op, case.args())
