"""What only the Triton kernels of `routed_units` have: sorted pairs and tiles, two ways with one result, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from unit_cases import RMS_TOLERANCE, Case, assert_close, by_the_formula, gradients, make, run

from perft_kernels import routed_units

BACKENDS = ("triton",)
kernels = pytest.importorskip("perft_kernels.gpu.routed_units")
DTYPES = list(RMS_TOLERANCE) if torch.cuda.is_available() else [torch.float32, torch.float16]


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """`torch.empty` is full of NaN (of the largest number, if of integers)."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["decode", "sorted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """However few or many tokens there are."""
    monkeypatch.setattr(kernels, "MAX_DECODE_TOKENS", 10**9 if request.param == "decode" else 0)
    return str(request.param)


@pytest.mark.parametrize(
    ("tokens", "num_experts"),
    [
        (1, 3),
        (50, 1),  # all to one: more than three tiles of it
        (50, 3),
        (7, 40),  # most of them without a token
        (600, 5),  # more pairs than the sort's kernels take at once
    ],
)
def test_tiles(tokens: int, num_experts: int, device: torch.device) -> None:
    """Every active pair is in one tile of at most 16 pairs of one adapter expert; nobody else is."""
    g = torch.Generator().manual_seed(tokens)
    ids_TX = torch.randint(-2, num_experts + 2, (tokens, 2), generator=g)
    rank_E = torch.randint(0, 3, (num_experts,), generator=g)
    rank_E[0] = 1
    blocks = kernels._Blocks.of(64, 64, device)
    pairs = kernels._Pairs.by_expert(ids_TX.to(device), rank_E.to(device), blocks)
    key_P, order_P, tile_P = (t.tolist() for t in (pairs.key_P, pairs.order_P, pairs.tile_P))
    ids_P = ids_TX.flatten().tolist()
    active = [0 <= e < num_experts and int(rank_E[e]) > 0 for e in ids_P]
    assert sorted(order_P) == list(range(2 * tokens))
    assert key_P == [ids_P[p] if active[p] else num_experts for p in order_P]
    assert list(zip(key_P, order_P, strict=True)) == sorted(zip(key_P, order_P, strict=True))

    seen: list[int] = []
    for first in tile_P[: tile_P[-1]]:
        places = [p for p in range(first, 2 * tokens) if p // 16 == first // 16 and key_P[p] == key_P[first]]
        seen += [order_P[p] for p in places]
    assert sorted(seen) == [p for p in range(2 * tokens) if active[p]]
    most = -(-2 * tokens // 16) + min(2 * tokens, num_experts)
    assert pairs.num_tiles == min(most, blocks.num_programs)


CASES = [
    (1, 16, [4], 1),
    (19, 80, [1, 3, 7, 16, 40], 3),
    (4, 530, [3, 131], 2),  # two splits of the columns; ranks beyond those that z holds
]


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "ranks", "width"), CASES)
def test_both_ways(
    tokens: int, hidden: int, ranks: list[int], width: int, dtype: torch.dtype, way: str, device: torch.device
) -> None:
    """With intermediate results in memory full of NaN, of which none is left."""
    case = make(tokens, hidden, ranks, width, dtype)
    assert_close(way, run(case, device), by_the_formula(case), RMS_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "ranks", "width"), CASES)
def test_both_ways_have_the_same_bits(
    tokens: int,
    hidden: int,
    ranks: list[int],
    width: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """So a token that decodes has one result, however long the prompts are that are computed beside it."""
    case = make(tokens, hidden, ranks, width, dtype)
    decoded = run(case, device)
    monkeypatch.setattr(kernels, "MAX_DECODE_TOKENS", 0)
    assert_same_bits(run(case, device), decoded)
    monkeypatch.setattr(kernels, "MAX_DELTA_BYTES", 1)  # the output in as many panels as can be
    assert_same_bits(run(case, device), decoded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype, way: str, device: torch.device) -> None:
    case = make(21, 40, [4, 2, 17], 2, dtype)
    whole = run(case, device)
    for t in (0, 13, 20):
        assert_same_bits(run(case.take(slice(t, t + 1)), device)[0], whole[t])


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "out", "pool"), [(48, 16, 16), (32, 1056, 32)])
def test_other_widths(
    hidden: int, out: int, pool: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input, output and pool of three widths, both ways: right, and the same bits. Ranks beyond those that z holds too."""
    case = make(9, hidden, [5, 131], 1, dtype, out=out, pool=pool)
    decoded = run(case, device)
    assert_close("decode", decoded, by_the_formula(case), RMS_TOLERANCE[dtype])
    monkeypatch.setattr(kernels, "MAX_DECODE_TOKENS", 0)
    torch.testing.assert_close(run(case, device), decoded, rtol=0, atol=0)


def test_masks(way: str, device: torch.device) -> None:
    case = make(11, 24, [18, 18], 2)
    case = replace(case, mask_TXR=(torch.rand(11, 2, 18) > 0.3).float() / 0.7)
    assert_close(way, run(case, device), by_the_formula(case), RMS_TOLERANCE[torch.float32])


@pytest.mark.usefixtures("_poisoned")
def test_gradients_do_not_change_from_run_to_run(device: torch.device) -> None:
    """To the bit, with intermediate results in memory full of NaN."""
    case = trainable(make(40, 20, [9, 0, 21], 2)).on(device)
    grad_TD = torch.randn(40, 20, generator=torch.Generator().manual_seed(0)).to(device)
    first, second = (gradients(lambda c: routed_units(*c.args()), case, grad_TD) for _ in range(2))
    for name in first:
        assert torch.isfinite(first[name]).all(), name
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """On a GPU. Interpreted, the products of tiles are NumPy's, whose order depends on their shape on some processors."""
    rounding = 0.0 if torch.cuda.is_available() else 16 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)


def trainable(case: Case) -> Case:
    """Without the NaN between the rows, which a gradient check would meet; down and up apart."""
    finite = torch.nan_to_num(case.down_SV)
    return replace(case, down_SV=finite, up_SV=finite.clone())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_follows_the_tables(device: torch.device) -> None:
    """Captured once; ids, ranks and scales change in place, as when adapters come and go."""
    case = make(8, 64, [4, 16, 33], 2).on(device)
    run(case, device)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = routed_units(*case.args())
    case.ids_TX.copy_(case.ids_TX.flip(0))
    case.rank_E.copy_(torch.tensor([2, 16, 30]))
    case.scale_E.mul_(2)
    graph.replay()
    torch.testing.assert_close(out.cpu(), run(case, device), rtol=0, atol=0)
