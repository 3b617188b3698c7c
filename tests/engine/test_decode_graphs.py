"""Decode steps as graphs, on a CPU: what is captured is a list of operations on addresses (`frozen_step`), and everything
that is not in it is poisoned. What depends on CUDA itself is checked by bench/gpu.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Output, request, run
from frozen_step import FrozenCapture, address
from tiny import random_adapter, random_loras
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

import perft_kernels.native
from perft.config import PerftConfig
from perft.moe import find_moe_blocks
from perft_serve.adapters.catalog import AdapterCatalog
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.decode_graphs import buckets
from perft_serve.engine.decode_inputs import width_class
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest

VOCAB_SIZE = 160
FIRST = {
    "a": PerftConfig(variant="R", r=4, num_experts=5, top_k=2),
    "b": PerftConfig(variant="E", r=3, unit="parallel"),
    "c": PerftConfig(variant="S", r=7),
}
# other variants, ranks and numbers of adapter experts, on rows where the first ones were
SECOND = {
    "a": PerftConfig(variant="D", r=2, num_experts=6),
    "b": PerftConfig(variant="R", r=6, num_experts=3, top_k=1, combine="base-rank"),
    "c": PerftConfig(variant="E", r=1),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose heads the CPU kernels can take: they know a row's length by its position, as those for GPUs do."""
    if perft_kernels.native.library() is None:
        pytest.skip("the CPU kernels cannot be compiled here")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("graphs")
    model.save_pretrained(folder / "base")
    blocks = find_moe_blocks(model)
    for generation, configs in enumerate((FIRST, SECOND)):
        for i, (name, adapter) in enumerate(configs.items()):
            random_adapter(folder / str(generation) / name, adapter, blocks, seed=10 * generation + i)
    return folder


def make_engine(base: Path, generation: int = 0, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "max_num_seqs": 12,
        "kv_memory": 1 << 22,
        "adapter_memory": 1 << 20,
        "decode_programs": "off",
    }
    return Engine(
        EngineConfig(
            model=str(base / "base"),
            adapters={name: str(base / str(generation) / name) for name in FIRST},
            **(defaults | settings),
        )
    )


@pytest.fixture
def capture() -> FrozenCapture:
    return FrozenCapture()


def with_graphs(engine: Engine, capture: Callable[..., Any], **settings: Any) -> Any:
    """Give the engine graphs, as it has them on a GPU; returns them."""
    runner = engine._runner
    runner._programs = runner._graphs(capture, max_num_seqs=12, max_pages=8, **settings)
    return runner._programs


def requests(generation: int = 0) -> list[EngineRequest]:
    """More than a bucket of 8 holds, of unequal lengths, greedy and sampled, so that the batch shrinks from 9 to 1."""
    g = torch.Generator().manual_seed(generation)
    names = [None, "a", "b", "c", None, "a", "b", "c", "a"]
    return [
        request(
            str(i),
            torch.randint(VOCAB_SIZE, (2 + 4 * i,), generator=g).tolist(),
            name,
            max_tokens=3 + i,
            temperature=float(i % 2),
            seed=i,
        )
        for i, name in enumerate(names)
    ]


def assert_same(got: dict[str, Output], want: dict[str, Output]) -> None:
    for key, output in want.items():
        assert got[key].token_ids == output.token_ids, key
        torch.testing.assert_close(torch.tensor(got[key].logprobs), torch.tensor(output.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("async_scheduling", ["on", "off"])
def test_a_replay_depends_on_its_buffers_alone(base: Path, capture: FrozenCapture, async_scheduling: str) -> None:
    engine = make_engine(base, async_scheduling=async_scheduling)
    graphs = with_graphs(engine, capture)
    assert_same(run(engine, requests()), run(make_engine(base), requests()))
    assert graphs.num_captured == len(capture.steps) > 4
    runner = engine._runner
    arena = runner.arena
    tables = (
        *(arena.rows_SD, arena.rule_A6, arena.gate_row_LA, arena.down_row_LE),
        *(arena.up_row_LE, arena.rank_LE, arena.scale_E, arena.silu_E),
    )
    stays = [*runner._model.parameters(), *runner._model.buffers(), *runner._cache._pools, *tables]
    stays += graphs._inputs.tensors()
    for step in capture.steps:
        assert step.outside <= {address(t) for t in stays}


def test_other_adapters_need_no_capture(base: Path, capture: FrozenCapture) -> None:
    """Every adapter is replaced by one of another variant, rank and size; the graphs stay."""
    engine = make_engine(base)
    graphs = with_graphs(engine, capture)
    first = run(engine, requests())
    num_captured = graphs.num_captured
    catalog = AdapterCatalog({name: str(base / "0" / name) for name in FIRST})
    for name in FIRST:
        engine.retire(name, 1)
    while engine.has_work():
        engine.step()
    assert engine._runner.arena.num_free_rows == engine._runner.arena.num_rows
    for name in SECOND:
        catalog.register(name, str(base / "1" / name))
    second = [
        request(r.request_id, r.prompt_ids, r.adapter and catalog.resolve(r.adapter.name), max_tokens=4)
        for r in requests()
    ]
    got = run(engine, second)
    plain = make_engine(base, generation=1)
    want = run(
        plain,
        [request(r.request_id, r.prompt_ids, r.adapter and r.adapter.name, max_tokens=4) for r in requests()],
    )
    assert_same(got, want)
    assert any(got[key].token_ids[:3] != first[key].token_ids[:3] for key in got)
    assert graphs.num_captured == num_captured


def test_all_are_captured_at_the_start_and_touch_nobodys_pages(base: Path, capture: FrozenCapture) -> None:
    engine = make_engine(base)
    graphs = with_graphs(engine, capture)
    pools = engine._runner._cache._pools
    for pool in pools:
        pool.normal_()
    before = [pool.clone() for pool in pools]
    with torch.inference_mode():
        graphs.capture_all()
        for step in capture.steps:
            step.replay()
    assert graphs.num_captured == 2 * len(buckets(12)) == 20
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool[:, 1:], old[:, 1:])
        assert pool.isfinite().all()
    assert_same(run(engine, requests()), run(make_engine(base), requests()))
    assert graphs.num_captured == 20


def test_tables_that_grow_are_captured_anew(base: Path, capture: FrozenCapture) -> None:
    engine = make_engine(base)
    graphs = with_graphs(engine, capture)
    before = run(engine, requests())
    num_captured = graphs.num_captured
    arena = engine._runner.arena
    arena._take_experts(arena.rank_LE.shape[1] + 1)
    assert_same(run(engine, requests()), before)
    assert graphs.num_captured == 2 * num_captured


def test_loras_have_graphs_of_their_own(base: Path, capture: FrozenCapture, tmp_path: Path) -> None:
    """The first one leaves those of others as they are, and so does every further one; these share a step's graph."""
    engine = make_engine(base)
    graphs = with_graphs(engine, capture)
    run(engine, requests())
    before = dict(graphs._graphs)
    assert not any(kind.has_lora for kind in before)
    assert engine._runner.arena.lora is None
    model = AutoModelForCausalLM.from_pretrained(base / "base")
    catalog = AdapterCatalog(random_loras(tmp_path, model))
    plain = make_engine(base)
    num_captured = []
    for loras in (["LoRA-qv", "LoRA-all"], ["LoRA-patterns", "LoRA-one-layer"]):
        mixed = [
            request(r.request_id, r.prompt_ids, catalog.resolve(loras[i % 2]) if i % 3 else r.adapter, max_tokens=3 + i)
            for i, r in enumerate(requests())
        ]
        for one in mixed:
            if one.adapter is not None:  # read and in the arena: when a load ends decides who shares a step
                run(engine, [replace(one, request_id=f"{one.request_id} alone")])
        assert_same(run(engine, mixed), run(plain, mixed))
        num_captured.append(graphs.num_captured)
    assert num_captured[0] == num_captured[1]
    assert before.items() <= graphs._graphs.items()
    kinds = graphs._graphs.keys() - before.keys()
    assert {kind.width for kind in kinds if kind.has_lora} == {graphs._width}
    arena = engine._runner.arena
    assert arena.lora is not None
    arena._lora_tables(arena.lora.num_slots + 1)
    assert_same(run(engine, mixed), run(plain, mixed))
    assert graphs.num_captured > num_captured[1]
    assert before.items() <= graphs._graphs.items()


def test_what_cannot_be_captured_runs_as_it_is(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Callable[[], Tensor]) -> Any:
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine = make_engine(base)
    graphs = with_graphs(engine, refuse)
    with caplog.at_level(logging.WARNING):
        got = run(engine, requests())
    assert_same(got, run(make_engine(base), requests()))
    assert graphs.num_captured == 0
    warnings = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].endswith("cannot capture them: operation not permitted when stream is capturing")


def test_what_does_not_run_put_together_is_captured_as_it_is(
    base: Path, capture: FrozenCapture, caplog: pytest.LogCaptureFixture
) -> None:
    def fuse(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def fail() -> Tensor:
            raise RuntimeError("view size is not compatible")

        return fail

    engine = make_engine(base)
    graphs = with_graphs(engine, capture, fuse=fuse)
    with caplog.at_level(logging.INFO):
        assert_same(run(engine, requests()), run(make_engine(base), requests()))
    assert graphs.num_captured > 4
    assert "captured as they are, which is slower: view size is not compatible" in caplog.text


def test_a_capture_that_reads_a_value_back_is_refused() -> None:
    def step() -> Tensor:
        return torch.ones(3) * float(torch.ones(1))

    with pytest.raises(RuntimeError, match="reads a value back"):
        FrozenCapture()(step)


def test_the_stand_in_freezes_numbers_and_poisons() -> None:
    number, inside, outside = [2.0], torch.ones(2), torch.ones(2)

    def step() -> Tensor:
        return (inside * number[0]).add_(outside)

    replay, output = FrozenCapture()(step)
    number[0] = 5.0
    inside.fill_(3.0)
    replay()
    assert output.tolist() == [7.0, 7.0]


def test_buckets_and_widths() -> None:
    assert buckets(1) == (1,)
    assert buckets(13) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13)
    for sizes in (buckets(n) for n in range(1, 300)):
        assert all(4 * (b - a) <= max(a, 4) for a, b in itertools.pairwise(sizes))
    assert [width_class(n) for n in (0, 1, 2, 3, 8, 9)] == [0, 1, 2, 4, 8, 16]


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graphs"):
        EngineConfig(model="m", cuda_graphs="always")
