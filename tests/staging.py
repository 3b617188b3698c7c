"""A small base without a model, adapters for it on disk, arenas and stores: what the tests of `perft_serve.adapters` share."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from tiny import random_adapter

from perft import PerftConfig
from perft.adapter import Adapter, read_adapter
from perft.moe import MoeBlock
from perft_serve.adapters.arena import AdapterArena
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterStatus, Lease
from perft_serve.adapters.store import AdapterStore

HIDDEN = 16
BLOCKS = tuple(
    MoeBlock(
        layer=2 * l,
        name=f"model.layers.{2 * l}.mlp.experts",
        hidden_size=HIDDEN,
        num_experts=4,
        top_k=2,
        norm_topk=True,
    )
    for l in range(3)
)
CONFIGS = {
    "r": {"variant": "R", "r": 4, "num_experts": 5, "top_k": 2},
    "r-one": {"variant": "R", "r": 1, "num_experts": 3, "top_k": 1},
    "e": {"variant": "E", "r": 2, "unit": "parallel"},
    "d": {"variant": "D", "r": 3, "num_experts": 3},
    "s": {"variant": "S", "r": 7},
    "s-last": {"variant": "S", "r": 6, "layers_to_transform": [4]},
    "s-wide": {"variant": "S", "r": 13, "layers_to_transform": [4]},
}


def make_adapter(folder: Path, kind: str = "s", seed: int = 0) -> str:
    """An adapter folder of one of `CONFIGS`; returns its path."""
    return str(random_adapter(folder, PerftConfig(**CONFIGS[kind]), BLOCKS, seed))  # type: ignore[arg-type]


def read(source: str) -> Adapter:
    """The adapter in a folder."""
    return read_adapter(source, BLOCKS)


def make_arena(num_rows: int, dtype: torch.dtype = torch.float32) -> AdapterArena:
    """An arena of so many rows, zeroed, so that tests can see what was wiped."""
    arena = AdapterArena(BLOCKS, num_rows * HIDDEN * dtype.itemsize, dtype, torch.device("cpu"))
    arena.rows_SD.zero_()
    return arena


def num_rows(kind: str) -> int:
    """What an adapter of a kind takes, counted by hand."""
    return {"r": 3 * (40 + 5), "r-one": 3 * (6 + 3), "e": 3 * 16, "d": 3 * 18, "s": 3 * 14, "s-last": 12, "s-wide": 26}[
        kind
    ]


def assert_is_in(arena: AdapterArena, slot: int, adapter: Adapter) -> None:
    """The tables lead to the adapter's own rows, byte for byte."""
    kind, num_experts, top_k, _, _, first = arena.rule_A6[slot].tolist()
    assert num_experts == adapter.num_experts
    assert kind == {"S": 0, "D": 0, "R": 1, "E": 2}[adapter.config.variant]
    assert top_k == (adapter.config.top_k or 0)
    experts = slice(first, first + num_experts)
    assert torch.equal(arena.scale_E[experts], torch.full((num_experts,), adapter.config.scale))
    assert bool((arena.silu_E[experts] == (adapter.config.unit == "parallel")).all())
    for l, block in enumerate(arena.blocks):
        layer = adapter.layers.get(block.layer)
        if layer is None:
            assert not arena.rank_LE[l, experts].any()
            assert arena.gate_row_LA[l, slot] == -1
            continue
        assert arena.rank_LE[l, experts].tolist() == [adapter.config.r] * num_experts
        for e in range(num_experts):
            for row_LE, rows_MRD in ((arena.down_row_LE, layer.down_MRD), (arena.up_row_LE, layer.up_MRD)):
                row = int(row_LE[l, first + e])
                assert torch.equal(arena.rows_SD[row : row + adapter.config.r], rows_MRD[e].to(arena.rows_SD.dtype))
        gate = int(arena.gate_row_LA[l, slot])
        if layer.gate_MD is None:
            assert gate == -1
        else:
            assert torch.equal(arena.rows_SD[gate : gate + num_experts], layer.gate_MD.to(arena.rows_SD.dtype))


def assert_zero_outside(arena: AdapterArena, slots: list[int]) -> None:
    """No row but those of these adapters holds anything."""
    free_S = torch.ones(arena.num_rows, dtype=torch.bool)
    for slot in slots:
        for start, length in arena.runs_of(slot):
            assert bool(free_S[start : start + length].all()), "two adapters in one row"
            free_S[start : start + length] = False
    assert not arena.rows_SD[free_S].any()


class Driven:
    """A store with loaders of its own, stepped as an engine does."""

    def __init__(self, num_rows: int, host_bytes: int = 1 << 20) -> None:
        self.arena = make_arena(num_rows)
        self.woken = threading.Event()
        self.store = AdapterStore(self.arena, host_bytes=host_bytes, wake=self.woken.set)
        self.mirror: dict[tuple[str, int], AdapterStatus] = {}

    def settle(self) -> None:
        """Step until nothing more happens by itself."""
        while True:
            self.woken.clear()
            self.store.poll()
            if self.store._loading or self.store.has_work():
                assert self.woken.wait(30)
            else:
                break
        self.look()

    def look(self) -> None:
        """Take the updates in."""
        for status in self.store.updates():
            self.mirror[status.name, status.version] = status

    def status(self, ref: AdapterRef) -> AdapterStatus:
        """What the updates say of a ref."""
        self.look()
        return self.mirror[ref.name, ref.version]

    def run(self, ref: AdapterRef) -> Lease:
        """Enter, and acquire when it is loaded."""
        self.store.enter(ref)
        self.settle()
        lease = self.store.acquire(ref)
        assert isinstance(lease, Lease), lease
        return lease

    def end(self, lease: Lease) -> None:
        """The request is over."""
        self.store.release(lease)
        self.store.leave(lease.ref)

    def use(self, ref: AdapterRef) -> None:
        """A request from beginning to end."""
        self.end(self.run(ref))
