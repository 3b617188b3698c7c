"""Thousands of random steps on the whole engine but the model: nothing leaks, nobody is forgotten, every token is right.

The model is replaced by arithmetic that depends on all that a model's tokens depend on: every token before, read through the
pages of the KV cache as they are in memory, and every row of the adapter, read from the arena. So a page shared wrongly,
handed out too early or not cleared, and an adapter that is not whole, moved or somebody else's, make a wrong token.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from driving import Output, request
from tiny import random_adapter, tiny_model

from perft import PerftConfig
from perft.adapter import read_adapter
from perft.errors import AdapterError
from perft.moe import MoeBlock, find_moe_blocks
from perft_serve.adapters.arena import AdapterArena
from perft_serve.adapters.catalog import AdapterCatalog
from perft_serve.engine import scheduler
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.scheduler import ChunkResult, Plan
from perft_serve.engine.sequence import Sequence

VOCAB_SIZE = 1000
NUM_PAGES = 14
PAGE_SIZE = 4
BASE = "the base"


def mix(state: bytes, token_id: int, weights: str) -> bytes:
    """The state after a token: what a model's keys and values are."""
    return hashlib.blake2b(state + f"/{token_id}/{weights}".encode(), digest_size=8).digest()


def token(state: bytes) -> int:
    """The token that follows a state."""
    return int.from_bytes(state, "little") % VOCAB_SIZE


def rows_digest(rows_SD: torch.Tensor) -> str:
    return hashlib.blake2b(rows_SD.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


@dataclass
class ArithmeticStep:
    """A plan whose states are computed, and what comes of it."""

    plan: Plan
    tokens: dict[Sequence, int] = field(default_factory=dict)
    computed_at: float = 0.0


class ArithmeticRunner:
    """Stands where the engine's runner stands."""

    blocks: tuple[MoeBlock, ...]

    def __init__(self, config: EngineConfig) -> None:
        self.arena = AdapterArena(self.blocks, config.adapter_memory, torch.float32, torch.device("cpu"))
        self.num_pages = NUM_PAGES
        self.vocab_size = VOCAB_SIZE
        self.max_position_embeddings = None
        self.eos_token_ids = frozenset({0})
        self.base_digest = "arithmetic"
        self.runs_ahead = config.async_scheduling == "on"
        self.num_ahead = 0
        self._states: dict[tuple[int, int], bytes] = {}  # by page and place in it

    def launch(self, plan: Plan, after: ArithmeticStep | None = None) -> ArithmeticStep:
        assert len(set(plan.new_pages)) == len(plan.new_pages)
        for page in plan.new_pages:
            for place in range(PAGE_SIZE):
                self._states.pop((page, place), None)
        step = ArithmeticStep(plan)
        self.num_ahead += after is not None
        for chunk in plan.chunks:
            seq = chunk.seq
            weights = BASE if seq.adapter_slot == -1 else self._weights(seq.adapter_slot)
            for position in range(chunk.start, chunk.end):
                is_known = position < len(seq.token_ids)
                assert is_known == (after is None)
                token_id = seq.token_ids[position] if after is None else after.tokens[seq]
                state = mix(self._state(seq.pages, position - 1), token_id, weights)
                self._states[seq.pages[position // PAGE_SIZE], position % PAGE_SIZE] = state
            if chunk.samples:
                step.tokens[seq] = token(state)
        return step

    def collect(self, step: ArithmeticStep) -> list[ChunkResult]:
        return [ChunkResult(token_id=step.tokens.get(chunk.seq)) for chunk in step.plan.chunks]

    def _state(self, pages: list[int], position: int) -> bytes:
        return self._states[pages[position // PAGE_SIZE], position % PAGE_SIZE] if position >= 0 else b""

    def _weights(self, slot: int) -> str:
        runs = self.arena._residents[slot].runs
        return rows_digest(torch.cat([self.arena.rows_SD[start : start + length] for start, length in runs]))


@dataclass(kw_only=True)
class Sources:
    """Adapters on disk, small and large; path to a digest of their rows. One that is not there has none."""

    weights: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def blocks() -> tuple[MoeBlock, ...]:
    return tuple(find_moe_blocks(tiny_model("mixtral")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, blocks: tuple[MoeBlock, ...]) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    arena = AdapterArena(blocks, 1 << 20, torch.float32, torch.device("cpu"))
    found = Sources()
    for i in range(10):
        config = (
            PerftConfig(variant="S", r=1 + i) if i % 2 else PerftConfig(variant="R", r=1 + i, num_experts=2, top_k=1)
        )
        path = random_adapter(folder / str(i), config, blocks, seed=i)
        found.weights[str(path)] = rows_digest(arena.stage(read_adapter(path, blocks)).rows_SD)
    return found


class Crowd:
    """Clients that submit, hang up, register, delete, warm and pin, at random."""

    def __init__(self, engine: Engine, sources: Sources, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.sources = sources
        self.catalog = AdapterCatalog()
        self.outputs: dict[str, Output] = {}
        self.open: dict[str, tuple[tuple[int, ...], str]] = {}  # prompt, source or BASE
        self.num_right = 0
        self.num_cached = 0
        self._prefix = [self.rng.randrange(1, VOCAB_SIZE) for _ in range(24)]
        self._names = [f"n{i}" for i in range(8)]

    def submit(self) -> None:
        rng = self.rng
        key = f"q{len(self.outputs)}"
        names = [name for name in self._names if name in self.catalog]
        ref = self.catalog.resolve(rng.choice(names)) if names and rng.random() < 0.85 else None
        tail = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 6))]
        prompt = (*self._prefix[: rng.choice((0, 3, 8, 17, 24))], *tail)
        one = request(key, prompt, ref, scope=rng.choice(("", "s")), max_tokens=rng.randint(1, 20), logprobs=None)
        self.engine.submit(one)
        self.outputs[key] = Output()
        self.open[key] = (prompt, BASE if ref is None else ref.source)

    def hang_up(self) -> None:
        if self.open:
            key = self.rng.choice([*self.open])
            self.engine.abort(key)
            del self.open[key]

    def register(self) -> None:
        """A new name or a new version; the source may be of another name's, or not there."""
        source = self.rng.choice([*self.sources.weights, "/nowhere"])
        ref = self.catalog.register(self.rng.choice(self._names), source)
        self.engine.retire(ref.name, ref.version - 1)

    def delete(self) -> None:
        name = self.rng.choice(self._names)
        if name in self.catalog:
            self.engine.retire(name, self.catalog.remove(name).version, force=self.rng.random() < 0.5)

    def warm(self) -> None:
        name = self.rng.choice(self._names)
        if name in self.catalog:
            with contextlib.suppress(AdapterError):  # it cannot be pinned
                self.engine.warm(self.catalog.resolve(name), pin=self.rng.random() < 0.2)

    def step(self) -> None:
        for event in self.engine.step():
            assert event.request_id in self.open, "an event after the last one, or after an abort"
            self.outputs[event.request_id].add(event)
            if event.finish_reason is not None:
                self._check(event.request_id)
        stats = self.engine.stats()
        assert stats.num_running + stats.num_waiting == len(self.open)

    def _check(self, key: str) -> None:
        prompt, source = self.open.pop(key)
        output = self.outputs[key]
        if output.finish_reason == "error":
            assert output.error is not None
            if "was deleted" not in output.error:
                assert source == "/nowhere" or "bytes of adapter memory" in output.error, output.error
            return
        state, weights = b"", BASE if source == BASE else self.sources.weights[source]
        for token_id in prompt:
            state = mix(state, token_id, weights)
        for token_id in output.token_ids:
            assert token_id == token(state), f"{key} has a wrong token"
            state = mix(state, token_id, weights)
        self.num_right += 1
        self.num_cached += output.num_cached_tokens or 0

    def finish(self) -> None:
        """Until nobody is left."""
        while self.open:
            if not self.engine.has_work():
                assert self.engine.wait(30), f"{sorted(self.open)} are forgotten"
            self.step()


@pytest.mark.parametrize("async_scheduling", ["on", "off"])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_left_and_every_token_is_right(
    blocks: tuple[MoeBlock, ...], sources: Sources, seed: int, async_scheduling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ArithmeticRunner, "blocks", blocks, raising=False)
    monkeypatch.setattr("perft_serve.engine.engine.Runner", ArithmeticRunner)
    if seed % 2:
        monkeypatch.setattr(scheduler, "MAX_PASSED_OVER", 3)
        monkeypatch.setattr(scheduler, "MAX_LOOKS", 6)
    config = EngineConfig(
        model="none",
        adapter_memory=(60, 120, 400)[seed % 3] * 32 * 4,
        host_adapter_memory=(100, 300)[seed % 2] * 32 * 4,
        page_size=PAGE_SIZE,
        max_num_seqs=6,
        max_num_batched_tokens=13,
        async_scheduling=async_scheduling,
    )
    engine = Engine(config)
    crowd = Crowd(engine, sources, seed)
    actions = {crowd.submit: 0.35, crowd.hang_up: 0.06, crowd.register: 0.03, crowd.delete: 0.02, crowd.warm: 0.03}
    for num_steps in itertools.count():
        # how many requests end well depends on how fast threads read adapters
        if (
            num_steps >= 3000
            and crowd.num_right > 400
            and crowd.num_cached > 500
            and engine.stats().num_preemptions > 10
        ):
            break
        assert num_steps < 30_000, "the steps do not reach what they are to test"
        for action, probability in actions.items():
            if crowd.rng.random() < probability:
                action()
        crowd.step()
    crowd.finish()
    runner = cast("ArithmeticRunner", engine._runner)
    assert (runner.num_ahead > 100) == (async_scheduling == "on"), runner.num_ahead
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    statuses = {(status.name, status.version): status for status in engine.adapter_updates()}
    assert not any(status.num_in_flight for status in statuses.values())
    for ref in crowd.catalog.page():
        engine.retire(ref.name, ref.version)
    while engine.has_work():
        assert engine.step() == []
    memory = engine.stats().adapters
    assert (memory.arena_used_bytes, memory.host_used_bytes, memory.num_resident) == (0, 0, 0)
    engine.close()
