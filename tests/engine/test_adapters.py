"""Adapters that come and go under a running engine: the real store, a tiny real model, and the right tokens throughout."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import Output, request, run, step
from safetensors.torch import load_file, save_file
from served import Served
from tiny import random_adapter, tiny_model

from perft import PerftConfig
from perft.adapter import Adapter, read_adapter
from perft.errors import AdapterError
from perft.moe import MoeBlock, find_moe_blocks
from perft_serve.adapters import store
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.params import RequestError

PAGE_BYTES = 2 * 2 * 2 * 8 * 4 * 4  # layers, keys and values, kv heads, head width, page size, float32
ROW_BYTES = 32 * 4
# Two layers of three adapter experts of rank 2 and a router: 2 x (3*2 + 3*2 + 3) rows
CROWD_BYTES = 30 * ROW_BYTES


def bare_engine(served: Served, **settings: object) -> Engine:
    """An engine that was given no adapter at its start."""
    return replace(served, adapters={}).engine(**settings)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRef]:
    """Twelve adapters of the same size."""
    folder = tmp_path_factory.mktemp("crowd")
    blocks = find_moe_blocks(tiny_model("mixtral"))
    config = PerftConfig(variant="R", r=2, num_experts=3, top_k=2)
    return {
        f"c{i}": AdapterRef(name=f"c{i}", source=str(random_adapter(folder / str(i), config, blocks, seed=100 + i)))
        for i in range(12)
    }


def settle(engine: Engine) -> dict[str, AdapterStatus]:
    """Step and wait until no load is under way; what has changed, by name."""
    seen: dict[str, AdapterStatus] = {}
    while True:
        engine.step()
        seen |= {status.name: status for status in engine.adapter_updates()}
        if engine.has_work():
            continue
        if not any(status.state == "loading" for status in seen.values()):
            return seen
        assert engine.wait(30)


def test_an_adapter_is_loaded_on_first_use(mixtral: Served) -> None:
    """Nothing was loaded at the start; the first request brings its adapter, and its tokens are right."""
    engine = bare_engine(mixtral)
    assert engine.stats().adapters.num_resident == 0
    names = [*mixtral.adapters]
    refs = [AdapterRef(name=name, source=mixtral.adapters[name]) for name in names]
    outputs = run(engine, [request(ref.name, [3, 1, 4, 1, 5], ref) for ref in refs])
    for name in names:
        assert outputs[name].token_ids == mixtral.generate(name, [3, 1, 4, 1, 5], 8)
    memory = engine.stats().adapters
    assert (memory.num_resident, memory.num_loads) == (len(names), len(names))
    statuses = {status.name: status for status in engine.adapter_updates()}
    assert {status.state for status in statuses.values()} == {"resident"}
    assert memory.arena_used_bytes == sum(status.num_bytes or 0 for status in statuses.values())
    engine.close()


def test_a_working_set_larger_than_the_arena(mixtral: Served, crowd: dict[str, AdapterRef]) -> None:
    """Twelve adapters, room for four of them, hardly any pages, aborts: each request's tokens are those that it has alone."""
    alone_on = bare_engine(mixtral, prefix_caching="off")
    engine = bare_engine(
        mixtral,
        adapter_memory=4 * CROWD_BYTES,
        host_adapter_memory=7 * CROWD_BYTES,
        page_size=4,
        kv_memory=14 * PAGE_BYTES,
        max_num_batched_tokens=24,
        max_num_seqs=8,
    )
    rng = random.Random(7)
    prefix = [rng.randrange(128) for _ in range(12)]
    requests = {}
    for i in range(60):
        ref = rng.choice([None, *crowd.values()])
        prompt = [*prefix[: rng.choice((0, 5, 12))], *(rng.randrange(128) for _ in range(rng.randint(1, 9)))]
        requests[str(i)] = request(str(i), prompt, ref, max_tokens=rng.randint(1, 15))
    outputs = {key: Output() for key in requests}
    to_come, aborted = list(requests), set()
    while to_come or not all(outputs[key].finish_reason or key in aborted for key in requests):
        for _ in range(min(len(to_come), rng.randint(0, 2))):
            engine.submit(requests[to_come.pop(0)])
        if rng.random() < 0.05:
            key = rng.choice([key for key in requests if key not in to_come])
            if outputs[key].finish_reason is None:
                engine.abort(key)
                aborted.add(key)
        if to_come or engine.has_work() or engine.wait(30):
            for event in engine.step():
                assert event.request_id not in aborted
                outputs[event.request_id].add(event)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    assert stats.adapters.num_evictions > 12
    assert stats.num_preemptions > 0
    for key in requests.keys() - aborted:
        want = run(alone_on, [requests[key]])[key]
        assert outputs[key].token_ids == want.token_ids, key
        torch.testing.assert_close(torch.tensor(outputs[key].logprobs), torch.tensor(want.logprobs), atol=1e-4, rtol=0)
    engine.close()
    alone_on.close()


def test_what_was_given_at_the_start_may_be_more_than_the_arena_holds(
    mixtral: Served, crowd: dict[str, AdapterRef]
) -> None:
    """The rest stays in host memory, and no source is read again."""
    served = replace(mixtral, adapters={name: ref.source for name, ref in crowd.items()})
    engine = served.engine(adapter_memory=4 * CROWD_BYTES)
    assert engine.stats().adapters.num_resident == 4
    outputs = run(engine, [request(name, [1, 2, 3], name) for name in crowd])
    assert {output.finish_reason for output in outputs.values()} == {"length"}
    assert engine.stats().adapters.num_loads == 12
    engine.close()


@pytest.mark.parametrize("what", ["missing", "nan", "cut", "pickle", "another base", "nowhere", "too large"])
def test_a_broken_adapter_fails_its_own_requests(
    mixtral: Served, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, while another request's decode goes on; put right, it is served."""
    blocks = find_moe_blocks(tiny_model("mixtral"))
    config = PerftConfig(variant="S", r=2)
    source = tmp_path / "bad"
    if what == "another base":
        random_adapter(source, config, [replace(block, hidden_size=64) for block in blocks])
    elif what == "too large":
        random_adapter(source, PerftConfig(variant="S", r=300), blocks)
    elif what != "nowhere":
        file = random_adapter(source, config, blocks) / "adapter_model.safetensors"
        tensors = load_file(file)
        if what == "missing":
            del tensors[next(iter(tensors))]
        elif what == "nan":
            next(iter(tensors.values()))[0, 0, 0] = float("nan")
        save_file(tensors, file)
        if what == "cut":
            file.write_bytes(file.read_bytes()[:-7])
        elif what == "pickle":
            file.rename(file.with_name("adapter_model.bin"))
    reason = {
        "missing": "is missing",
        "nan": "NaN or infinity",
        "cut": "not a whole safetensors file",
        "pickle": "never loaded",
        "another base": "another base",
        "nowhere": "does not exist",
        "too large": "start the server with a larger --adapter-memory",
    }[what]
    engine = mixtral.engine(adapter_memory=150_000)
    used = engine.stats().adapters.arena_used_bytes
    ref = AdapterRef(name="bad", source=str(source))
    requests = [request("e", [3, 1, 4, 1, 5], "E-parallel", max_tokens=20)]
    requests += [request(f"bad{i}", [1, 2, 3], ref) for i in range(3)]
    outputs = run(engine, requests)
    assert outputs["e"].token_ids == mixtral.generate("E-parallel", [3, 1, 4, 1, 5], 20)
    for i in range(3):
        assert (outputs[f"bad{i}"].finish_reason, outputs[f"bad{i}"].token_ids) == ("error", [])
        assert reason in (outputs[f"bad{i}"].error or "")
        assert str(tmp_path) not in (outputs[f"bad{i}"].error or ""), "a client need not know where files lie"
    assert engine.stats().adapters.arena_used_bytes == used
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.0)
    random_adapter(source, config, blocks)
    (source / "adapter_model.bin").unlink(missing_ok=True)
    assert run(engine, [request("good", [1, 2, 3], ref)])["good"].finish_reason == "length"
    engine.close()


def test_a_load_that_hangs_delays_nobody_else(
    mixtral: Served, crowd: dict[str, AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode goes on, other adapters are loaded meanwhile, and an abort needs no load to end."""
    gate = threading.Event()

    def slow(folder: Path, blocks: Sequence[MoeBlock], attention: object) -> Adapter:
        if folder == Path(crowd["c0"].source):
            assert gate.wait(60)
        return read_adapter(folder, blocks)

    monkeypatch.setattr("perft_serve.adapters.loader.read_served_adapter", slow)
    woken = threading.Event()
    config = EngineConfig(model=str(mixtral.path), dtype="float32", kv_memory=1 << 23, adapter_memory=1 << 20)
    engine = Engine(config, wake=woken.set)
    outputs = {name: Output() for name in ("stuck", "gives up", "base", "other")}
    engine.submit(request("stuck", [1, 2, 3], crowd["c0"]))
    engine.submit(request("gives up", [1, 2, 3], crowd["c0"]))
    engine.submit(request("base", [1, 2, 3], max_tokens=30))
    engine.submit(request("other", [1, 2, 3], crowd["c1"], max_tokens=30))
    while not (outputs["base"].finish_reason and outputs["other"].finish_reason):
        step(engine, outputs)
    engine.abort("gives up")
    while engine.has_work():
        assert engine.step() == []
    assert engine.stats().num_waiting == 1
    woken.clear()
    assert not engine.wait(0.05)
    gate.set()
    assert woken.wait(30)
    while not outputs["stuck"].finish_reason:
        step(engine, outputs)
    assert outputs["stuck"].finish_reason == "length"
    assert (outputs["gives up"].token_ids, outputs["gives up"].finish_reason) == ([], None)
    engine.close()


def test_requests_in_flight_finish_on_the_version_that_they_began_on(
    mixtral: Served, crowd: dict[str, AdapterRef]
) -> None:
    engine = bare_engine(mixtral)
    versions = [replace(crowd[f"c{i}"], name="mine", version=i + 1) for i in range(2)]
    alone = [run(engine, [request("x", [1, 2, 3], crowd[f"c{i}"], max_tokens=20)])["x"].token_ids for i in range(2)]
    outputs = {name: Output() for name in ("old", "new", "late")}
    engine.submit(request("old", [1, 2, 3], versions[0], max_tokens=20))
    while len(outputs["old"].token_ids) < 5:
        step(engine, outputs)
    engine.retire("mine", 1)
    engine.submit(request("new", [1, 2, 3], versions[1], max_tokens=20))
    engine.submit(request("late", [1, 2, 3], versions[0], max_tokens=20))  # resolved before, arrived after
    while not all(output.finish_reason for output in outputs.values()):
        step(engine, outputs)
    assert [outputs[name].token_ids for name in ("old", "new", "late")] == [alone[0], alone[1], alone[0]]
    settle(engine)
    engine.retire("mine", 2)
    for name in ("c0", "c1"):
        engine.retire(name, 1)
    settle(engine)
    memory = engine.stats().adapters
    assert (memory.arena_used_bytes, memory.host_used_bytes, memory.num_resident) == (0, 0, 0)
    engine.close()


def test_deletion_by_force(mixtral: Served, crowd: dict[str, AdapterRef]) -> None:
    """Requests on it end with a clear error, wherever they are, and so does one that was on its way; others do not."""
    engine = bare_engine(mixtral, max_num_seqs=2)
    outputs = {name: Output() for name in ("runs", "base", "waits")}
    engine.submit(request("runs", [1, 2, 3], crowd["c0"], max_tokens=50))
    engine.submit(request("base", [1, 2, 3], max_tokens=50))
    engine.submit(request("waits", [1, 2, 3], crowd["c0"]))
    while len(outputs["runs"].token_ids) < 5:
        step(engine, outputs)
    engine.retire("c0", 1, force=True)
    with pytest.raises(RequestError, match="adapter 'c0' was deleted") as caught:
        engine.submit(request("late", [1, 2, 3], crowd["c0"]))
    assert caught.value.param == "model"
    while not outputs["base"].finish_reason:
        step(engine, outputs)
    assert [(outputs[name].finish_reason, outputs[name].error) for name in ("runs", "waits", "base")] == [
        *[("error", "adapter 'c0' was deleted")] * 2,
        ("length", None),
    ]
    assert engine.stats().adapters.host_used_bytes == 0
    engine.close()


def test_warm_and_pin(mixtral: Served, crowd: dict[str, AdapterRef]) -> None:
    engine = bare_engine(mixtral, adapter_memory=2 * CROWD_BYTES)
    engine.warm(crowd["c0"], pin=True)
    engine.warm(crowd["c1"])
    statuses = settle(engine)
    assert [(statuses[name].state, statuses[name].pinned) for name in ("c0", "c1")] == [
        ("resident", True),
        ("resident", False),
    ]
    run(engine, [request(name, [1, 2, 3], ref) for name, ref in crowd.items()])
    assert not any(status.name == "c0" and status.state != "resident" for status in engine.adapter_updates())
    engine.warm(AdapterRef(name="bad", source="/nowhere"))
    assert settle(engine)["bad"].state == "failed"
    engine.close()


def test_a_failure_is_told_though_the_batch_is_full(mixtral: Served) -> None:
    engine = bare_engine(mixtral, max_num_seqs=1)
    outputs = {name: Output() for name in ("runs", "bad", "bad too")}
    engine.submit(request("runs", [1, 2, 3], max_tokens=200))
    step(engine, outputs)
    bad = AdapterRef(name="bad", source="/nowhere")
    engine.submit(request("bad", [1, 2, 3], bad))
    while not outputs["bad"].finish_reason:
        step(engine, outputs)
    engine.submit(request("bad too", [1, 2, 3], bad))
    step(engine, outputs)
    assert outputs["runs"].finish_reason is None
    for name in ("bad", "bad too"):
        assert outputs[name].error == "adapter 'bad' could not be loaded: its folder does not exist"
    assert engine.stats().adapters.num_load_failures == 1, "the second one came at once, and was told the same"
    engine.abort("runs")
    engine.close()


def test_what_a_step_has_changed_is_known_to_the_next_one(mixtral: Served, crowd: dict[str, AdapterRef]) -> None:
    """Asking for one adapter goes on with copying others: who waits for those is to be looked at though nothing else is."""
    engine = bare_engine(mixtral)
    outputs = {name: Output() for name in crowd}
    for name, ref in crowd.items():
        engine.submit(request(name, [1, 2, 3], ref))
    while not all(output.finish_reason for output in outputs.values()):
        step(engine, outputs)
        assert engine._adapters.updates() == []
    engine.warm(AdapterRef(name="c0", source="/nowhere", version=2))
    engine.retire("c0", 1)
    assert engine._adapters.updates() == []
    engine.close()


def test_values_that_overflow_the_served_dtype(
    mixtral: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter whose values do not fit the served dtype is refused instead of served as infinity."""
    source = random_adapter(tmp_path, PerftConfig(variant="S", r=2), find_moe_blocks(tiny_model("mixtral")))
    file = source / "adapter_model.safetensors"
    save_file({name: tensor * 1e6 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="do not fit into torch.float16"):
        replace(mixtral, adapters={"big": str(source)}).engine(dtype="float16")
