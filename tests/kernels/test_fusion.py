"""Steps whose operations are put together: what is found, what is left alone, and that the results are the same to the bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as rotate_halves
from transformers.models.olmoe.modeling_olmoe import apply_rotary_pos_emb as rotate_whole

from perft_kernels.fusion import FusedStep, fuse
from perft_kernels.paged_attention import kv_write, paged_attention
from perft_kernels.rms_norm import rms_norm

BACKENDS = ("torch",)
T, D, HEADS, GROUPS, C = 3, 32, 4, 2, 8
SIZES = (HEADS * C, GROUPS * C, GROUPS * C)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(kw_only=True)
class Layer:
    """A decoder layer's attention as Transformers' models write it, between two norms."""

    norm: str = "row"
    rotate: Callable[..., tuple[Tensor, Tensor]] = rotate_whole
    together: bool = True
    bias: bool = False
    clamp: bool = False
    angle_of_k: int = 0
    x: Tensor = field(default_factory=lambda: random(1, T, D, seed=0))
    pages: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.weights = random(sum(SIZES), D, seed=1).split(SIZES)
        self.biases: list[Any] = list(random(sum(SIZES), seed=2).split(SIZES)) if self.bias else [None] * 3
        if not self.together:
            self.weights = tuple(weight.clone() for weight in self.weights)
        self.q_weight, self.k_weight = (
            (random(C, seed=3), random(C, seed=4)) if self.norm == "head" else (random(n, seed=3) for n in SIZES[:2])
        )
        self.weight = random(D, seed=5)
        width = C if self.rotate is rotate_whole else C // 2
        self.angles = random(2, 1, T, C // 2, seed=6).repeat(1, 1, 1, width * 2 // C)
        self.pages = tuple(torch.zeros(2, 16, GROUPS, C) for _ in range(2))
        self.slots, self.positions = torch.tensor([16, 17, 18]), torch.arange(T)
        self.table, self.rows = torch.tensor([[1]]), torch.zeros(T, dtype=torch.int64)

    def step(self) -> tuple[Tensor, Tensor]:
        """(residual stream, its norm) after the attention."""
        x = self.x * 1.0
        normed = rms_norm(x, self.weight, 1e-6)
        q, k, v = (F.linear(normed, w, b) for w, b in zip(self.weights, self.biases, strict=True))
        if self.norm == "row":
            q, k = rms_norm(q, self.q_weight, 1e-5), rms_norm(k, self.k_weight, 1e-5)
        if self.clamp:
            q.clamp_(-1.0, 1.0)
        q, k, v = (t.view(1, T, -1, C) for t in (q, k, v))
        if self.norm == "head":
            q, k = rms_norm(q, self.q_weight, 1e-5), rms_norm(k, self.k_weight, 1e-5)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        turned = [self.rotate(q, k, angle.cos(), angle.sin()) for angle in self.angles]
        q, k = turned[0][0], turned[self.angle_of_k][1]
        k_pages, v_pages = self.pages
        kv_write(k[0].transpose(0, 1), v[0].transpose(0, 1), k_pages, v_pages, self.slots)
        out = paged_attention(
            *(q[0].transpose(0, 1), k_pages, v_pages, self.table, self.rows, self.positions),
            *((T,), (T,), (0,), 0.3),
        )
        x = x + out.unsqueeze(0).reshape(1, T, -1)
        return x, rms_norm(x, self.weight, 1e-6)


@torch.inference_mode()
def assert_same(layer: Layer) -> list[str]:
    """Fused, a layer gives what it gives by itself, on other input too; the names of the operations."""
    fused = fuse(layer.step)
    for seed in (0, 7):
        layer.x.copy_(random(1, T, D, seed=seed))
        got = fused()
        got_pages = [page.clone() for page in layer.pages]
        for page in layer.pages:
            page.zero_()
        want = layer.step()
        assert all(torch.equal(a, b) for a, b in zip((*got, *got_pages), (*want, *layer.pages), strict=True))
    return fused.names


ALL = ["rms_norm", "linears", "rotate_and_write", "paged_attention", "add_rms_norm"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotate", [rotate_whole, rotate_halves], ids=["whole", "halves"])
@pytest.mark.parametrize("norm", ["none", "row", "head"])
def test_all_that_can_be_is_put_together(norm: str, rotate: Any, bias: bool) -> None:
    names = assert_same(Layer(norm=norm, rotate=rotate, bias=bias))
    assert [name for name in names if "::" not in name] == ALL
    assert {name for name in names if "::" in name} <= {"aten::mul", "aten::cos", "aten::sin", "aten::repeat"}
    assert names.count("aten::mul") == 1


def test_weights_that_lie_apart_are_left_apart() -> None:
    names = assert_same(Layer(together=False))
    assert names.count("aten::linear") == 3
    assert "rotate_and_write" in names


def test_what_is_written_to_in_place_is_left_alone() -> None:
    names = assert_same(Layer(clamp=True, norm="none"))
    assert names.count("aten::linear") == 1, "keys and values may go together"
    assert "rotate_and_write" not in names
    assert {"aten::clamp_", "kv_write", "linears", "add_rms_norm"} <= set(names)


def test_angles_of_queries_that_are_not_those_of_keys() -> None:
    names = assert_same(Layer(angle_of_k=1))
    assert "rotate_and_write" not in names
    assert "kv_write" in names


def test_another_rotation_is_left_alone() -> None:
    def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            first, second = x[..., : C // 2], x[..., C // 2 :]
            return x * cos.unsqueeze(1) + torch.cat([second, -first], dim=-1) * sin.unsqueeze(1)

        return turn(q), turn(k)

    backwards_layer = Layer()
    backwards_layer.rotate = backwards
    assert "kv_write" in assert_same(backwards_layer)


def run(step: Callable[[], Any]) -> tuple[FusedStep, Any]:
    with torch.inference_mode():
        fused = fuse(step)
        return fused, fused()


def test_a_sum_that_is_weighted_is_no_sum() -> None:
    a, b, weight = random(2, 8, seed=0), random(2, 8, seed=1), random(8, seed=2)
    fused, got = run(lambda: rms_norm(torch.add(a * 1, b * 1, alpha=2), weight, 1e-6))
    assert "add_rms_norm" not in fused.names
    assert torch.equal(got, rms_norm(a + 2 * b, weight, 1e-6))


def test_a_gated_mlp() -> None:
    x, both = random(1, 3, 8, seed=0), random(24, 8, seed=1)
    gate, up = both.chunk(2)

    def step() -> Tensor:
        h = x * 1
        return F.silu(F.linear(h, gate)) * F.linear(h, up)

    fused, got = run(step)
    assert fused.names == ["aten::mul", "linears", "silu_mul"]
    torch.testing.assert_close(got, step())


def test_order_of_writes_and_reads_stays() -> None:
    a = random(4, seed=0)

    def step() -> tuple[Tensor, Tensor]:
        x = a * 2
        before = x + 1
        x.add_(1)
        x[1:].mul_(3)
        unused = x * 5
        return before, x - unused.mul_(0)

    fused, got = run(step)
    assert all(torch.equal(g, w) for g, w in zip(got, step(), strict=True))
    assert fused.names.count("aten::mul_") == 2


def test_what_nobody_wants_is_left_out() -> None:
    a = random(4, seed=0)

    def step() -> Tensor:
        _ = (a * 3).exp()
        return a + 1

    assert run(step)[0].names == ["aten::add"]


def test_values_that_are_read_back_stay_to_be_refused() -> None:
    """Who captures the step cannot do that."""
    fused, _ = run(lambda: torch.ones(3) * float(torch.ones(1) + 1))
    assert "aten::item" in fused.names


def test_memory_is_given_back_while_it_runs() -> None:
    refs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    a = torch.zeros(1 << 10)

    class Counting(TorchDispatchMode):
        """How many results there are at once."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            refs.append(weakref.ref(result))
            alive.append(sum(ref() is not None for ref in refs))
            return result

    def step() -> Tensor:
        x = a
        for _ in range(20):
            x = x + 1
        return x

    with torch.inference_mode():
        fused = fuse(step)
        with Counting():
            fused()
    assert max(alive) <= 3
