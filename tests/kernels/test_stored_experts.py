"""`stored_experts` against a loop over pairs, in plain torch and in Triton."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perft_kernels.moe_experts import stored_experts

BACKENDS = ("torch", "triton")
pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
# Relative RMS error; what is rounded to the dtype are the activations and the output.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GPU_ONLY = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter is wrong in it"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Random experts; weights as Transformers stores them."""

    num_experts: int = 5
    top_k: int = 3
    hidden: int = 48
    inner: int = 40
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    dtype: torch.dtype = torch.float32

    def weights(self) -> dict[str, Any]:
        g = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

        gate_up, down = (
            random(self.num_experts, 2 * self.inner, self.hidden),
            random(self.num_experts, self.hidden, self.inner),
        )
        if self.transposed:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        biases = (random(self.num_experts, 2 * self.inner), random(self.num_experts, self.hidden))
        found: dict[str, Any] = {"gate_up": gate_up, "down": down}
        found |= dict(zip(("gate_up_bias", "down_bias"), biases if self.bias else (None, None), strict=True))  # type: ignore[arg-type]
        return {name: t if t is None else t.to(self.dtype) for name, t in found.items()}

    def inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """h, ids (one in five of them out of range), weights."""
        g = torch.Generator().manual_seed(2)
        ids = torch.rand(num_tokens, self.num_experts, generator=g).argsort(1)[:, : self.top_k]
        out_of_range = torch.tensor([-1, self.num_experts, -(2**40)])[torch.randint(3, ids.shape, generator=g)]
        ids = torch.where(torch.rand(ids.shape, generator=g) < 0.2, out_of_range, ids)
        h = torch.randn(num_tokens, self.hidden, generator=g).to(self.dtype)
        return h, ids, torch.rand(num_tokens, self.top_k, generator=g).to(self.dtype)

    def run(self, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device, **changed: Tensor) -> Tensor:
        weights = [None if t is None else t.to(device) for t in (self.weights() | changed).values()]
        settings = (self.transposed, self.interleaved, self.alpha, self.limit)
        y: Tensor = stored_experts(*(t.to(device) for t in inputs), *weights, *settings)
        return y.cpu()

    def plain(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One pair after the other."""
        w: dict[str, Any] = {name: None if t is None else t.float() for name, t in self.weights().items()}
        y = torch.zeros(h.shape)
        for t, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
            e = int(ids[t, k])
            if not 0 <= e < self.num_experts:
                continue
            gate_up, down = (w[name][e].T if self.transposed else w[name][e] for name in ("gate_up", "down"))
            both = gate_up @ h[t].float()
            if self.bias:
                both = both + w["gate_up_bias"][e]
            gate, up = (both[::2], both[1::2]) if self.interleaved else both.chunk(2)
            if self.limit:
                gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
                a = (up + 1) * gate * torch.sigmoid(self.alpha * gate)
            else:
                a = gate * torch.sigmoid(gate) * up
            out = down @ a.to(self.dtype).float()
            y[t] += weights[t, k].float() * (out + w["down_bias"][e] if self.bias else out)
        return y


GPT_OSS = Case(transposed=True, interleaved=True, bias=True, alpha=1.702, limit=0.5)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_ONLY])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 37])
@pytest.mark.parametrize(
    "case", [Case(), GPT_OSS, Case(interleaved=True, bias=True)], ids=["plain", "gpt-oss", "mixed"]
)
def test_against_a_loop(case: Case, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    case = replace(case, dtype=dtype)
    inputs = case.inputs(num_tokens)
    got = case.run(inputs, device)
    assert got.dtype == dtype
    assert got.shape == inputs[0].shape
    if num_tokens:
        assert error(got, case.plain(*inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden", "inner", "num_tokens"),
    [(1, 1, 16, 2, 40), (33, 2, 130, 65, 5), (4, 4, 1100, 33, 3), (3, 2, 24, 20, 300)],
    ids=["all-to-one", "most-unused", "wide", "large-tiles"],
)
def test_sizes(num_experts: int, top_k: int, hidden: int, inner: int, num_tokens: int, device: torch.device) -> None:
    case = Case(num_experts=num_experts, top_k=top_k, hidden=hidden, inner=inner)
    inputs = case.inputs(num_tokens)
    assert error(case.run(inputs, device), case.plain(*inputs)) < TOLERANCE[torch.float32]


def test_a_base_expert_that_nobody_chose_is_not_read(device: torch.device) -> None:
    case = Case()
    h, ids, weights = case.inputs(9)
    ids = torch.where(ids == 2, 1, ids)
    poisoned = case.weights()
    poisoned["gate_up"][2], poisoned["down"][2] = float("nan"), float("nan")
    assert case.run((h, ids, weights), device, **poisoned).isfinite().all()


def test_nothing_chosen_gives_zero(device: torch.device) -> None:
    h, ids, weights = GPT_OSS.inputs(3)
    assert not GPT_OSS.run((h, torch.full_like(ids, -1), weights), device).any()


def test_a_token_does_not_depend_on_its_neighbours(backend: str, device: torch.device) -> None:
    """Bit by bit: alone, and among any number of others, NaN among them. (Interpreted, the products of tiles are NumPy's, whose
    order depends on their shape on some processors.)
    """
    if backend == "torch":
        pytest.skip("a GEMM of torch's sums in an order that depends on the number of its rows")
    case = Case()
    h, ids, weights = case.inputs(60)
    h[7], ids[7, 0] = float("nan"), 1
    together = case.run((h, ids, weights), device)
    assert together[7].isnan().all()
    assert together[torch.arange(60) != 7].isfinite().all()
    rounding = 16 * torch.finfo(together.dtype).eps if backend == "triton" and device.type == "cpu" else 0.0
    for some in ([0], [8, 9, 10, 11], [59], [t for t in range(60) if t != 7]):
        apart = case.run((h[some], ids[some], weights[some]), device)
        torch.testing.assert_close(apart, together[some], rtol=rounding, atol=rounding)


def test_large_activations(device: torch.device) -> None:
    """SiLU where its exponential overflows or vanishes."""
    case = Case()
    h, ids, weights = case.inputs(4)
    inputs = (h * 1000, ids, weights)
    assert error(case.run(inputs, device), case.plain(*inputs)) < TOLERANCE[torch.float32]


def test_the_op_is_well_formed(device: torch.device) -> None:
    case = GPT_OSS
    inputs = [t.to(device) for t in case.inputs(2)]
    weights = [None if t is None else t.to(device) for t in case.weights().values()]
    torch.library.opcheck(
        stored_experts.op, (*inputs, *weights, True, True, 1.7, 0.5), test_utils=("test_schema", "test_faketensor")
    )
