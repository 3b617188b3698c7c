"""Whatever is called in whatever order: nobody's adapter is evicted under them, sums are right, at the end nothing is held.

The loads are done in the test's own thread, when an example says so, and thus every example can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import BLOCKS, CONFIGS, HIDDEN, assert_is_in, assert_zero_outside, make_adapter, make_arena, num_rows, read

from perft.adapter import Adapter
from perft.errors import AdapterError
from perft_serve.adapters import tiers as tiers_module
from perft_serve.adapters.arena import AdapterArena
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.loader import Loaded, Loader, _Task
from perft_serve.adapters.status import AdapterStatus, Lease
from perft_serve.adapters.store import AdapterStore

KINDS = ("r", "r-one", "e", "s", "s-last", "s-last")
NUM_ROWS = 190  # of the three largest two
HOST_BYTES = 200 * HIDDEN * 4
BROKEN = "broken"


class SteppedLoader(Loader):
    """Loads when it is told to, in the caller's thread."""

    def __init__(self, arena: AdapterArena, adapters: dict[str, Adapter]) -> None:
        super().__init__(BLOCKS, arena.stage, lambda: None)
        self._arena = arena
        self._adapters = adapters
        self._started: list[tuple[int, str]] = []

    def start(self, number: int, ref: AdapterRef) -> None:
        assert self.has_slot(remote=False)
        self._loads[number] = _Task(ref, number)
        self._started.append((number, ref.source))

    def finish(self, which: int) -> None:
        """End one of the loads under way."""
        if self._started:
            number, source = self._started.pop(which % len(self._started))
            staged = None if source == BROKEN else self._arena.stage(self._adapters[source])
            self._results.put(
                Loaded(number=number, staged=staged, error=None if staged else "it is broken", seconds=0.0)
            )


@dataclass
class Request:
    ref: AdapterRef
    lease: Lease | None = None


@dataclass
class Model:
    """The store, what was asked of it, and what must be true after every call."""

    adapters: dict[str, Adapter]
    requests: list[Request] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    mirror: dict[tuple[str, int], AdapterStatus] = field(default_factory=dict)
    pinned: set[tuple[str, int]] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arena = make_arena(NUM_ROWS)
        self.store = AdapterStore(self.arena, host_bytes=HOST_BYTES)
        self.loader = SteppedLoader(self.arena, self.adapters)
        self.store._loader = self.loader
        self.sources = [*self.adapters, BROKEN]

    def ref(self, number: int) -> AdapterRef:
        """Names 0 and 1 share their content; a later version has another source."""
        name = f"n{number % 8}"
        version = self.versions.setdefault(name, 1)
        index = max(number % 8 - 1, 0) + version - 1
        return AdapterRef(name=name, source=self.sources[index % len(self.sources)], version=version)

    def act(self, op: str, number: int) -> None:
        if op == "enter":
            self.requests.append(Request(self.ref(number)))
            self.store.enter(self.requests[-1].ref)
        elif op == "acquire" and self.requests:
            self.acquire(self.requests[number % len(self.requests)])
        elif op == "release" and self.requests:
            self.release(self.requests[number % len(self.requests)])
        elif op == "leave" and self.requests:
            request = self.requests.pop(number % len(self.requests))
            self.release(request)
            self.store.leave(request.ref)
        elif op in ("warm", "pin"):
            try:
                self.store.warm(self.ref(number), pin=True if op == "pin" else None)
            except AdapterError as error:
                self.refusals.append(str(error))
        elif op == "retire":
            ref = self.ref(number)
            self.versions[ref.name] += 1
            self.store.retire(ref.name, ref.version)
            self.pinned = {key for key in self.pinned if key[0] != ref.name or key[1] > ref.version}
        elif op == "load":
            self.loader.finish(number)
        elif op == "poll":
            self.store.poll()

    def acquire(self, request: Request) -> None:
        if request.lease is None:
            try:
                lease = self.store.acquire(request.ref)
            except AdapterError as error:
                self.refusals.append(str(error))
            else:
                request.lease = lease if isinstance(lease, Lease) else None

    def release(self, request: Request) -> None:
        if request.lease is not None:
            self.store.release(request.lease)
            request.lease = None

    def check(self) -> None:
        store, tiers = self.store, self.store._tiers
        contents = tiers._contents.values()
        for status in store.updates():
            self.mirror[status.name, status.version] = status
        for name, versions in store._entries.items():
            for version, entry in versions.items():
                assert self.mirror[name, version] == store._status(entry), "a change was not reported"
                assert entry.num_in_flight == sum(request.ref == entry.ref for request in self.requests)
                if entry.pinned and self.mirror[name, version].state == "resident":
                    self.pinned.add((name, version))
        assert {self.mirror[key].state for key in self.pinned} <= {"resident"}, "what is pinned stays"
        for request in self.requests:
            if request.lease is not None:
                content = tiers._contents[request.lease.digest]
                assert content.slot == request.lease.slot, "who runs on an adapter keeps it"
                assert self.mirror[request.ref.name, request.ref.version].state == "resident"
        assert all("broken" in reason or "pinned" in reason for reason in self.refusals)
        # every sum that is kept is the sum
        assert tiers.host_used_bytes == sum(c.num_bytes for c in contents if c.staged is not None)
        kept = [c for c in contents if c.staged is not None and c.digest not in tiers._spare]
        assert tiers._kept_bytes == sum(c.num_bytes for c in kept)
        assert all(c.num_waiting or c.num_pins or c.digest in tiers._incoming for c in kept)
        assert tiers.host_used_bytes <= HOST_BYTES or not tiers._spare
        assert all(c.is_resident and not c.num_held and not c.num_pins for c in tiers._idle.values())
        assert tiers._idle_rows == sum(c.num_rows for c in tiers._idle.values())
        assert tiers._pinned_rows == sum(c.num_rows for c in contents if c.num_pins)
        assert tiers._running_rows == sum(c.num_rows for c in contents if c.num_held and not c.num_pins)
        assert tiers._granted_rows == sum(c.num_rows for c in tiers._incoming.values() if c.placement is None)
        assert tiers._available_rows() >= 0
        assert sum(c.num_held for c in contents) == sum(request.lease is not None for request in self.requests)
        assert sum(c.num_waiting for c in contents) <= len(self.requests)
        memory = store.memory()
        placed = sum(c.num_bytes for c in contents if c.is_resident or c.placement is not None)
        assert memory.arena_used_bytes == placed
        assert memory.num_resident == sum(c.is_resident for c in contents) == len(self.arena._residents)

    def check_rows(self) -> None:
        """Every resident adapter's rows are its tensors, and once nothing moves, all other rows are zero."""
        tiers = self.store._tiers
        by_digest = {adapter.digest: adapter for adapter in self.adapters.values()}
        slots = [c.slot for c in tiers._contents.values() if c.is_resident]
        for content in tiers._contents.values():
            if content.is_resident:
                assert_is_in(self.arena, content.slot, by_digest[content.digest])
        if not tiers.has_work:
            assert_zero_outside(self.arena, slots)

    def run_on(self) -> None:
        """Steps until loads and copies have ended."""
        for _ in range(500):
            self.store.poll()
            if not self.loader.num_loads and not self.store.has_work():
                return
            self.loader.finish(0)
        pytest.fail("it never comes to rest")

    def everybody_gets_a_turn(self) -> None:
        """When the others stop, each request that waits is served, or is told why not."""
        for request in self.requests:
            self.release(request)
        for request in self.requests:
            for _ in range(100):
                self.run_on()
                try:
                    lease = self.store.acquire(request.ref)
                except AdapterError as error:
                    self.refusals.append(str(error))
                    break
                if isinstance(lease, Lease):
                    self.store.release(lease)
                    break
            else:
                pytest.fail(f"{request.ref.name} starves: {lease}")

    def end(self) -> None:
        while self.requests:
            self.act("leave", 0)
        for name, version in self.versions.items():
            self.store.retire(name, version)
        self.run_on()
        self.pinned.clear()
        self.check()
        store, memory = self.store, self.store.memory()
        assert not any((store._entries, store._entries_of, *store._pending, store._loading))
        assert not any((store._tiers._contents, store._tiers._incoming, store._tiers._pins_waiting))
        assert (memory.arena_used_bytes, memory.host_used_bytes, memory.num_resident) == (0, 0, 0)
        assert self.arena.num_free_rows == NUM_ROWS
        assert not self.arena.rows_SD.any()
        assert {status.state for status in self.mirror.values()} <= {"removed", "failed", "registered"}


@pytest.fixture(scope="module")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Model]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {kind: read(make_adapter(folder / f"{i}", kind, seed=i)) for i, kind in enumerate(KINDS)}
    adapters["s-last again"] = read(make_adapter(folder / "again", "s-last", seed=len(KINDS)))
    assert max(num_rows(kind) for kind in CONFIGS) < NUM_ROWS
    return lambda: Model(adapters)


OPS = (
    "enter",
    "enter",
    "acquire",
    "acquire",
    "acquire",
    "release",
    "leave",
    "load",
    "load",
    "poll",
    "poll",
    "warm",
    "pin",
    "retire",
)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers_module, "COPY_BYTES_PER_STEP", 50 * HIDDEN * 4)


@settings(deadline=None, max_examples=150)
@given(ops=st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 63)), max_size=80))
def test_any_order_of_calls(new_model: Callable[[], Model], ops: list[tuple[str, int]]) -> None:
    model = new_model()
    for op, number in ops:
        model.act(op, number)
        model.check()
    model.check_rows()
    model.everybody_gets_a_turn()
    model.check()
    model.check_rows()
    model.end()


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_calls(new_model: Callable[[], Model], seed: int) -> None:
    model = new_model()
    generator = random.Random(seed)
    for i in range(3000):
        op = generator.choice(OPS)
        if generator.random() < {"pin": 0.98, "retire": 0.8}.get(op, 0.0):
            op = "acquire"
        if op == "enter" and len(model.requests) > 5:
            op = "leave"
        model.act(op, generator.randrange(64))
        model.check()
        if i % 50 == 0:
            model.check_rows()
        if i % 100 == 99:
            model.everybody_gets_a_turn()
            model.check()
    assert model.store.memory().num_evictions > 30
    model.end()
