"""The scheduler and adapters that come and go: who waits for whom, and for how long. No torch, no model."""

from __future__ import annotations

import random
import sys
import time

import pytest
from planning import FakeAdapters, RoundRobin, World

from perft_serve.engine.policy import MAX_PASSED_OVER, LineForRoom, LowestPriorityFirst
from perft_serve.engine.scheduler import MAX_LOOKS
from perft_serve.engine.sequence import Sequence


def test_a_load_delays_its_own_requests_only() -> None:
    """An adapter that never comes: those that came later, on others and on the base, go on as if it were not there."""
    world = World(adapters=FakeAdapters(host=("y",)))
    for i in range(3):
        world.add(f"stuck{i}", 3, adapter="x")
    world.add("y", 3, adapter="y")
    world.add("base", 3)
    assert world.shape() == {"base": 3}
    assert world.shape() == {"base": 1, "y": 3}
    assert set(world.finish()) == {"y", "base"}
    assert not world.scheduler.has_work(), "there is nothing to do but to wait"
    assert world.scheduler.num_waiting == 3
    asked = world.adapters.num_asked
    assert world.shape() == {}
    assert world.adapters.num_asked == asked, "those that wait cost nothing"
    world.read("x")
    assert world.scheduler.has_work()
    assert list(world.finish()) == ["stuck0", "stuck1", "stuck2"]
    world.assert_empty()


def test_a_load_that_fails_ends_its_own_requests_only() -> None:
    world = World(adapters=FakeAdapters(host=("y",)))
    for i in range(3):
        world.add(f"bad{i}", 3, adapter="x")
    world.add("y", 3, adapter="y")
    world.step()
    world.fail("x", "NaN in layer 3")
    last = world.finish()
    assert [last[f"bad{i}"].error for i in range(3)] == ["NaN in layer 3"] * 3
    assert {last[f"bad{i}"].error_kind for i in range(3)} == {"adapter"}
    assert last["y"].finish_reason == "length"
    world.assert_empty()


def test_a_load_that_fails_is_told_though_the_batch_is_full() -> None:
    world = World(max_num_seqs=2, adapters=FakeAdapters(room=2, host=("y",)))
    world.add("long", 3, max_tokens=300)
    world.add("parked", 3, adapter="x")
    world.step()
    world.add("also long", 3, adapter="y", max_tokens=300)
    world.step()
    world.step()
    world.add("in line", 3, adapter="x")
    world.add("other", 3, adapter="y")
    assert world.scheduler.num_running == 2
    world.fail("x", "NaN in layer 3")
    assert world.scheduler.has_work()
    told = {event.request_id: event.error for event in world.step()[1] if event.finish_reason is not None}
    assert told == {"parked": "NaN in layer 3", "in line": "NaN in layer 3"}
    assert world.finish().keys() == {"long", "also long", "other"}
    world.assert_empty()


def test_requests_on_resident_adapters_go_first() -> None:
    """With room for one adapter, its requests are served together; the other one's wait, though they came earlier."""
    world = World(max_num_seqs=4, adapters=FakeAdapters(room=1, host=("x", "y")))
    for i in range(3):
        world.add(f"x{i}", 3, adapter="x")
        world.add(f"y{i}", 3, adapter="y")
    assert list(world.finish()) == ["x0", "x1", "x2", "y0", "y1", "y2"]
    world.assert_empty()


@pytest.mark.parametrize("sizes", [{}, {"rare": 2}])
def test_nobody_is_passed_over_too_often(sizes: dict[str, int]) -> None:
    """Under an endless stream of requests on resident adapters, one that needs room is started within the bound, and
    meanwhile the base goes on.
    """
    world = World(max_num_seqs=6, adapters=FakeAdapters(room=2, host=("x", "y", "rare"), sizes=sizes))
    world.add("x", 3, adapter="x", max_tokens=3)
    world.add("y", 3, adapter="y", max_tokens=3)
    world.step()
    world.step()
    assert set(world.adapters.resident) == {"x", "y"}
    rare = world.add("rare", 3, adapter="rare", max_tokens=3)
    started: list[str] = []
    base_steps = 0
    for i in range(1000):
        world.add(f"x{i}", 3, adapter="x", max_tokens=3)
        world.add(f"y{i}", 3, adapter="y", max_tokens=3)
        world.add(f"base{i}", 3, max_tokens=1)
        shape = world.shape()
        started += [name for name, num_tokens in shape.items() if num_tokens == 3]
        base_steps += any(name.startswith("base") for name in shape)
        if "rare" in started:
            break
    later = [name for name in started if name[0] in "xy"]
    assert rare.passed_over == MAX_PASSED_OVER
    assert len(later) <= MAX_PASSED_OVER + 6, "and those that started while it was being copied"
    assert base_steps > i / 2
    for _ in range(5000):
        world.step()
        if not world.scheduler.has_work() and not world.adapters.copying:
            break
    world.assert_empty()


def test_the_base_passes_over_as_well() -> None:
    """There is room, but for a request on the base there is always a seat first: the bound holds for these too."""
    world = World(max_num_seqs=2, adapters=FakeAdapters(room=1, host=("x", "rare")))
    world.add("x", 3, adapter="x", max_tokens=3)
    world.step()
    world.step()
    rare = world.add("rare", 3, adapter="rare", max_tokens=3)
    for i in range(20):
        world.add(f"early{i}", 3, max_tokens=3)
    started: list[str] = []
    for i in range(1000):
        world.add(f"base{i}", 3, max_tokens=3)
        started += [name for name, num_tokens in world.shape().items() if num_tokens == 3]
        if "rare" in started:
            break
    assert started[-1] == "rare"
    assert rare.passed_over == MAX_PASSED_OVER
    assert len(started) - 1 <= MAX_PASSED_OVER + 2, "and those that started while it was being copied"


def test_everybody_is_served_however_little_room_there_is() -> None:
    """Adapters of unlike sizes, pages for two requests, arrivals all the time: each request ends, in bounded time."""
    for seed in range(20):
        rng = random.Random(seed)
        names = [f"a{i}" for i in range(8)]
        sizes = {name: rng.randint(1, 4) for name in names}
        adapters = FakeAdapters(room=4, host=tuple(names[:4]), sizes=sizes)
        world = World(num_pages=12, max_num_seqs=5, budget=9, adapters=adapters, prefix_caching=True)
        arrived: dict[str, int] = {}
        ended: dict[str, int] = {}
        for now in range(3000):
            if now < 300:
                name = f"q{now}"
                world.add(name, rng.randint(1, 20), rng.randint(1, 9), adapter=rng.choice([None, *names]))
                arrived[name] = now
            if now == 100:
                for name in names[4:]:
                    world.read(name)
            ended |= {event.request_id: now for event in world.step()[1] if event.finish_reason is not None}
        assert ended.keys() == arrived.keys()
        world.assert_empty()


def test_a_preempted_request_keeps_its_lease() -> None:
    """... so that it resumes on the version that it began on, and is held up by nobody who waits for room."""
    world = World(num_pages=4, adapters=FakeAdapters(room=2, host=("x", "y", "z")))
    old = world.add("old", 7, adapter="x", max_tokens=9)
    young = world.add("young", 7, adapter="y", max_tokens=9)
    world.step()
    world.add("z", 1, adapter="z", max_tokens=1)
    while not world.scheduler.num_preemptions:
        world.step()
    assert young.lease is not None
    assert (world.adapters.held["x"], world.adapters.held["y"]) == (1, 1)
    assert list(world.finish()) == ["old", "z", "young"] or list(world.finish()) == []
    assert len(old.token_ids) == len(young.token_ids) == 16
    world.assert_empty()


def test_aborts_give_everything_back_wherever_the_request_is() -> None:
    """Running, preempted, chosen and without pages, waiting for a load, for room, held back, in line."""
    world = World(num_pages=6, max_num_seqs=3, adapters=FakeAdapters(room=1, host=("x", "y")))
    places = {
        "running": world.add("running", 7, adapter="x", max_tokens=9),
        "preempted": world.add("preempted", 7, adapter="x", max_tokens=9),
        "loading": world.add("loading", 3, adapter="nowhere"),
        "room": world.add("room", 3, adapter="y"),
        "pages": world.add("pages", 20, adapter="x"),
        "line": world.add("line", 3, adapter="x"),
    }
    while not world.scheduler.num_preemptions:
        world.step()
    world.add("new", 3)
    for name in places:
        assert world.scheduler.abort(name)
        world.step()
    world.finish()
    world.assert_empty()


def test_deleting_an_adapter_ends_what_is_in_flight_on_it() -> None:
    world = World(max_num_seqs=2, adapters=FakeAdapters(room=2, host=("x", "y")))
    world.add("runs", 3, adapter="x")
    world.add("newer", 3, adapter="x", version=2)
    world.add("y", 3, adapter="y")
    world.add("waits", 3, adapter="x")
    world.step()
    world.step()
    world.scheduler.delete_adapter("x", 1, "adapter 'x' was deleted")
    assert world.scheduler.has_work(), "there is something to tell"
    last = world.finish()
    assert {name for name, event in last.items() if event.error_kind == "deleted"} == {"runs", "waits"}
    assert {name for name, event in last.items() if event.finish_reason == "length"} == {"newer", "y"}
    assert last["runs"].error == "adapter 'x' was deleted"
    assert last["waits"].num_cached_tokens == 0
    assert last["waits"].timing is None
    world.assert_empty()


def test_thousands_of_waiting_requests_cost_a_step_nothing() -> None:
    """10,000 of them on 1,000 adapters of which one is resident: a step looks at a few only, and an abort at none."""
    names = [f"a{i}" for i in range(1000)]
    adapters = FakeAdapters(room=1, host=tuple(names))
    world = World(num_pages=10_000, max_num_seqs=16, adapters=adapters)
    for i in range(10_000):
        world.add(str(i), 2, adapter=names[i % 1000], max_tokens=500, ignore_eos=True)
    world.step()
    asked = adapters.num_asked
    world.step()
    assert adapters.num_asked - asked <= MAX_LOOKS + 4
    for _ in range(60):  # until all are parked
        world.step()
    asked, start = adapters.num_asked, time.perf_counter()
    for _ in range(100):
        world.step()
    assert adapters.num_asked == asked, "nothing has changed, so nobody is asked"
    assert time.perf_counter() - start < 1.0
    start = time.perf_counter()
    world.scheduler.abort_all()
    assert time.perf_counter() - start < 1.0
    world.finish()
    world.assert_empty()


def calls_of_a_step(num_waiting: int) -> int:
    """How many functions are called to plan a step with 28 starts while so many adapters wait for room."""
    names = [f"a{i}" for i in range(num_waiting)]
    world = World(num_pages=10_000, max_num_seqs=64, budget=512, adapters=FakeAdapters(room=60, host=tuple(names)))
    for name in names:
        world.add(name, 2, adapter=name, max_tokens=400, ignore_eos=True)
    while world.scheduler.num_running < 60 or world.scheduler._order.first() is not None:
        world.step()
    for i in range(32):
        world.scheduler.abort(names[i])
        world.add(f"again{i}", 2, adapter=names[32 + i % 28], max_tokens=8)
    num_calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        plan = world.scheduler.schedule()
    finally:
        sys.setprofile(None)
    assert sum(chunk.num_tokens == 2 for chunk in plan.chunks) >= 28
    return num_calls


def test_a_start_costs_the_same_however_many_adapters_wait() -> None:
    assert calls_of_a_step(3000) < 1.5 * calls_of_a_step(300)


@pytest.mark.parametrize("seed", range(40))
def test_the_line_for_room(seed: int) -> None:
    """Against counting one by one: nobody's count is too low, nor higher than that of who came before; and if they have come
    in order, all are exact.
    """
    rng, line = random.Random(seed), LineForRoom()
    seqs: dict[int, Sequence] = {}
    passed: dict[int, int] = {}
    gone: list[Sequence] = []
    in_order = seed % 2 == 0
    for now in range(300):
        if rng.random() < 0.4:
            number = now if in_order else rng.choice([n for n in range(300) if n not in passed])
            seqs[number] = gone.pop() if gone and not in_order else world_sequence()
            seqs[number].number = number
            passed[number] = seqs[number].passed_over
            line.add(seqs[number])
        elif rng.random() < 0.3 and seqs:
            gone.append(seqs.pop(rng.choice([*seqs])))
            line.remove(gone[-1])
            assert gone[-1].passed_over >= passed.pop(gone[-1].number)
        number = now if in_order else rng.randrange(300)
        line.pass_over(number)
        passed = {n: count + (n < number) for n, count in passed.items()}
        assert [seq.number for seq in line] == sorted(seqs)
        counts = [line._num_passed(i) for i in range(len(line))]
        assert counts == sorted(counts, reverse=True)
        assert line.num_passed_first == (counts[0] if counts else 0)
        assert all(count >= passed[seq.number] for count, seq in zip(counts, line, strict=True))
        if in_order:
            assert counts == [passed[n] for n in sorted(seqs)]


def world_sequence() -> Sequence:
    return World().add("x", 1)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_nobody_is_forgotten(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random arrivals, aborts, loads that come late, fail or never come, and deletions: a scheduler that says there is no
    work has nobody left but those whose adapters have not come; and when these come, nobody at all.
    """
    if seed % 4 < 2:  # so that bounds are met all the time
        for bound, value in (("MAX_PASSED_OVER", 2), ("MAX_LOOKS", 5), ("MAX_TRIES", 1)):
            monkeypatch.setattr(f"perft_serve.engine.scheduler.{bound}", value)
    rng = random.Random(seed)
    names = [f"a{i}" for i in range(rng.randint(2, 12))]
    adapters = FakeAdapters(room=5, sizes={name: rng.randint(1, 5) for name in names})
    order = (None, RoundRobin(), LowestPriorityFirst())[seed % 3]
    world = World(
        num_pages=20, max_num_seqs=rng.randint(1, 9), budget=11, adapters=adapters, prefix_caching=True, order=order
    )
    open_ids: set[str] = set()
    for now in range(1500):
        if rng.random() < (0.4 if now < 1000 else 0.02):
            adapter = rng.choice([None, *names])
            tenant, length = str(rng.randint(0, 2)), rng.randint(1, 20)
            world.add(f"q{now}", rng.randint(1, 40), length, adapter=adapter, tenant=tenant, priority=now % 4)
            open_ids.add(f"q{now}")
        if rng.random() < 0.05 and open_ids:
            one = rng.choice(sorted(open_ids))
            open_ids.remove(one)
            assert world.scheduler.abort(one)
        if rng.random() < 0.02:
            world.read(rng.choice(names))
        if rng.random() < 0.01:
            adapters.host.discard(rng.choice(names))
        if rng.random() < 0.01:
            adapters.broken.clear()
            world.fail(rng.choice(names), "broken")
        if rng.random() < 0.01:
            world.scheduler.delete_adapter(rng.choice(names), 1, "gone")
        open_ids -= {event.request_id for event in world.step()[1] if event.finish_reason is not None}
        if not world.scheduler.has_work() and not adapters.copying:
            waiting = {world.scheduler._by_id[one].request.adapter for one in open_ids}
            assert not any(ref is None or ref.name in adapters.host | adapters.broken.keys() for ref in waiting)
    adapters.broken.clear()
    for name in names:
        world.read(name)
    assert world.finish(max_steps=5000).keys() == open_ids
    world.assert_empty()
