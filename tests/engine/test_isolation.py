"""One request's trouble is its own: NaN adapters, wild ids, stale pages, aborts."""

from __future__ import annotations

import random

import pytest
from driving import Output, request, run
from served import Served

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import Lease
from perft_serve.engine.engine import Engine


def poison(engine: Engine, adapter: str) -> None:
    """Fill a resident adapter's rows with NaN, as no adapter on disk can be."""
    arena, ref = engine._runner.arena, AdapterRef(name=adapter, source="given at the start")
    engine._adapters.enter(ref)
    lease = engine._adapters.acquire(ref)
    assert isinstance(lease, Lease)
    for start, num_rows in arena._residents[lease.slot].runs:
        arena.rows_SD[start : start + num_rows] = float("nan")
    engine._adapters.release(lease)
    engine._adapters.leave(ref)


def trio(served: Served) -> list[tuple[str, str | None]]:
    """Requests whose outputs must not change: base, and two adapters."""
    return [("base", None), ("r", "R-lora"), ("e", "E-parallel")]


@pytest.fixture(scope="module")
def expected(mixtral: Served) -> dict[str, Output]:
    engine = mixtral.engine()
    return {name: run(engine, [request(name, [3, 1, 4, 1, 5], a)])[name] for name, a in trio(mixtral)}


@pytest.mark.parametrize("bad", ["R-norm", "E-lora", "D-lora", "S-parallel"])
def test_nan_neighbour_changes_nothing(mixtral: Served, expected: dict[str, Output], bad: str) -> None:
    """Beside, and after, requests of an adapter full of NaN, in pages that it has used."""
    engine = mixtral.engine(kv_memory=1 << 16)
    poison(engine, bad)
    for _ in range(2):
        crowd = [request(f"bad{i}", [7] * (4 + i), bad) for i in range(4)]
        outputs = run(engine, crowd + [request(name, [3, 1, 4, 1, 5], a) for name, a in trio(mixtral)])
        for i in range(4):
            assert outputs[f"bad{i}"].finish_reason == "error"
            assert bad in (outputs[f"bad{i}"].error or "")
        for name, want in expected.items():
            assert outputs[name].token_ids == want.token_ids
            assert outputs[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)


@pytest.mark.parametrize("slot", [-7, 10_000, 2**40])
def test_adapter_ids_out_of_range_are_the_base(mixtral: Served, expected: dict[str, Output], slot: int) -> None:
    """A wild slot in a batch neither crashes nor reads anybody's rows."""
    engine = mixtral.engine()
    outputs = {name: Output() for name in ("wild", *expected)}
    for name, adapter in trio(mixtral):
        engine.submit(request(name, [3, 1, 4, 1, 5], adapter))
    engine.submit(request("wild", [3, 1, 4, 1, 5]))
    wild = engine._scheduler._by_id["wild"]
    wild.adapter_slot, wild.width = slot, 3
    while engine.has_work():
        for event in engine.step():
            outputs[event.request_id].add(event)
    assert outputs["wild"].token_ids == expected["base"].token_ids
    for name, want in expected.items():
        assert outputs[name].token_ids == want.token_ids
        assert outputs[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)


def test_random_submits_and_aborts_leave_nothing(mixtral: Served) -> None:
    """Hundreds of steps of random arrivals and aborts under page pressure: every page comes back, survivors are right."""
    page_bytes = 2 * 2 * 2 * 8 * 4 * 4
    engine = mixtral.engine(page_size=4, kv_memory=16 * page_bytes, max_num_batched_tokens=24, max_num_seqs=8)
    rng = random.Random(0)
    names = [None, *mixtral.adapters]
    live: dict[str, tuple[list[int], str | None]] = {}
    outputs: dict[str, Output] = {}
    for step in range(400):
        if rng.random() < 0.6:
            key, prompt, adapter = (
                f"q{step}",
                [rng.randrange(128) for _ in range(rng.randint(1, 30))],
                rng.choice(names),
            )
            engine.submit(request(key, prompt, adapter, max_tokens=rng.randint(1, 12)))
            live[key], outputs[key] = (prompt, adapter), Output()
        if rng.random() < 0.1 and live:
            key = rng.choice(sorted(live))
            engine.abort(key)
            del live[key], outputs[key]
        for event in engine.step():
            outputs[event.request_id].add(event)
            if event.finish_reason is not None:
                del live[event.request_id]
    engine.abort("never was")
    engine.abort_all()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    assert stats.num_preemptions > 0
    done = [output for output in outputs.values() if output.finish_reason == "length"]
    assert len(done) > 50
