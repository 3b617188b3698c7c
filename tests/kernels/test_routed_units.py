"""`routed_units` against a loop that says the formula word by word: values, gradients, and wild ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from unit_cases import RMS_TOLERANCE, assert_close, by_the_formula, gradients, make, run

from perft_kernels import routed_units

BACKENDS = ("native", "torch", "triton")


def skip_unless_right(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Triton's interpreter multiplies bfloat16 wrongly."""
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 products need a GPU")


@pytest.mark.parametrize("dtype", list(RMS_TOLERANCE))
@pytest.mark.parametrize(
    ("tokens", "hidden", "ranks", "width"),
    [
        (1, 16, [4], 1),
        (3, 16, [4, 4, 4], 2),  # fewer pairs than make a GEMM
        (37, 80, [1, 3, 7, 16, 64], 3),  # ragged ranks, odd sizes, some blocks hot enough for a GEMM
        (64, 17, [5], 1),  # all to one
        (9, 16, list(range(1, 33)), 8),  # more adapter experts than one token can see
        (4, 530, [3, 131], 2),  # more columns and more ranks than a GPU's program takes at once, by a few
    ],
)
def test_values(
    tokens: int,
    hidden: int,
    ranks: list[int],
    width: int,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    skip_unless_right(backend, device, dtype)
    case = make(tokens, hidden, ranks, width, dtype)
    got = run(case, device)
    assert (got.shape, got.dtype) == (case.y_TO.shape, dtype)
    assert_close("out", got, by_the_formula(case), RMS_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(RMS_TOLERANCE))
@pytest.mark.parametrize(
    ("tokens", "hidden", "out", "pool", "ranks"),
    [
        (5, 64, 32, 16, [3, 3]),  # a key or value projection: fewer columns come out than go in
        (37, 32, 96, 32, [1, 7, 16]),
        (5, 48, 80, 16, [4]),  # neither divides the other
        (70, 17, 34, 17, [2]),
    ],
)
def test_other_widths(
    tokens: int,
    hidden: int,
    out: int,
    pool: int,
    ranks: list[int],
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    """Input, output and pool rows of different widths, as with a LoRA on a linear map."""
    skip_unless_right(backend, device, dtype)
    case = make(tokens, hidden, ranks, 1, dtype, out=out, pool=pool)
    got = run(case, device)
    assert (got.shape, got.dtype) == ((tokens, out), dtype)
    assert_close("out", got, by_the_formula(case), RMS_TOLERANCE[dtype])
    case.ids_TX.clamp_(min=0)
    assert_close("no gap", run(case, device), by_the_formula(case), RMS_TOLERANCE[dtype])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", list(RMS_TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_batches_of_equals(tokens: int, dtype: torch.dtype, masked: bool, backend: str, device: torch.device) -> None:
    """One rank and no empty slot: in plain torch up to 64 tokens take the short way through, with the same result."""
    if backend == "triton" and tokens > 5:
        pytest.skip("its ways part elsewhere")
    skip_unless_right(backend, device, dtype)
    case = make(tokens, 48, [3] * 7, 2, dtype)
    case.ids_TX.clamp_(min=0)
    if masked:
        case = replace(case, mask_TXR=(torch.rand(tokens, 2, 3) > 0.3).float())
    want = by_the_formula(case)
    assert_close("out", run(case, device), want, RMS_TOLERANCE[dtype])
    with_a_gap = replace(case, ids_TX=torch.cat([case.ids_TX, torch.full((tokens, 1), -1)], dim=1))
    if not masked:
        gap_weights = replace(with_a_gap, weights_TX=torch.cat([case.weights_TX, torch.ones(tokens, 1)], dim=1))
        assert_close("the long way", run(gap_weights, device), want, RMS_TOLERANCE[dtype])


def test_wild_ids_and_empty_experts_add_nothing(device: torch.device) -> None:
    case = make(9, 16, [4, 2, 3], 2)
    case.ids_TX[:, 0] = torch.tensor([-1, -(2**40), 3, 4, 10**9, 2**62, -2, 3, 99])
    case.ids_TX[:, 1] = 1
    case = replace(case, rank_E=torch.tensor([4, 0, 3]))  # the layer is not adapted by this one
    torch.testing.assert_close(run(case, device), case.y_TO, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_add(tokens: int, device: torch.device) -> None:
    """No token, and no adapter expert at all."""
    case = make(tokens, 8, [], 2).on(device)
    out = routed_units(*case.args())
    torch.testing.assert_close(out, case.y_TO, rtol=0, atol=0)
    assert tokens == 0 or out.data_ptr() != case.y_TO.data_ptr()


def test_nan_rows_stay_with_their_tokens(device: torch.device) -> None:
    case = make(20, 16, [4, 4], 1)
    case.ids_TX[:, 0] = torch.arange(20) % 2
    want = by_the_formula(case)
    case.down_SV[case.down_row_E[1] : case.down_row_E[1] + 4] = float("nan")
    got = run(replace(case, up_SV=case.down_SV), device)
    assert_close("even tokens", got[::2], want[::2], RMS_TOLERANCE[torch.float32])
    assert got[1::2].isnan().all()


def test_a_token_does_not_depend_on_its_neighbours(backend: str, device: torch.device) -> None:
    """Bit by bit; plain torch only as long as its blocks are taken the same way (gathered, or in a GEMM)."""
    case = make(6, 16, [4, 2, 8], 2)
    whole = run(case, device)
    for t in range(6):
        one = run(case.take(slice(t, t + 1)), device)
        torch.testing.assert_close(one[0], whole[t], rtol=0, atol=1e-6 if backend == "torch" else 0)


def test_where_rows_lie_changes_nothing(device: torch.device) -> None:
    """The pool in another order, and the adapter experts with other numbers: the same bits."""
    case = make(12, 48, [3, 17, 8, 1], 2)
    num_rows, num_experts = case.down_SV.shape[0], case.rank_E.numel()
    down_SV = torch.full((2 * num_rows, 48), float("nan"))
    new_expert_E = torch.tensor([2, 0, 3, 1])
    down_row_E, up_row_E = torch.empty_like(case.down_row_E), torch.empty_like(case.up_row_E)
    row = 5
    for e in (3, 1, 0, 2):
        rank = int(case.rank_E[e])
        for old_E, new_E in ((case.up_row_E, up_row_E), (case.down_row_E, down_row_E)):
            down_SV[row : row + rank] = case.down_SV[old_E[e] : old_E[e] + rank]
            new_E[e] = row
            row += rank + 2
    old_expert_E = new_expert_E.argsort()
    moved = replace(
        case,
        ids_TX=torch.where(case.ids_TX >= 0, new_expert_E[case.ids_TX], -1),
        down_SV=down_SV,
        up_SV=down_SV,
        **{
            n: t[old_expert_E]
            for n, t in {**vars(case), "down_row_E": down_row_E, "up_row_E": up_row_E}.items()
            if n.endswith("_E")
        },
    )
    assert num_experts == new_expert_E.numel()
    torch.testing.assert_close(run(moved, device), run(case, device), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool, device: torch.device) -> None:
    """Of every differentiable input, against autograd through the formula."""
    case = make(23, 12, [3, 3, 3], 2, seed=3)
    finite = torch.nan_to_num(case.down_SV)
    case = replace(
        case,
        down_SV=finite,
        up_SV=finite.clone(),
        mask_TXR=(torch.rand(23, 2, 3) > 0.3).float() / 0.7 if masked else None,
    )
    grad_TD = torch.randn(23, 12)
    got = gradients(lambda c: routed_units(*c.args()), case.on(device), grad_TD.to(device))
    want = gradients(by_the_formula, case, grad_TD)
    for name in want:
        assert_close(name, got[name], want[name].double(), 1e-5)


@pytest.mark.parametrize(("hidden", "out", "pool"), [(12, 24, 12), (24, 12, 4)])
def test_gradients_of_other_widths(hidden: int, out: int, pool: int, device: torch.device) -> None:
    case = make(23, hidden, [3, 1], 2, seed=3, out=out, pool=pool)
    finite = torch.nan_to_num(case.down_SV)
    case = replace(case, down_SV=finite, up_SV=finite.clone())
    grad_TO = torch.randn(23, out, generator=torch.Generator().manual_seed(1))
    got = gradients(lambda c: routed_units(*c.args()), case.on(device), grad_TO.to(device))
    want = gradients(by_the_formula, case, grad_TO)
    for name in want:
        assert_close(name, got[name], want[name].double(), 1e-5)


@pytest.mark.parametrize(
    ("tokens", "ranks", "expert"),
    [
        (40, [1, 0, 21, 16], None),  # ragged; one without ranks; some tokens without any
        (33, [5, 7], 1),  # all to one, and no token for the other
        (1, [4], 0),
        (5, [4, 4], -1),  # nobody
    ],
)
@pytest.mark.parametrize("dtype", list(RMS_TOLERANCE))
def test_gradients_of_ragged_ranks(
    tokens: int, ranks: list[int], expert: int | None, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Pools of another dtype than h's too: that is how adapters are trained."""
    skip_unless_right(backend, device, dtype)
    case = make(tokens, 20, ranks, 2, seed=5)
    if expert is not None:
        case.ids_TX.fill_(expert)
    finite = torch.nan_to_num(case.down_SV)
    for pool_dtype in {dtype, torch.float32}:
        cast = replace(
            case,
            y_TO=case.y_TO.to(dtype),
            h_TI=case.h_TI.to(dtype),
            down_SV=finite.to(pool_dtype),
            up_SV=finite.clone().to(pool_dtype),
        )
        grad_TD = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = gradients(lambda c: routed_units(*c.args()), cast.on(device), grad_TD.to(device))
        want = gradients(by_the_formula, cast, grad_TD.double())
        for name in want:
            assert got[name].dtype == getattr(cast, name).dtype, name
            assert_close(name, got[name], want[name].double(), RMS_TOLERANCE[dtype])


def test_op_is_well_formed(device: torch.device) -> None:
    """Schema, fake implementation and autograd registration, as torch checks them."""
    case = make(3, 8, [2, 2], 2).on(device)
    case = replace(case, down_SV=torch.nan_to_num(case.down_SV), up_SV=torch.nan_to_num(case.up_SV).clone())
    leaves = [case.y_TO, case.h_TI, case.weights_TX, case.down_SV, case.up_SV]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.library.opcheck(routed_units.op, case.args())
