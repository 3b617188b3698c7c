"""An adapter's life on the server: brought, leased, evicted, pinned, reloaded, retired; and what is said of it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from staging import CONFIGS, HIDDEN, Driven, assert_is_in, assert_zero_outside, make_adapter, make_arena, num_rows, read

from perft.errors import AdapterError
from perft_serve.adapters import loader as loader_module
from perft_serve.adapters import store as store_module
from perft_serve.adapters import tiers as tiers_module
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.loader import MAX_LOADS
from perft_serve.adapters.sources import fetched
from perft_serve.adapters.status import Hold, Lease

S = num_rows("s")
ROW = HIDDEN * 4
MakeRef = Callable[..., AdapterRef]


@pytest.fixture
def make_ref(tmp_path: Path) -> MakeRef:
    """Refs to adapters on disk, each with content of its own unless told otherwise."""
    seeds = iter(range(1000))

    def make(name: str, kind: str = "s", version: int = 1, seed: int | None = None) -> AdapterRef:
        source = make_adapter(tmp_path / f"{name}-{version}", kind, next(seeds) if seed is None else seed)
        return AdapterRef(name=name, source=source, version=version)

    return make


@pytest.fixture
def driven() -> Iterator[Callable[..., Driven]]:
    made: list[Driven] = []

    def make(num_rows: int, host_bytes: int = 1 << 20) -> Driven:
        made.append(Driven(num_rows, host_bytes))
        return made[-1]

    yield make
    for each in made:
        each.store.close()


def assert_right(driven: Driven, lease: Lease) -> None:
    adapter = read(lease.ref.source)
    assert lease.digest == adapter.digest
    assert_is_in(driven.arena, lease.slot, adapter)


def test_the_life_of_an_adapter(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    d, ref = driven(S), make_ref("a")
    d.store.enter(ref)
    status = d.status(ref)
    assert (status.state, status.num_in_flight, status.digest, status.variant) == ("loading", 1, None, None)
    assert d.store.acquire(ref) is Hold.LOADING or d.store.has_work()
    d.settle()
    assert d.status(ref).state == "host"
    lease = d.store.acquire(ref)
    assert isinstance(lease, Lease)
    assert lease.width == 1
    assert_right(d, lease)
    status, adapter = d.status(ref), read(ref.source)
    assert status.state == "resident"
    assert (status.variant, status.unit, status.num_experts, status.top_k, status.r) == ("S", "lora", 1, None, 7)
    assert (status.digest, status.num_parameters) == (adapter.digest, adapter.num_parameters)
    assert status.num_bytes == d.store.memory().arena_used_bytes == adapter.num_bytes
    d.end(lease)
    status = d.status(ref)
    assert (status.state, status.num_in_flight, status.error, status.pinned) == ("resident", 0, None, False)
    assert status.last_used is not None
    assert d.store.updates() == []
    memory = d.store.memory()
    assert (memory.num_resident, memory.num_loads, memory.num_evictions) == (1, 1, 0)
    assert memory.host_used_bytes == adapter.num_bytes
    assert memory.load_seconds > 0
    d.store.retire("a", 1)
    assert d.status(ref).state == "removed"
    d.settle()
    memory = d.store.memory()
    assert (memory.arena_used_bytes, memory.host_used_bytes, memory.num_resident) == (0, 0, 0)
    assert not d.arena.rows_SD.any()


@pytest.mark.parametrize(("kind", "width"), [("r", 2), ("e", 2), ("d", 3), ("s", 1)])
def test_the_width_of_a_lease(driven: Callable[..., Driven], make_ref: MakeRef, kind: str, width: int) -> None:
    assert driven(500).run(make_ref("a", kind)).width == width


def test_the_least_recently_used_is_evicted_and_comes_back_from_host_memory(
    driven: Callable[..., Driven], make_ref: MakeRef
) -> None:
    d, refs = driven(2 * S), [make_ref(name) for name in "abc"]
    a, b, c = refs
    for ref in (a, b, a, c):
        d.use(ref)
    assert [d.status(ref).state for ref in refs] == ["resident", "host", "resident"]
    lease = d.run(b)
    assert_right(d, lease)
    assert [d.status(ref).state for ref in refs] == ["host", "resident", "resident"]
    memory = d.store.memory()
    assert (memory.num_loads, memory.num_evictions, memory.num_resident) == (3, 2, 2)
    d.end(lease)


def test_an_adapter_in_use_is_never_evicted(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    d, a, b = driven(S), make_ref("a"), make_ref("b")
    one, two = d.run(a), d.run(a)
    assert one.slot == two.slot
    d.store.enter(b)
    d.settle()
    assert d.store.acquire(b) is Hold.NO_ROOM
    d.end(one)
    assert d.store.acquire(b) is Hold.NO_ROOM
    assert_right(d, two)
    d.end(two)
    lease = d.store.acquire(b)
    assert isinstance(lease, Lease), "as soon as there is enough that nobody uses"
    assert_right(d, lease)
    assert_zero_outside(d.arena, [lease.slot])


def test_host_memory_is_bounded_and_adapters_come_back_from_their_source(
    driven: Callable[..., Driven], make_ref: MakeRef
) -> None:
    d, refs = driven(S, host_bytes=2 * S * ROW), [make_ref(name) for name in "abcd"]
    for ref in refs:
        d.use(ref)
        assert d.store.memory().host_used_bytes <= 2 * S * ROW
    assert [d.status(ref).state for ref in refs] == ["registered", "registered", "host", "resident"]
    assert d.status(refs[0]).digest is not None, "what the file said is still known"
    lease = d.run(refs[0])
    assert_right(d, lease)
    assert d.store.memory().num_loads == 5


def test_an_adapter_larger_than_the_host_tier_passes_through(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    d, ref = driven(500, host_bytes=100), make_ref("a", "r")
    lease = d.run(ref)
    assert_right(d, lease)
    assert d.store.memory().host_used_bytes == 0
    d.end(lease)
    assert d.status(ref).state == "resident"
    d.store.warm(make_ref("b"))
    d.settle()
    assert d.mirror["b", 1].state == "resident", "there was room that nobody had"


def test_a_crowd_that_waits_does_not_push_one_another_out(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    """Thirty adapters are waited for, host memory holds four, the arena one: each is read once and gets its turn."""
    d, refs = driven(S, host_bytes=4 * S * ROW), [make_ref(f"a{i}") for i in range(30)]
    for ref in refs:
        d.store.enter(ref)
    waiting = list(refs)
    for _ in range(100):
        d.settle()
        assert d.store.memory().host_used_bytes <= (4 + MAX_LOADS) * S * ROW
        lease = next((lease for ref in waiting if isinstance(lease := d.store.acquire(ref), Lease)), None)
        if lease is not None:
            assert_right(d, lease)
            waiting.remove(lease.ref)
            d.end(lease)
    assert waiting == []
    assert d.store.memory().num_loads == 30


def test_copying_is_bounded_between_two_polls(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers_module, "COPY_BYTES_PER_STEP", 20 * ROW)
    d, a, b = driven(num_rows("r")), make_ref("a", "r"), make_ref("b", "r")
    for ref in (a, b):  # the second time a's rows are wiped as well, before b's are copied
        d.store.enter(ref)
        d.settle()
        steps = 1
        while (lease := d.store.acquire(ref)) is Hold.LOADING:
            assert d.store.has_work()
            assert d.woken.is_set(), "who waits for nothing but the copy must be woken"
            d.store.poll()
            steps += 1
        assert steps == -(-num_rows("r") // 20) * (1 if ref is a else 2)
        assert isinstance(lease, Lease)
        assert_right(d, lease)
        d.end(lease)


def test_who_waits_for_a_copy_is_told_that_it_was_given_up(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room was set aside, but when it is wiped it lies in pieces too small: whoever was told to wait for it must ask again."""
    monkeypatch.setattr(tiers_module, "COPY_BYTES_PER_STEP", 12 * ROW)
    d = driven(4 * 12 + 2)
    leases = {name: d.run(make_ref(name, "s-last")) for name in "abcd"}
    d.end(leases["a"])
    d.end(leases["c"])
    wide, twin = make_ref("wide", "s-wide", seed=7), make_ref("twin", "s-wide", seed=7)
    for ref in (wide, twin):
        d.store.enter(ref)
        d.settle()
    assert d.store.acquire(wide) is Hold.LOADING
    assert d.store.acquire(twin) is Hold.LOADING
    d.look()
    d.mirror.clear()
    d.settle()
    assert d.mirror.keys() == {("wide", 1), ("twin", 1)}
    assert d.store.acquire(wide) is Hold.NO_ROOM
    assert d.store.acquire(twin) is Hold.NO_ROOM
    assert d.store.updates() == [], "or each would have the other ask for ever"
    d.end(leases["b"])
    assert d.store.acquire(wide) is Hold.LOADING
    d.settle()
    lease = d.store.acquire(wide)
    assert isinstance(lease, Lease)
    assert_right(d, lease)


def test_a_failed_load_fails_its_requests_and_a_later_request_tries_again(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, good, bad = driven(500), make_ref("good"), make_ref("bad")
    file = Path(bad.source) / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    lease = d.run(good)
    d.store.enter(bad)
    d.store.enter(bad)
    d.settle()
    status = d.status(bad)
    assert status.state == "failed"
    assert "not a whole safetensors file" in (status.error or "")
    assert bad.source not in (status.error or "")
    for _ in range(2):
        with pytest.raises(AdapterError, match="adapter 'bad' could not be loaded: .*not a whole"):
            d.store.acquire(bad)
        d.store.leave(bad)
    assert d.status(bad).state == "failed"
    assert d.status(bad).num_in_flight == 0
    assert "bad" not in d.store._entries, "it is reported, not kept"
    assert_right(d, lease)
    file.write_bytes(whole)
    monkeypatch.setattr(store_module, "RETRY_SECONDS", 0.0)
    assert_right(d, d.run(bad))
    assert d.status(bad).state == "resident"
    memory = d.store.memory()
    assert (memory.num_loads, memory.num_load_failures) == (2, 1)


def test_a_source_that_has_just_failed_is_left_alone(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests come: they get the reason at once. Who asks for the load itself gets a load."""
    d, bad = driven(500), make_ref("bad")
    shutil.move(bad.source, f"{bad.source}-away")
    for _ in range(20):
        d.store.enter(bad)
        d.settle()
        assert d.status(bad).state == "failed"
        with pytest.raises(AdapterError, match="adapter 'bad' could not be loaded: its folder does not exist"):
            d.store.acquire(bad)
        d.store.leave(bad)
    assert d.store.memory().num_load_failures == 1
    d.store.warm(bad)
    d.settle()
    assert d.store.memory().num_load_failures == 2
    shutil.move(f"{bad.source}-away", bad.source)
    monkeypatch.setattr(store_module, "RETRY_SECONDS", 0.05)
    time.sleep(0.1)
    d.use(bad)
    assert d.store._failed == {}


def test_equal_content_shares_memory(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    d = driven(S)
    a, b = make_ref("a", seed=7), make_ref("b", seed=7)
    one, two = d.run(a), d.run(b)
    assert one.slot == two.slot
    assert one.digest == two.digest
    assert d.store.memory().arena_used_bytes == d.store.memory().host_used_bytes == S * ROW
    d.end(one)
    d.store.retire("a", 1)
    assert d.status(a).state == "removed"
    assert d.status(b).state == "resident"
    assert_right(d, two)
    d.end(two)
    d.store.retire("b", 1)
    d.settle()
    assert d.store.memory().arena_used_bytes == d.store.memory().host_used_bytes == 0


def test_a_new_version_beside_the_old_one(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    """Requests in flight end on the version with which they came, new ones take the new one; then the old one goes."""
    d, old, new = driven(2 * S), make_ref("a"), make_ref("a", version=2)
    on_old = d.run(old)
    on_new = d.run(new)
    assert on_old.digest != on_new.digest
    d.store.retire("a", 1)
    d.settle()
    assert d.status(old).state == "resident"
    assert_right(d, on_old)
    assert_right(d, on_new)
    d.end(on_old)
    d.settle()
    assert d.status(old).state == "removed"
    assert d.status(new).state == "resident"
    assert_zero_outside(d.arena, [on_new.slot])
    assert d.store.memory().host_used_bytes == S * ROW
    d.end(on_new)


def test_a_request_that_was_on_its_way_when_its_version_was_retired(
    driven: Callable[..., Driven], make_ref: MakeRef
) -> None:
    d, ref = driven(S), make_ref("a")
    d.store.retire("a", 1)
    assert d.status(ref).state == "removed", "the version is reported though it was never loaded"
    d.end(d.run(ref))
    d.settle()
    assert d.status(ref).state == "removed"
    assert d.store.memory().arena_used_bytes == d.store.memory().host_used_bytes == 0
    with pytest.raises(AdapterError, match="deleted or replaced"):
        d.store.warm(ref)


def test_retired_while_it_is_loaded_or_waits_for_it(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    d, refs = driven(500), [make_ref(f"a{i}") for i in range(MAX_LOADS + 3)]
    for ref in refs:
        d.store.warm(ref)
    for ref in refs:
        d.store.retire(ref.name, ref.version)
        assert d.status(ref).state == "removed"
    d.settle()
    assert all(d.status(ref).state == "removed" for ref in refs)
    memory = d.store.memory()
    assert (memory.arena_used_bytes, memory.host_used_bytes) == (0, 0)
    assert d.store._entries == {}


def test_an_abort_before_the_load_has_started(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    d, refs = driven(500), [make_ref(f"a{i}") for i in range(MAX_LOADS + 3)]
    for ref in refs:
        d.store.enter(ref)
    for ref in refs:
        d.store.leave(ref)
    d.settle()
    assert d.store.memory().num_loads == MAX_LOADS
    assert {d.status(ref).state for ref in refs[MAX_LOADS:]} == {"registered"}


def test_aborted_while_it_is_copied(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers_module, "COPY_BYTES_PER_STEP", 20 * ROW)
    d, ref = driven(num_rows("r")), make_ref("a", "r")
    d.store.enter(ref)
    d.settle()
    assert d.store.acquire(ref) is Hold.LOADING
    d.store.leave(ref)
    d.store.retire("a", 1)
    d.settle()
    assert d.store.memory().arena_used_bytes == 0
    assert d.arena.num_free_rows == d.arena.num_rows
    assert not d.arena.rows_SD.any()


class TestWarm:
    def test_into_free_room_only(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        d, refs = driven(2 * S), [make_ref(name) for name in "abc"]
        for ref in refs:
            d.store.warm(ref)
            d.settle()
        assert [d.status(ref).state for ref in refs] == ["resident", "resident", "host"]
        assert d.store.memory().num_evictions == 0

    def test_a_failed_one_is_said_to_load_again(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        d, ref = driven(S), make_ref("a")
        shutil.move(ref.source, f"{ref.source}-away")
        d.store.warm(ref)
        d.settle()
        assert d.status(ref).state == "failed"
        shutil.move(f"{ref.source}-away", ref.source)
        d.store.warm(ref)
        assert d.status(ref).state == "loading"
        d.settle()
        assert d.status(ref).state == "resident"


class TestPins:
    def test_a_pinned_adapter_is_never_evicted(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        d, pinned, others = driven(2 * S, host_bytes=0), make_ref("pinned"), [make_ref(f"a{i}") for i in range(4)]
        d.use(others[0])
        d.use(others[1])
        d.store.warm(pinned, pin=True)
        d.settle()
        assert d.status(pinned).state == "resident", "a pin evicts, if it must"
        assert d.status(pinned).pinned
        for ref in others:
            d.use(ref)
        assert d.status(pinned).state == "resident"
        d.store.retire("pinned", 1)
        d.settle()
        assert d.status(pinned).state == "removed"
        for ref in others[:2]:
            d.use(ref)
        assert d.store.memory().num_resident == 2

    def test_a_pin_waits_for_room(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        d, a, b = driven(S), make_ref("a"), make_ref("b")
        lease = d.run(a)
        d.store.warm(b, pin=True)
        d.settle()
        assert d.status(b).state == "host"
        d.end(lease)
        d.settle()
        assert d.status(b).state == "resident"

    def test_a_pin_is_taken_back_only_when_asked_to(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        d, ref = driven(S), make_ref("a")
        d.store.warm(ref, pin=True)
        d.settle()
        d.store.warm(ref)
        assert d.status(ref).pinned
        for _ in range(2):
            d.store.warm(ref, pin=False)
            assert not d.status(ref).pinned
        other = make_ref("b")
        d.store.warm(other, pin=True)
        d.settle()
        assert d.status(other).state == "resident", "it has made room"

    def test_one_version_alone_is_let_go(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        d, refs = driven(3 * S), [make_ref("a", version=version) for version in (1, 2, 3)]
        for ref in refs:
            d.store.warm(ref)
        d.settle()
        d.store.retire("a", 2, only=True)
        d.settle()
        assert [d.status(ref).state for ref in refs] == ["resident", "removed", "resident"]
        d.store.warm(refs[0])
        d.store.enter(refs[0])
        assert d.status(refs[0]).state == "resident", "it is not let go with the other"

    def test_what_cannot_be_pinned_is_refused_with_the_numbers(
        self, driven: Callable[..., Driven], make_ref: MakeRef
    ) -> None:
        d, a, b, c = driven(2 * S), make_ref("a"), make_ref("b", "r-one"), make_ref("c")
        d.store.warm(a, pin=True)
        d.use(b)
        message = r"cannot be pinned: it needs 2,688 bytes, and of the 5,376 bytes of adapter memory 4,416 are pinned"
        d.store.warm(b, pin=True)
        d.settle()
        d.store.warm(c, pin=True)
        d.settle()
        status = d.status(c)
        assert (status.state, status.pinned) == ("host", False), "found out when it was read"
        assert message.replace(r"\b", "") in (status.error or "")
        with pytest.raises(AdapterError, match=message):
            d.store.warm(c, pin=True)
        d.store.enter(c)
        with pytest.raises(AdapterError, match="adapter 'c': there is no room for it: it needs 2,688 bytes"):
            d.store.acquire(c)
        d.store.leave(c)

    def test_that_it_cannot_be_pinned_does_not_keep_it_from_being_run(
        self, driven: Callable[..., Driven], make_ref: MakeRef
    ) -> None:
        d, pinned, big, other = driven(2 * S, host_bytes=0), make_ref("a"), make_ref("big"), make_ref("other")
        d.store.warm(pinned, pin=True)
        d.settle()
        lease = d.run(other)
        d.store.warm(make_ref("b"), pin=True)
        d.settle()  # read before the next one is: both wait for room in this order
        d.store.warm(big, pin=True)
        d.settle()
        d.end(lease)
        d.settle()
        status = d.status(big)
        assert (status.state, status.pinned) == ("registered", False)
        assert "cannot be pinned" in (status.error or "")
        d.store.retire("b", 1)
        d.settle()
        d.use(big)
        assert "cannot be pinned" in (d.status(big).error or "")

    def test_what_lies_in_pieces_too_small_is_refused(self, driven: Callable[..., Driven], make_ref: MakeRef) -> None:
        """What is pinned never moves: an adapter expert that fits between no two of them will not fit later either."""
        d = driven(6 * num_rows("s-last"))
        refs = [make_ref(f"a{i}", "s-last") for i in range(6)]
        for i, ref in enumerate(refs):
            d.store.warm(ref, pin=i % 2 == 1)
            d.settle()
        wide = make_ref("wide", "s-wide")
        d.store.enter(wide)
        d.settle()
        with pytest.raises(AdapterError, match="pieces that are too small"):
            d.store.acquire(wide)

    def test_a_pin_that_fits_between_no_two_others_is_refused(
        self, driven: Callable[..., Driven], make_ref: MakeRef
    ) -> None:
        """... wherever it is found out, with the numbers; it keeps nothing reserved, and nobody is evicted for it in vain."""
        d = driven(4 * 12 + 2)
        refs = {name: make_ref(name, "s-last") for name in "abcd"}
        wide, late, others = make_ref("wide", "s-wide"), make_ref("late", "s-wide"), [refs["a"], refs["c"]]
        leases = {name: d.run(ref) for name, ref in refs.items()}
        d.store.warm(wide, pin=True)
        d.settle()
        assert (d.status(wide).state, d.status(wide).pinned) == ("host", True), "it waits for those that run"
        for name in "bd":
            d.store.warm(refs[name], pin=True)
        for lease in leases.values():
            d.end(lease)
        d.settle()
        d.store.warm(late, pin=True)
        d.settle()
        for ref in (wide, late):
            status = d.status(ref)
            assert (status.state, status.pinned) == ("host", False)
            assert (
                "cannot be pinned: it needs 1,664 bytes, and of the 3,200 bytes of adapter memory 1,536 are pinned"
                in (status.error or "")
            )
        for _ in range(10):
            for ref in others:
                d.use(ref)
        assert d.store.memory().num_evictions == 0
        d.store.warm(refs["a"], pin=True)
        d.store.warm(refs["c"], pin=True)
        d.settle()
        assert all(d.status(ref).pinned for ref in refs.values())

    def test_a_pin_waits_until_those_who_run_leave_it_a_place(
        self, driven: Callable[..., Driven], make_ref: MakeRef
    ) -> None:
        d = driven(4 * 12 + 2)
        leases = {name: d.run(make_ref(name, "s-last")) for name in "abcd"}
        wide = make_ref("wide", "s-wide")
        d.store.warm(wide, pin=True)
        d.end(leases["a"])
        d.end(leases["c"])
        d.settle()
        assert (d.status(wide).state, d.status(wide).pinned) == ("host", True)
        assert d.store.memory().num_evictions == 0, "there is room enough, but in pieces"
        d.end(leases["b"])
        d.settle()
        assert (d.status(wide).state, d.status(wide).pinned) == ("resident", True)


def test_an_adapter_larger_than_the_arena_fails_with_the_numbers(
    driven: Callable[..., Driven], make_ref: MakeRef
) -> None:
    d, ref = driven(S - 1), make_ref("a")
    d.store.enter(ref)
    d.settle()
    with pytest.raises(AdapterError, match=r"needs 2,688 bytes of adapter memory, which has 2,624 in all"):
        d.store.acquire(ref)
    d.store.leave(ref)
    assert d.store.memory().host_used_bytes == 0


def test_a_file_that_the_arena_cannot_hold_is_not_read(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 file may fill an arena of bfloat16; of a larger one nothing comes into memory."""

    def read_adapter(*_: object) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(loader_module, "read_served_adapter", read_adapter)
    d, ref = driven(S), make_ref("a")
    limit = S * ROW + (1 << 20)
    with (Path(ref.source) / "adapter_model.safetensors").open("ab") as file:
        file.truncate(limit + 1)
    d.store.enter(ref)
    d.settle()
    with pytest.raises(
        AdapterError,
        match=f"has {limit + 1:,} bytes, and no more than {limit:,} are read here; start .* --adapter-memory",
    ):
        d.store.acquire(ref)
    d.store.leave(ref)
    assert make_arena(S, torch.bfloat16).rows_SD.numel() * 4 == S * ROW


def test_files_that_change_under_running_requests(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    """A request that was preempted must not go on with other weights; requests that come later take them."""
    d, a, b, other = driven(S, host_bytes=0), make_ref("a"), make_ref("b"), make_ref("other")
    lease = d.run(a)
    d.store.release(lease)  # preempted
    d.use(b)
    assert d.status(a).state == "registered"
    shutil.rmtree(a.source)
    shutil.copytree(other.source, a.source)
    assert d.store.acquire(a) is Hold.LOADING
    d.settle()
    with pytest.raises(AdapterError, match="changed while requests ran"):
        d.store.acquire(a)
    d.store.leave(a)
    later = d.run(a)
    assert later.digest == read(other.source).digest != lease.digest


def test_loading_at_the_start(driven: Callable[..., Driven], make_ref: MakeRef, tmp_path: Path) -> None:
    d, a, b, c = driven(2 * S), make_ref("a"), make_ref("b"), make_ref("c")
    assert d.store.load_now(a).state == "resident"
    assert d.store.load_now(b, pin=True).pinned
    assert d.store.load_now(c).state == "host"
    assert d.store.memory().num_loads == 3
    nowhere = AdapterRef(name="d", source=str(tmp_path / "nowhere"))
    with pytest.raises(AdapterError, match=r"adapter 'd' \(from '.*nowhere'\): its folder does not exist"):
        d.store.load_now(nowhere)
    with pytest.raises(AdapterError, match=r"adapter 'e' .* cannot be pinned"):
        d.store.load_now(make_ref("e", "e"), pin=True)
    assert d.store.load_now(make_ref("f")).state == "host"
    small = driven(S, host_bytes=0)
    assert small.store.load_now(a).state == "resident"
    assert small.store.load_now(b).state == "registered", "checked, and there is no place for it now"


def test_a_load_that_hangs_holds_up_nobody(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = threading.Event()

    @contextmanager
    def slow(source: str, max_bytes: int | None) -> Iterator[Path]:
        if "slow" in source:
            assert network.wait(30)
        with fetched(source, max_bytes) as folder:
            yield folder

    monkeypatch.setattr(loader_module, "fetched", slow)
    d, slow_ref, quick_ref = driven(500), make_ref("slow"), make_ref("quick")
    d.store.enter(slow_ref)
    d.store.enter(quick_ref)
    for _ in range(100):
        assert d.woken.wait(30)
        d.woken.clear()
        d.store.poll()
        lease = d.store.acquire(quick_ref)
        if isinstance(lease, Lease):
            break
    assert_right(d, lease)  # type: ignore[arg-type]
    assert d.store.acquire(slow_ref) is Hold.LOADING
    network.set()
    d.settle()
    assert isinstance(d.store.acquire(slow_ref), Lease)


def test_a_network_that_hangs_holds_up_no_folder(
    driven: Callable[..., Driven], make_ref: MakeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = threading.Event()

    @contextmanager
    def slow(source: str, max_bytes: int | None) -> Iterator[Path]:
        if source.startswith("s3://"):
            assert network.wait(30)
            raise AdapterError("the network is back, but not the adapter")
        with fetched(source, max_bytes) as folder:
            yield folder

    monkeypatch.setattr(loader_module, "fetched", slow)
    d, quick = driven(500), make_ref("quick")
    remote = [AdapterRef(name=f"r{i}", source=f"s3://bucket/{i}") for i in range(2 * MAX_LOADS)]
    for ref in (*remote, quick):
        d.store.enter(ref)
    while d.status(quick).state != "host":
        assert d.woken.wait(30)
        d.woken.clear()
        d.store.poll()
    assert {d.status(ref).state for ref in remote} == {"loading"}
    network.set()
    d.settle()
    assert {d.status(ref).state for ref in remote} == {"failed"}


def test_hundreds_of_refs_in_room_for_a_few(driven: Callable[..., Driven], make_ref: MakeRef) -> None:
    """Far more adapters than room: each gets its turn, and what was evicted is wiped."""
    kinds = list(CONFIGS)
    sources = [make_ref(f"a{i}", kinds[i % 4], seed=i) for i in range(24)]
    d = driven(400, host_bytes=400 * ROW)
    for i in range(600):
        source = sources[(i * 7) % 24].source
        d.use(AdapterRef(name=f"n{i % 200}", source=source, version=1 + i // 200))
        if i >= 200:
            d.store.retire(f"n{i % 200}", i // 200)
    memory = d.store.memory()
    assert memory.num_evictions > 50
    assert memory.host_used_bytes <= memory.host_bytes
    for i in range(200):
        d.store.retire(f"n{i}", 3)
    d.settle()
    assert not d.store._entries
    assert not d.store._entries_of
    assert not d.arena.rows_SD.any()
