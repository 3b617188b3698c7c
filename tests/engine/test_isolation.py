"""One request's trouble is its own: NaN adapters, wild ids, stale pages, aborts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import Output, request, run
from safetensors.torch import load_file, save_file
from served import Served
from tiny import random_adapter

from perft import PerftConfig
from perft.adapter import read_adapter
from perft.errors import AdapterError
from perft_serve.engine.engine import Engine
from perft_serve.engine.params import RequestError


def poison(engine: Engine, adapter: str) -> None:
    """Fill a resident adapter's rows with NaN, as no adapter on disk can be."""
    arena, slot = engine._runner.arena, engine._store.slot(adapter)
    rows = arena._residents[slot]
    arena.rows_SD[rows.first_row : rows.first_row + rows.num_rows] = float("nan")


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
    engine.submit(request("wild", [3, 1, 4, 1, 5], "S-lora"))
    engine._scheduler._by_id["wild"].adapter_slot = slot
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


def test_adapters_come_and_go(mixtral: Served, expected: dict[str, Output]) -> None:
    """An adapter that is loaded later, in rows that another one had, says what it would have said."""
    engine = mixtral.engine()
    free = engine._runner.arena.num_free_bytes
    engine.submit(request("r", [3, 1, 4, 1, 5], "R-lora"))
    with pytest.raises(RequestError, match="in use"):
        engine.unload_adapter("R-lora")
    engine.abort("r")
    for name in list(mixtral.adapters):
        engine.unload_adapter(name)
    assert engine._runner.arena.num_free_bytes == engine._runner.arena.num_bytes
    used = (engine._runner.arena.num_bytes - free) // (32 * 4)
    assert not engine._runner.arena.rows_SD[:used].any(), "what was let go is zeroed"
    with pytest.raises(RequestError, match="no adapter 'R-lora'"):
        engine.submit(request("r", [1], "R-lora"))
    for name in reversed(list(mixtral.adapters)):
        engine.load_adapter(name, mixtral.adapters[name])
    assert engine._runner.arena.num_free_bytes == free
    outputs = run(engine, [request(name, [3, 1, 4, 1, 5], a) for name, a in trio(mixtral)])
    for name, want in expected.items():
        assert outputs[name].token_ids == want.token_ids
    with pytest.raises(AdapterError, match="already"):
        engine.load_adapter("R-lora", mixtral.adapters["R-lora"])


def test_a_broken_adapter_is_refused_while_others_run(
    mixtral: Served, expected: dict[str, Output], tmp_path: Path
) -> None:
    """Missing tensor, NaN, cut file, pickle, another base: an error that names it, nothing taken, requests go on."""
    engine = mixtral.engine()
    free = engine._runner.arena.num_free_bytes
    engine.submit(request("e", [3, 1, 4, 1, 5], "E-parallel"))
    output = Output()
    blocks = engine._runner.arena.blocks
    wide = [replace(block, hidden_size=64) for block in blocks]
    random_adapter(tmp_path / "another base", PerftConfig(variant="S", r=2), wide)
    for name in ("missing", "nan", "cut", "pickle"):
        file = random_adapter(tmp_path / name, PerftConfig(variant="S", r=2), blocks) / "adapter_model.safetensors"
        tensors = load_file(file)
        if name == "missing":
            del tensors[next(iter(tensors))]
        elif name == "nan":
            next(iter(tensors.values()))[0, 0, 0] = float("nan")
        save_file(tensors, file)
        if name == "cut":
            file.write_bytes(file.read_bytes()[:-7])
        elif name == "pickle":
            file.rename(file.with_name("adapter_model.bin"))
    messages = {
        "missing": "is missing",
        "nan": "NaN or infinity",
        "cut": "not a whole safetensors file",
        "pickle": "never loaded",
        "another base": "another base",
    }
    for name, message in messages.items():
        with pytest.raises(AdapterError, match=f"adapter 'bad': .*{message}"):
            engine.load_adapter("bad", str(tmp_path / name))
        for event in engine.step():
            output.add(event)
    assert engine._runner.arena.num_free_bytes == free
    assert "bad" not in {info.name for info in engine.list_adapters()}
    while engine.has_work():
        for event in engine.step():
            output.add(event)
    assert output.token_ids == expected["e"].token_ids


def test_arena_holds_what_adapters_weigh(mixtral: Served) -> None:
    """No padding: bytes taken are the bytes of the tensors."""
    engine = mixtral.engine()
    arena = engine._runner.arena
    infos = engine.list_adapters()
    assert arena.num_bytes - arena.num_free_bytes == sum(info.num_bytes for info in infos)
    assert all(info.num_bytes == 4 * info.num_parameters for info in infos)


def test_a_full_arena_says_so_and_loads_nothing(mixtral: Served) -> None:
    engine = mixtral.engine()
    with pytest.raises(AdapterError, match=r"needs [\d,]+ bytes, but of the 19,968 bytes .* are free"):
        mixtral.engine(adapter_memory=20_000)
    assert engine.step() == []


def test_values_that_overflow_the_served_dtype(mixtral: Served) -> None:
    """An adapter whose values do not fit the served dtype is refused instead of served as infinity."""
    engine = mixtral.engine(dtype="float16", adapter_memory=1 << 20)
    arena = engine._runner.arena
    assert arena.rows_SD.dtype == torch.float16
    free = arena.num_free_bytes
    adapter = read_adapter(mixtral.adapters["S-lora"], arena.blocks)
    next(iter(adapter.layers.values())).up_MRD.mul_(1e6)
    with pytest.raises(AdapterError, match="do not fit into torch.float16"):
        arena.load(adapter)
    assert arena.num_free_bytes == free
