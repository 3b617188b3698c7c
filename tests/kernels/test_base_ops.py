"""The base's own ops on a CPU (`linear`, `linear_argmax`, `moe_experts`, `base_router`, `rms_norm`, `argmax`) against plain
torch in float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels.argmax import argmax
from perft_kernels.base_router import base_router
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import from_panels, linear, to_panels
from perft_kernels.linear_argmax import coarsen, linear_argmax
from perft_kernels.moe_experts import expert_panels, moe_experts
from perft_kernels.rms_norm import rms_norm

# Products of bfloat16 inputs; the result is rounded to bfloat16 once.
TOLERANCE = 4e-3


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", [(32, 16), (33, 48), (1, 16), (96, 160), (3, 5, 64)])
def test_panels_hold_the_weight(shape: tuple[int, ...]) -> None:
    weight = random(*shape[:-1], shape[-1] // 2 * 2)
    assert torch.equal(from_panels(to_panels(weight, HugePages()), weight.shape[-2]), weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 11, 12, 13, 25, 100])  # around the tile of 12
@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (50, 48), (7, 160)])
def test_linear(rows: int, columns: int, tokens: int, bias: bool) -> None:
    weight, x = random(rows, columns), random(tokens, columns, seed=1)
    bias_N = random(rows, seed=2) if bias else None
    got = linear(x, to_panels(weight, HugePages()), bias_N, rows)
    want = F.linear(x.float(), weight.float(), None if bias_N is None else bias_N.float())
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < TOLERANCE


def plain_experts(h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One pair after the other."""
    y = torch.zeros(h.shape)
    for t, k in ((t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1])):
        e = int(ids[t, k])
        if 0 <= e < gate_up.shape[0]:
            gate, up = (gate_up[e].float() @ h[t].float()).chunk(2)
            y[t] += weights[t, k] * (down[e].float() @ (F.silu(gate) * up).bfloat16().float())
    return y


def make(tokens: int, experts: int, top_k: int, hidden: int, inner: int) -> tuple[Tensor, ...]:
    """(h, ids, weights, gate and up, down) as Transformers holds them."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3))
    weights, ids = scores.topk(top_k)
    gate_up = random(experts, 2 * inner, hidden, seed=1) / hidden**0.5
    down = random(experts, hidden, inner, seed=2) / inner**0.5
    return random(tokens, hidden), ids, weights, gate_up, down


@pytest.mark.parametrize("tokens", [1, 8, 13, 60])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inner"), [(4, 2, 64, 96), (32, 4, 48, 40), (1, 1, 16, 2), (5, 5, 32, 34)]
)
def test_moe_experts(tokens: int, experts: int, top_k: int, hidden: int, inner: int) -> None:
    h, ids, weights, gate_up, down = make(tokens, experts, top_k, hidden, inner)
    got = moe_experts(h, ids, weights, *expert_panels(gate_up, down, HugePages()))
    assert relative_error(got, plain_experts(h, ids, weights, gate_up, down)) < TOLERANCE


def test_ids_out_of_range_add_nothing() -> None:
    h, ids, weights, gate_up, down = make(6, 4, 2, 32, 32)
    ids = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, ids, ids * 5 - 7)
    assert ((ids < 0) | (ids >= 4)).any()
    got = moe_experts(h, ids, weights, *expert_panels(gate_up, down, HugePages()))
    want = plain_experts(h, ids, weights, gate_up, down)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    none = moe_experts(h, torch.full_like(ids, -1), weights, *expert_panels(gate_up, down, HugePages()))
    assert not none.any()


def test_a_token_does_not_depend_on_its_neighbours(backend: str) -> None:
    """Bit by bit: alone, and among any number of others, NaN among them."""
    if backend == "torch":
        pytest.skip("a GEMM of torch's sums in an order that depends on the number of its rows")
    h, ids, weights, gate_up, down = make(40, 4, 2, 64, 96)
    h[7] = float("nan")
    panels = expert_panels(gate_up, down, HugePages())
    together = moe_experts(h, ids, weights, *panels)
    projected = linear(h, panels[0][0, 0], None, 96)
    assert together[7].isnan().all()
    for t in (0, 5, 8, 39):
        one = slice(t, t + 1)
        assert torch.equal(moe_experts(h[one], ids[one], weights[one], *panels), together[one])
        assert torch.equal(linear(h[one], panels[0][0, 0], None, 96), projected[one])


def test_large_activations() -> None:
    """SiLU where its exponential overflows or vanishes."""
    h, ids, weights, gate_up, down = make(4, 4, 2, 32, 32)
    got = moe_experts(h * 300, ids, weights, *expert_panels(gate_up, down, HugePages()))
    want = plain_experts(h * 300, ids, weights, gate_up, down)
    assert got.isfinite().all()
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (7, 32, 8), (130, 5, 5)])
def test_base_router(tokens: int, experts: int, top_k: int, norm: bool) -> None:
    h, weight = random(tokens, 48), random(experts, 48, seed=1)
    logits, weights, ids = base_router(h, weight, top_k, norm)
    assert relative_error(logits, h.float() @ weight.float().T) < TOLERANCE
    probs = torch.softmax(logits.float(), -1)
    want = probs.topk(top_k).values
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True) if norm else want)
    torch.testing.assert_close(probs.gather(1, ids), want)  # equally likely ones may come in either order
    assert all(len(set(row)) == top_k for row in ids.tolist())


@pytest.mark.parametrize("shape", [(1, 16), (5, 576), (2, 3, 4, 64)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape) * 5, random(shape[-1], seed=1)
    want = torch.nn.functional.rms_norm(x.float(), shape[-1:], weight.float(), 1e-6)
    assert relative_error(rms_norm(x, weight, 1e-6), want) < TOLERANCE


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000])
def test_argmax(length: int) -> None:
    x = torch.randn(9, length, generator=torch.Generator().manual_seed(length))
    x[1] = -float("inf")
    x[2, length // 2 :] = x[2].max() + 1  # the first of equals
    x[3, -1] = float("nan")
    x[4, 0] = float("inf")
    want = x.max(-1).indices
    want[3] = -1
    assert torch.equal(argmax(x), want)
    assert argmax(x[:0]).shape == (0,)


def chosen(x: Tensor, weight: Tensor) -> Tensor:
    coarse = coarsen(weight, HugePages())
    return linear_argmax(x, to_panels(weight, HugePages()), coarse.q, coarse.bounds, len(weight))


def of_linear(x: Tensor, weight: Tensor) -> Tensor:
    return argmax(linear(x, to_panels(weight, HugePages()), None, len(weight)).float())


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 25])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (31, 48), (50, 160), (3000, 64), (2049, 512)])
def test_linear_argmax(rows: int, columns: int, tokens: int) -> None:
    for seed in range(5):
        weight, x = random(rows, columns, seed=seed), random(tokens, columns, seed=seed + 10)
        assert torch.equal(chosen(x, weight), of_linear(x, weight))


def test_linear_argmax_of_equals_is_the_first(backend: str) -> None:
    """Rows that are equal, or only after rounding, or differ by less than the 8 bits can tell."""
    if backend == "torch":
        pytest.skip("a GEMM of torch's sums in an order that depends on the number of its rows")
    weight, x = random(1, 96).expand(600, 96).clone(), random(7, 96, seed=1)
    assert chosen(x, weight).tolist() == [0] * 7
    shifts = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int16)
    weight = (weight.view(torch.int16) + shifts).view(torch.bfloat16)  # last bits
    assert torch.equal(chosen(x, weight), of_linear(x, weight))
    assert len(set(of_linear(x, weight).tolist())) > 1


def test_linear_argmax_of_unlike_rows() -> None:
    """Scales that differ by orders of magnitude, zeros, one large number among small ones."""
    scale = torch.logspace(-30, 30, 500).unsqueeze(1)
    weight, x = (random(500, 64) * scale).bfloat16(), random(9, 64, seed=1)
    weight[::7] = 0
    weight[3::5, 2] *= 1000
    x[1] = 0
    x[2] *= 1e-30
    x[3, 5] = 1e4
    assert torch.equal(chosen(x, weight), of_linear(x, weight))
    assert torch.equal(chosen(x, -weight.abs()), of_linear(x, -weight.abs()))


def test_linear_argmax_of_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    weight, x = random(200, 32), random(6, 32, seed=1)
    x[0, 3], x[1, 4], x[2, 5] = nan, inf, -inf
    got = chosen(x, weight)
    assert got[0] == -1
    assert torch.equal(got, of_linear(x, weight))
    for number in (nan, inf, -inf, 3e38):
        weight[77] = number
        assert torch.equal(chosen(x, weight), of_linear(x, weight))


def test_few_rows_are_computed_twice(backend: str) -> None:
    """Where nobody computes rows whose 8 bits rule them out, their panels are not read: they may hold anything."""
    if backend == "torch":
        pytest.skip("plain torch computes all of them")
    weight, x = random(3200, 512), random(4, 512, seed=1)
    coarse, panels = coarsen(weight, HugePages()), to_panels(weight, HugePages())
    want = of_linear(x, weight)
    needed = torch.zeros(len(panels), dtype=torch.bool)
    needed[want // 32] = True
    bounds = x.float().norm(dim=-1) * (coarse.bounds[:, 1].max() * 2.2)
    outputs = x.float() @ weight.float().T
    near = outputs > (outputs.amax(-1) - bounds - outputs.amax(-1) / 128).unsqueeze(1)
    needed[near.nonzero()[:, 1] // 32] = True
    assert needed.sum() < 50
    panels[~needed] = float("nan")
    assert torch.equal(linear_argmax(x, panels, coarse.q, coarse.bounds, len(weight)), want)


def test_ops_are_well_formed() -> None:
    h, ids, weights, gate_up, down = make(3, 4, 2, 32, 32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        moe_experts.op, (h, ids, weights, *expert_panels(gate_up, down, HugePages())), test_utils=tests
    )
    torch.library.opcheck(base_router.op, (h, random(4, 32), 2, True), test_utils=tests)
    torch.library.opcheck(argmax.op, (h.float(),), test_utils=tests)
    torch.library.opcheck(rms_norm.op, (h, random(32), 1e-6), test_utils=tests)
    panels, coarse = to_panels(gate_up[0], HugePages()), coarsen(gate_up[0], HugePages())
    torch.library.opcheck(linear.op, (h, panels, None, 64), test_utils=tests)
    torch.library.opcheck(linear_argmax.op, (h, panels, coarse.q, coarse.bounds, 64), test_utils=tests)
