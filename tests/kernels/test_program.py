"""Programs do what the recorded function does, to whatever its inputs hold then, and refuse what they cannot repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import linear, to_panels
from perft_kernels.moe_experts import expert_panels, moe_experts
from perft_kernels.native import Library, library
from perft_kernels.program import Program, RecordingError, Workspace, record
from perft_kernels.rms_norm import rms_norm


@pytest.fixture(autouse=True)
def backend() -> None:
    """There is only one: programs are made of the CPU kernels."""


@pytest.fixture
def kernels() -> Library:
    found = library()
    if found is None:
        pytest.skip("the CPU kernels cannot be compiled here")
    return found


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the engine runs."""
    with torch.inference_mode():
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@dataclass
class Layer:
    """Something like a decoder layer: kernels, rotary embeddings, a residual, an operation that only torch has."""

    tokens: int
    hidden: int = 64
    weight: Tensor = field(init=False)
    experts: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.x = random(self.tokens, self.hidden)
        self.position = torch.arange(self.tokens)
        self.weight = to_panels(random(self.hidden, self.hidden, seed=1) / 8, HugePages())
        gate_up, down = random(4, 96, self.hidden, seed=2) / 8, random(4, self.hidden, 48, seed=3) / 7
        self.experts = expert_panels(gate_up, down, HugePages())
        self.norm = random(self.hidden, seed=4)

    def __call__(self) -> Tensor:
        h = rms_norm(self.x, self.norm, 1e-6)
        q = linear(h, self.weight, None, self.hidden).view(self.tokens, 4, -1).transpose(0, 1)
        angle = self.position.float()[None, :, None] * torch.arange(1, 17).float()
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        half = q.shape[-1] // 2
        turned = q * cos + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * sin
        x = self.x + turned.transpose(0, 1).reshape(self.tokens, -1)
        ids = x.float().softmax(-1)[:, :4].topk(2)[1]
        y = moe_experts(x, ids, torch.full(ids.shape, 0.5), *self.experts)
        return (x + y).float()

    def change(self, seed: int) -> None:
        self.x.copy_(random(self.tokens, self.hidden, seed=seed))
        self.position.copy_(torch.randint(1000, (self.tokens,), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("tokens", [1, 2, 13, 40])
def test_same_bits_for_other_inputs(kernels: Library, tokens: int) -> None:
    layer = Layer(tokens)
    program = record(layer, kernels, Workspace())
    for seed in range(10, 14):
        layer.change(seed)
        assert torch.equal(program.run(), layer())
    layer.x[0, 3] = float("nan")
    assert torch.equal(program.run().isnan(), layer().isnan())


def test_what_the_workspace_held_does_not_matter(kernels: Library) -> None:
    layer, workspace = Layer(5), Workspace()
    program = record(layer, kernels, workspace)
    workspace.buffer.fill_(0xFF)  # NaN, whatever the type
    assert torch.equal(program.run(), layer())


def test_programs_share_a_workspace_that_grows(kernels: Library) -> None:
    workspace = Workspace()
    layers = [Layer(tokens) for tokens in (2, 30, 7)]
    programs = [record(layer, kernels, workspace) for layer in layers]
    for seed in range(3):
        for layer, program in zip(layers, programs, strict=True):
            layer.change(seed)
            assert torch.equal(program.run(), layer())


def test_intermediate_results_share_memory(kernels: Library) -> None:
    x = torch.ones(1 << 16)

    def chain() -> Tensor:
        y = x
        for _ in range(50):
            y = y + x
        return y

    workspace = Workspace()
    assert torch.equal(record(chain, kernels, workspace).run(), torch.full_like(x, 51))
    assert workspace.buffer.nbytes <= 3 * x.nbytes


def strided(x: Tensor) -> list[Callable[[], Tensor]]:
    """Small operations over tensors of any layout; x is [6, 5, 4, 34]."""
    other = random(*x.shape, seed=9)
    row, column = random(34, seed=8), random(6, 1, 4, 1, seed=7)
    return [
        lambda: x + other,
        lambda: x - other.float(),
        lambda: x * row,
        lambda: (x * column).transpose(0, 2) + other.transpose(0, 2),
        lambda: -x[:, ::2, 1:, 1::3],
        lambda: x.permute(3, 1, 0, 2).contiguous(),
        lambda: torch.cat((x[..., :7], other, -x[..., 3:5]), dim=-1),
        lambda: torch.cat((x[:2], other, x[1:1]), dim=0).float(),
        lambda: x.transpose(1, 3).reshape(6, -1) + 0.0,
        lambda: (x[0, 0, 0, 0] + x).to(torch.float32).bfloat16(),
        lambda: (x.float() * 1.5).clone().add_(other).mul_(row),
        lambda: torch.zeros_like(x).copy_(other.transpose(2, 1).transpose(1, 2)),
        lambda: x.flatten()[torch.arange(0, 600, 7)] * 2,
        lambda: x.sum((0, 1)) + x[:0].sum(),
    ]


@pytest.mark.parametrize("index", range(14))
def test_small_operations(kernels: Library, index: int) -> None:
    x = random(6, 5, 4, 34)
    function = strided(x)[index]
    program = record(function, kernels, Workspace())
    x.copy_(random(6, 5, 4, 34, seed=1))
    assert torch.equal(program.run(), function())


def test_loops_of_small_operations_need_no_python(kernels: Library) -> None:
    x, y = random(4, 32), random(4, 32, seed=1)

    def loop() -> Tensor:
        z = x
        for _ in range(20):
            z = torch.cat((-z[:, 16:], z[:, :16] * y[:, :16] - y[:, 16:]), dim=1) + x
        return z.float()

    assert record(loop, kernels, Workspace()).num_torch_calls == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum() + x,
        lambda x: x.nonzero().float(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + torch.randn(3),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: x,
    ],
)
def test_what_cannot_be_repeated_is_refused(kernels: Library, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with pytest.raises(RecordingError):
        record(lambda: function(x), kernels, Workspace())


def test_a_replay_that_differs_is_refused(kernels: Library) -> None:
    count, x = torch.zeros(4), torch.ones(4)

    def counts() -> Tensor:
        count.add_(x)  # writes what depends on what it finds
        return count + x

    with pytest.raises(RecordingError, match="another"):
        record(counts, kernels, Workspace())


def test_inputs_live_as_long_as_the_program(kernels: Library) -> None:
    def make() -> Program:
        layer = Layer(9)
        return record(layer, kernels, Workspace())

    program, expected = make(), Layer(9)()
    held = [torch.full((1 << 14,), float("nan")) for _ in range(50)]
    assert torch.equal(program.run(), expected)
    assert len(held) == 50
