"""The base's own ops on a CPU (`linear`, `moe_experts`, `base_router`, `rms_norm`, `argmax`) against plain torch in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels.argmax import argmax
from perft_kernels.base_router import base_router
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import from_panels, linear, to_panels
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


def test_ops_are_well_formed() -> None:
    h, ids, weights, gate_up, down = make(3, 4, 2, 32, 32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        moe_experts.op, (h, ids, weights, *expert_panels(gate_up, down, HugePages())), test_utils=tests
    )
    torch.library.opcheck(base_router.op, (h, random(4, 32), 2, True), test_utils=tests)
    torch.library.opcheck(argmax.op, (h.float(),), test_utils=tests)
    torch.library.opcheck(rms_norm.op, (h, random(32), 1e-6), test_utils=tests)
    torch.library.opcheck(linear.op, (h, to_panels(gate_up[0], HugePages()), None, 64), test_utils=tests)
