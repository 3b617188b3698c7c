"""The launches of the Triton ops can be captured and replayed: nothing is read back, and nothing that changes from step to
step is a number of Python's. On a CPU, with `frozen_step` for the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen_step import FrozenStep
from torch import Tensor

from perft_kernels.linear import stored_linear
from perft_kernels.moe_experts import stored_experts
from perft_kernels.paged_attention import kv_write, paged_attention

BACKENDS = ("triton",)


@pytest.fixture(autouse=True)
def frozen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> FrozenStep:
    """A step that takes an interpreted launch as one call."""
    if device.type != "cpu":
        pytest.skip("bench/gpu captures the whole step")
    from triton.runtime.interpreter import GridExecutor

    frozen, launch = FrozenStep(), GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        if frozen.is_capturing:
            frozen.whole(lambda *args, **kwargs: launch(self, *args, **kwargs), args, kwargs)
        else:
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    return frozen


def assert_replays(frozen: FrozenStep, step: Callable[[], Tensor], change: Callable[[], None]) -> None:
    """Captured on one input and replayed on another, a step gives what it gives there by itself."""
    with torch.inference_mode():
        with frozen:
            output = step()
        change()
        frozen.replay()
        assert torch.equal(output, step())


def test_stored_experts(frozen: FrozenStep) -> None:
    g = torch.Generator().manual_seed(0)
    h, ids, weights = torch.randn(5, 32, generator=g), torch.full((5, 2), -1), torch.rand(5, 2, generator=g)
    gate_up, down = torch.randn(4, 48, 32, generator=g), torch.randn(4, 32, 24, generator=g)

    def change() -> None:
        h.normal_(generator=g)
        ids.copy_(torch.randint(4, (5, 2), generator=g))

    arguments = (h, ids, weights, gate_up, down, None, None, False, False, 1.0, 0.0)
    assert_replays(frozen, lambda: stored_experts(*arguments), change)


def test_stored_linear(frozen: FrozenStep) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(5, 32, generator=g), torch.randn(40, 32, generator=g), torch.randn(40, generator=g)

    def change() -> None:
        x.normal_(generator=g)

    assert_replays(frozen, lambda: stored_linear(x, weight, bias), change)


def test_paged_attention(frozen: FrozenStep) -> None:
    """Captured at the first position of page 0, replayed deep in other pages."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 2, 16, generator=g), torch.randn(2, 1, 16, generator=g), torch.randn(2, 1, 16, generator=g)
    pages = [torch.randn(20, 16, 1, 16, generator=g) for _ in range(2)]
    table, position, slot = (
        torch.zeros(2, 18, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2).long(),
    )

    def step() -> Tensor:
        kv_write(k, v, pages[0], pages[1], slot)
        return paged_attention(
            q, pages[0], pages[1], table, rows, position, (1, 1), (1, 1), (0, 0), scale=0.25, long_Q3=none
        )

    rows, none = torch.arange(2), torch.zeros(0, 3, dtype=torch.int64)

    def change() -> None:
        q.normal_(generator=g)
        table.copy_(torch.stack([torch.arange(1, 19), torch.arange(18, 0, -1)]))
        position.copy_(torch.tensor([280, 3]))
        slot.copy_(table[[0, 1], position // 16] * 16 + position % 16)

    assert_replays(frozen, step, change)
