"""The scheduler by itself, on the base alone: no torch, no model, milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
from planning import EOS, FakeAdapters, RoundRobin, World

from perft_serve.engine.policy import PATIENCE, LowestPriorityFirst, WaitingOrder
from perft_serve.engine.scheduler import ChunkResult


def test_long_prompts_come_in_chunks_and_do_not_hold_up_decoding() -> None:
    world = World()
    world.add("a", 3)
    assert world.shape() == {"a": 3}
    world.add("b", 40)
    world.add("c", 2)
    assert world.shape() == {"a": 1, "b": 15}
    assert world.shape() == {"a": 1, "b": 15}
    assert world.shape() == {"a": 1, "b": 10, "c": 2}
    assert world.shape() == {"b": 1, "c": 1}


def test_first_come_first_served() -> None:
    """A small request does not overtake a large one that waits for pages."""
    world = World(num_pages=10)
    world.add("a", 30, max_tokens=2)
    world.add("large", 20)
    world.add("small", 1)
    assert world.shape() == {"a": 16}
    assert world.shape() == {"a": 14}
    assert world.shape() == {"a": 1}
    assert world.shape() == {"large": 16}


def test_no_more_than_max_num_seqs() -> None:
    world = World(max_num_seqs=2)
    for name in "abc":
        world.add(name, 2, max_tokens=2)
    assert world.shape() == {"a": 2, "b": 2}
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (2, 1)
    assert world.shape() == {"a": 1, "b": 1}
    assert world.shape() == {"c": 2}


def test_the_youngest_is_preempted_and_starts_again() -> None:
    world = World(num_pages=4)
    old = world.add("old", 7, max_tokens=9)
    young = world.add("young", 7, max_tokens=9)
    assert world.shape() == {"old": 7, "young": 7}
    assert world.shape() == {"old": 1, "young": 1}
    assert world.shape() == {"old": 1}
    assert (young.pages, young.num_computed, len(young.token_ids)) == ([], 0, 9)
    assert world.scheduler.num_preemptions == 1
    seen: list[int] = []
    for _ in range(40):
        _, events = world.step()
        seen += [e.token_id for e in events if e.request_id == "young" and e.token_id is not None]
    assert seen == list(range(9, 16)), "it goes on where it was, and no token comes twice"
    assert len(old.token_ids) == 16
    assert world.pool.num_free == 4


def test_pages_that_change_hands_are_named_for_clearing() -> None:
    world = World(num_pages=3)
    world.add("a", 5, max_tokens=1)
    plan, _ = world.step()
    assert sorted(plan.new_pages) == sorted(plan.chunks[0].seq.pages or plan.new_pages)
    first = set(plan.new_pages)
    world.add("b", 9, max_tokens=1)
    plan, _ = world.step()
    assert first <= set(plan.new_pages)
    assert 0 not in plan.new_pages


@pytest.mark.parametrize(
    ("params", "reason", "stop_reason", "tokens"),
    [
        ({}, "length", None, [2, 3, 4, 5]),
        ({"stop_token_ids": (4,)}, "stop", 4, [2, 3, 4]),
    ],
)
def test_finish_reasons(params: Any, reason: str, stop_reason: int | None, tokens: list[int]) -> None:
    world = World()
    world.add("a", 2, **params)
    events = [event for _ in range(6) for event in world.step()[1]]
    assert [event.token_id for event in events] == tokens
    assert [event.finish_reason for event in events] == [None] * (len(tokens) - 1) + [reason]
    assert events[-1].stop_reason == stop_reason
    assert [event.timing is not None for event in events] == [True] + [False] * (len(tokens) - 1)
    assert world.pool.usage == 0


def test_eos_has_no_stop_reason() -> None:
    world = World()
    world.add("a", EOS, max_tokens=4)
    events = [event for _ in range(9) for event in world.step()[1]]
    assert [(e.token_id, e.finish_reason, e.stop_reason) for e in events] == [(EOS, "stop", None)]


def test_an_error_ends_one_request_only() -> None:
    world = World()
    world.add("a", 2)
    world.add("b", 2)
    plan = world.scheduler.schedule()
    events = world.scheduler.commit(plan, [ChunkResult(error="NaN"), ChunkResult(token_id=7)])
    assert [(e.request_id, e.finish_reason, e.error) for e in events] == [("a", "error", "NaN"), ("b", None, None)]
    assert world.shape() == {"b": 1}


def test_a_step_that_was_not_carried_out_has_not_happened() -> None:
    """Its sequences start again, in their order, and nobody finds a page that was to be filled."""
    world = World(prefix_caching=True)
    world.add("a", 6)
    world.step()
    world.add("b", 9)
    world.add("twin", 9)
    plan = world.scheduler.schedule()
    assert [chunk.seq.request.request_id for chunk in plan.chunks] == ["a", "b", "twin"]
    assert plan.chunks[2].start == 8
    world.scheduler.roll_back(plan)
    assert (world.scheduler.num_running, world.pool.usage) == (0, 0)
    assert world.shape() == {"a": 3, "b": 5, "twin": 1}, "what the first step has computed is still there"
    world.finish()
    world.assert_empty()


def test_ids_and_aborts() -> None:
    world = World()
    world.add("a", 3)
    assert "a" in world.scheduler
    assert world.scheduler.abort("a")
    assert not world.scheduler.abort("a")
    world.add("b", 3)
    world.add("c", 3)
    assert world.scheduler.abort_all() == ["b", "c"]
    world.assert_empty()


def test_another_order_between_tenants_can_be_plugged_in() -> None:
    """A tenant with one request does not wait behind another's many."""
    orders: list[WaitingOrder | None] = [None, RoundRobin()]
    finished = []
    for order in orders:
        world = World(max_num_seqs=2, order=order)
        for i in range(6):
            world.add(f"greedy{i}", 5, tenant="greedy")
        world.add("modest", 5, tenant="modest")
        finished.append(list(world.finish()))
        world.assert_empty()
    assert finished[0][-1] == "modest"
    assert finished[1][1] == "modest"


def test_lower_priorities_start_first() -> None:
    world = World(max_num_seqs=1, order=LowestPriorityFirst())
    for name, priority in (("a", 0), ("b", 3), ("c", -1), ("d", 0), ("e", -1)):
        world.add(name, 3, priority=priority)
    assert list(world.finish()) == ["c", "e", "a", "d", "b"]
    world.assert_empty()


def test_who_has_started_is_not_put_aside() -> None:
    world = World(max_num_seqs=1, order=LowestPriorityFirst())
    world.add("a", 3, max_tokens=3)
    world.step()
    world.add("urgent", 3, priority=-9)
    assert list(world.finish()) == ["a", "urgent"]


@pytest.mark.parametrize("adapter", [None, "x"])
def test_a_flow_of_urgent_requests_keeps_nobody_out(adapter: str | None) -> None:
    """There are always urgent ones waiting, and still one start in `PATIENCE` is that of who has waited longest."""
    order = LowestPriorityFirst()
    world = World(max_num_seqs=1, order=order, adapters=FakeAdapters(host=("x",)))
    if adapter is not None:
        world.add("first", 3, 1, adapter=adapter)
        world.finish()
    for i in range(3):
        world.add(f"patient{i}", 3, 1, adapter=adapter, priority=100)
    ends: list[str] = []
    for i in range(5 * PATIENCE):
        world.add(f"urgent{i}", 3, 1, adapter=adapter)
        ends += [event.request_id for event in world.step()[1] if event.finish_reason is not None]
    places = [ends.index(f"patient{i}") for i in range(3)]
    assert places == [PATIENCE - 1, 2 * PATIENCE - 1, 3 * PATIENCE - 1]
    for i in range(2000):
        world.add(f"gone{i}", 3, priority=1000)
        world.scheduler.abort(f"gone{i}")
    assert len(order._by_priority) < 400, "what has gone is forgotten"
