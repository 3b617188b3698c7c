"""Steps that are launched before the tokens of the step before are read: what comes out is what comes out without that."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from driving import Output, request, run, step
from planning import World
from served import Served

from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.runner import Step
from perft_serve.engine.scheduler import ChunkResult, Plan

PAGE_BYTES = 2 * 2 * 2 * 8 * 4 * 4  # layers, keys and values, kv heads, head width, page size, float32
PROMPT = torch.randint(128, (30,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Watch:
    """What an engine's runner was told: True for each step launched ahead; may fail in one."""

    ahead: list[bool] = field(default_factory=list)
    fails_at: int | None = None

    def on(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Watch:
        launch = engine._runner.launch

        def watched(plan: Plan, after: Step | None = None) -> Step:
            self.ahead.append(after is not None)
            if sum(self.ahead) == self.fails_at:
                self.fails_at = None
                raise RuntimeError("out of memory")
            return launch(plan, after)

        monkeypatch.setattr(engine._runner, "launch", watched)
        return self


def mixed(**more: Any) -> list[EngineRequest]:
    """All adapters and the base, greedy and sampled, short and long."""
    names = [None, "R-lora", "E-parallel", "S-one-layer", "D-lora", "R-norm"]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.8, "top_p": 0.9, "seed": 6}]
    return [
        request(f"{i}", PROMPT[: 3 + 2 * i], names[i % 6], **{"max_tokens": 5 + 3 * i, **kinds[i % 3], **more})
        for i in range(12)
    ]


def assert_same(got: dict[str, Output], want: dict[str, Output]) -> None:
    assert got.keys() == want.keys()
    for key, output in want.items():
        assert got[key].token_ids == output.token_ids, key
        assert (got[key].finish_reason, got[key].error) == (output.finish_reason, output.error)
        torch.testing.assert_close(torch.tensor(got[key].logprobs), torch.tensor(output.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("programs", ["on", "off"])
@pytest.mark.parametrize("pages", [400, 40])
@pytest.mark.parametrize("more", [{}, {"logprobs": None, "temperature": 0.0}], ids=["logprobs", "greedy"])
def test_the_same_comes_out(
    mixtral: Served, monkeypatch: pytest.MonkeyPatch, programs: str, pages: int, more: dict[str, Any]
) -> None:
    """With room for all, and with so few pages that sequences are preempted."""
    settings = {"page_size": 4, "kv_memory": pages * PAGE_BYTES, "decode_programs": programs, "max_num_seqs": 8}
    want = run(mixtral.engine(**settings), mixed(**more))
    engine = mixtral.engine(**settings, async_scheduling="on")
    watch = Watch().on(engine, monkeypatch)
    assert_same(run(engine, mixed(**more)), want)
    assert sum(watch.ahead) > 10
    assert (engine.stats().num_preemptions > 0) == (pages == 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks whether the host waits for a GPU")
def test_launching_ahead_waits_for_nothing(mixtral: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all sizes are captured: torch raises if a launch makes the host wait."""
    engine = mixtral.engine(async_scheduling="on", prefix_caching="off")
    want = run(engine, mixed())
    launch = engine._runner.launch
    num_ahead = 0

    def watched(plan: Plan, after: Step | None = None) -> Step:
        nonlocal num_ahead
        num_ahead += after is not None
        torch.cuda.set_sync_debug_mode("error" if after is not None else "default")
        try:
            return launch(plan, after)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine._runner, "launch", watched)
    assert_same(run(engine, mixed()), want)
    assert num_ahead > 10


def test_an_end_that_is_seen_late(mixtral: Served) -> None:
    """What was computed beyond a stop token is dropped, and found by nobody: the pages are somebody else's, the next token
    is another one."""
    settings = {"page_size": 4, "kv_memory": 24 * PAGE_BYTES}
    free = run(mixtral.engine(**settings), mixed(max_tokens=20, temperature=0.0)[:4])
    ends = [
        request(key, PROMPT[: 3 + 2 * i], one.adapter, max_tokens=20, stop_token_ids=(free[key].token_ids[3 + i],))
        for i, (key, one) in enumerate((each.request_id, each) for each in mixed()[:4])
    ]
    longer = [
        request(f"{one.request_id} again", [*one.prompt_ids, *free[one.request_id].token_ids[:2], 7, 8, 9], one.adapter)
        for one in ends
    ]
    want = run(mixtral.engine(**settings), ends)
    assert {output.finish_reason for output in want.values()} == {"stop"}
    want |= run(mixtral.engine(**settings, prefix_caching="off"), longer)
    engine = mixtral.engine(**settings, async_scheduling="on")
    got = run(engine, ends)
    got |= run(engine, longer)
    assert_same(got, want)


def test_what_needs_its_tokens_on_the_host_waits_for_them(mixtral: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties count tokens, routing is told with them: such a sequence, and whoever is with it, runs a step at a time."""
    for more in ({"frequency_penalty": 1.5}, {"bad_words": ()}, {"return_routing": True}):
        wanted = mixed(**more)[1:2]
        want = run(mixtral.engine(), [*wanted, *mixed()[2:4]])
        engine = mixtral.engine(async_scheduling="on")
        watch = Watch().on(engine, monkeypatch)
        assert_same(run(engine, [*wanted, *mixed()[2:4]]), want)
        steps_with_it = len(want["1"].token_ids)
        waits = more != {"bad_words": ()}
        assert any(watch.ahead[:steps_with_it]) == (not waits)
        assert any(watch.ahead[steps_with_it + 1 :])


def test_somebody_new_does_not_wait_for_others_to_end(mixtral: Served) -> None:
    engine = mixtral.engine(async_scheduling="on")
    outputs = {"old": Output(), "new": Output()}
    engine.submit(request("old", PROMPT, "R-lora", max_tokens=60))
    for _ in range(10):
        step(engine, outputs)
    engine.submit(request("new", PROMPT, "E-lora", max_tokens=3))
    for _ in range(6):
        step(engine, outputs)
    assert outputs["new"].finish_reason == "length"
    assert len(outputs["old"].token_ids) == 16, "one token a step throughout"


def test_aborting_in_the_middle(mixtral: Served) -> None:
    """Of a step that is on its way, nothing is told; who is left goes on as if nothing had been."""
    want = run(mixtral.engine(), mixed())
    engine = mixtral.engine(async_scheduling="on")
    outputs = {one.request_id: Output() for one in mixed()}
    for one in mixed():
        engine.submit(one)
    for _ in range(6):
        step(engine, outputs)
    assert engine._in_flight is not None
    dropped = [key for key, output in outputs.items() if output.finish_reason is None and int(key) % 2]
    for key in dropped:
        engine.abort(key)
        del outputs[key], want[key]
    while any(output.finish_reason is None for output in outputs.values()):
        step(engine, outputs)
    assert_same(outputs, want)
    engine.submit(request("last", PROMPT, max_tokens=9))
    step(engine, {"last": Output()})
    engine.abort("last")
    assert not engine.has_work()
    assert run(engine, [request("last", PROMPT, max_tokens=9)])["last"].finish_reason == "length"


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_step_ahead_that_fails(mixtral: Served, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Nothing is lost by it but time."""
    want = run(mixtral.engine(page_size=4), mixed())
    engine = mixtral.engine(page_size=4, async_scheduling="on")
    watch = Watch(fails_at=fails_at).on(engine, monkeypatch)
    outputs = {one.request_id: Output() for one in mixed()}
    for one in mixed():
        engine.submit(one)
    num_failed = 0
    while any(output.finish_reason is None for output in outputs.values()):
        try:
            events = engine.step()
        except RuntimeError:
            num_failed += 1
            continue
        for event in events:
            if event.num_cached_tokens is not None and outputs[event.request_id].num_cached_tokens is not None:
                raise AssertionError("said once")
            outputs[event.request_id].add(event)
    assert num_failed == 1
    assert_same(outputs, want)
    assert sum(watch.ahead) > fails_at
    assert engine.stats().kv_usage == 0


# The scheduler


def ahead(world: World, plan: Plan) -> dict[str, tuple[int, int]] | None:
    """The step after `plan`: start and number of tokens of each sequence."""
    found = world.scheduler.schedule_ahead(plan)
    return (
        None
        if found is None
        else {chunk.seq.request.request_id: (chunk.start, chunk.num_tokens) for chunk in found.chunks}
    )


def results(plan: Plan) -> list[ChunkResult]:
    return [ChunkResult(token_id=chunk.end if chunk.samples else None) for chunk in plan.chunks]


def test_the_step_ahead() -> None:
    """One more token for each; who ends with the present one whatever it is, is not in it."""
    world = World(max_num_seqs=3)
    for name, max_tokens in (("a", 4), ("b", 1), ("c", 2)):
        world.add(name, 4, max_tokens=max_tokens)
    first = world.scheduler.schedule()
    second = world.scheduler.schedule_ahead(first)
    assert second is not None
    assert [(chunk.seq.request.request_id, chunk.start) for chunk in second.chunks] == [("a", 4), ("c", 4)]
    assert len(second.new_pages) == 2
    assert [event.finish_reason for event in world.scheduler.commit(first, results(first))] == [None, "length", None]
    assert ahead(world, second) == {"a": (5, 1)}
    events = world.scheduler.commit(second, results(second))
    assert [(event.request_id, event.token_id, event.finish_reason) for event in events] == [
        ("a", 5, None),
        ("c", 5, "length"),
    ]


def test_no_step_ahead() -> None:
    """In the middle of a prompt; when somebody may start; when there is no page."""
    world = World(max_num_seqs=2, budget=6)
    world.add("long", 9, max_tokens=9)
    plan = world.scheduler.schedule()
    assert ahead(world, plan) is None
    world.scheduler.commit(plan, results(plan))
    plan = world.scheduler.schedule()
    world.add("late", 2, max_tokens=9)
    assert ahead(world, plan) is None
    world.scheduler.commit(plan, results(plan))
    plan = world.scheduler.schedule()
    world.add("later", 2, max_tokens=9)
    assert ahead(world, plan) == {"long": (10, 1), "late": (2, 1)}, "there is no seat for a third"


def test_no_step_ahead_without_pages() -> None:
    """Somebody would have to give theirs back, which the tokens of this step decide: one of them may end it."""
    world = World(num_pages=3, max_num_seqs=8)
    for name in ("a", "b"):
        world.add(name, 3, max_tokens=9)
    world.add("has no page", 5, max_tokens=9)
    plan = world.scheduler.schedule()
    assert [chunk.seq.request.request_id for chunk in plan.chunks] == ["a", "b"]
    following = world.scheduler.schedule_ahead(plan)
    assert following is not None
    assert following.new_pages == ()
    world.scheduler.commit(plan, results(plan))
    assert ahead(world, following) is None, "one page for two"
    world.scheduler.commit(following, results(following))
    assert world.pool.num_free == 1


def test_pages_are_known_once_their_tokens_are() -> None:
    """A page that a step ahead fills is found by its tokens, the last of which the host has only just learnt."""
    world = World(prefix_caching=True, max_num_seqs=1)
    seq = world.add("a", 4, max_tokens=9)
    plans = [world.scheduler.schedule()]
    while (plan := world.scheduler.schedule_ahead(plans[-1])) is not None:
        world.scheduler.commit(plans[-1], results(plans[-1]))
        plans.append(plan)
    world.scheduler.commit(plans[-1], results(plans[-1]))
    assert all(after.chunks[0].start == before.chunks[0].end for before, after in pairwise(plans))
    prompt = (*range(4), *range(4, 13))
    assert tuple(seq.token_ids) == prompt
    world.add("b", prompt, max_tokens=1)
    (chunk,) = world.scheduler.schedule().chunks
    assert chunk.start == 12
