"""`return_routing`: the adapter experts and weights that the engine tells of are those of the PEFT model's own router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import Output, request, run, step
from served import Served
from torch import Tensor

from perft.layer import PerftLayer
from perft_serve.engine.decode_programs import DecodePrograms
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest, Routing
from perft_serve.engine.params import RequestError
from perft_serve.outputs import TokenRouting, token_routing

PROMPT = [9, 8, 7, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]


class Told:
    """Collects the routing in an engine's events."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: dict[str, list[Routing]] = {}
        take = engine.step

        def stepping() -> Any:
            events = take()
            for event in events:
                if event.routing is not None:
                    self.parts.setdefault(event.request_id, []).append(event.routing)
            return events

        monkeypatch.setattr(engine, "step", stepping)

    def of(self, request_id: str) -> TokenRouting:
        routing = token_routing(self.parts.get(request_id, []))
        assert routing is not None, f"nothing was told of {request_id}"
        for before, after in zip(self.parts[request_id], self.parts[request_id][1:], strict=False):
            assert after.start == before.start + len(before.ids) // (4 * len(before.layers) * before.width)
        return routing


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[Tensor, Tensor]]:
    """What the router of the PEFT model has chosen in its last pass, by layer."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    route = PerftLayer._route

    def watched(self: PerftLayer, *args: Any) -> tuple[Tensor, Tensor]:
        found[self.block.layer] = route(self, *args)
        return found[self.block.layer]

    monkeypatch.setattr(PerftLayer, "_route", watched)
    return found


def assert_as_peft(
    served: Served,
    chosen: dict[int, tuple[Tensor, Tensor]],
    adapter: str,
    ids: list[int],
    told: TokenRouting,
    start: int = 0,
) -> None:
    chosen.clear()
    served.logits(adapter, ids)
    assert told.start == start
    assert told.layers == sorted(chosen)
    assert len(told.ids) == len(told.weights) == len(ids) - start
    for l, layer in enumerate(told.layers):
        want_ids, want_weights = chosen[layer]
        assert [row[l] for row in told.ids] == want_ids[start:].tolist(), layer
        got = torch.tensor([row[l] for row in told.weights])
        torch.testing.assert_close(got, want_weights[start:].float(), atol=1e-4, rtol=1e-4)


def asked(adapter: str, prompt: list[int] = PROMPT, **params: Any) -> EngineRequest:
    return request(f"asked/{adapter}", prompt, adapter, return_routing=True, **params)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decode_programs": "off"},
        {"max_num_seqs": 7, "max_num_batched_tokens": 7},
        {"kv_memory": 1 << 15},
        {"kv_memory": 1 << 15, "max_num_seqs": 9, "max_num_batched_tokens": 9},
    ],
    ids=["as it is", "no programs", "small chunks", "preempted", "preempted, small chunks"],
)
def test_every_variant_in_one_batch(
    mixtral: Served,
    chosen: dict[int, tuple[Tensor, Tensor]],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside others that do not ask, and with their prompts in the prefix cache already."""
    engine = mixtral.engine(**settings)
    told = Told(engine, monkeypatch)
    run(engine, [request(f"before/{name}", PROMPT, name) for name in mixtral.adapters])
    requests = [asked(name, max_tokens=20) for name in mixtral.adapters]
    requests += [request(f"silent/{name}", PROMPT, name, max_tokens=20) for name in (None, "R-lora", "E-lora")]
    outputs = run(engine, requests)
    if "kv_memory" in settings:
        assert engine.stats().num_preemptions > 0
    assert told.parts.keys() == {f"asked/{name}" for name in mixtral.adapters}
    for name in mixtral.adapters:
        output = outputs[f"asked/{name}"]
        assert output.num_cached_tokens == 0, "what is told is computed"
        told_of = told.of(f"asked/{name}")
        assert_as_peft(mixtral, chosen, name, PROMPT + output.token_ids[:-1], told_of)
    for name in ("R-lora", "E-lora"):
        assert outputs[f"asked/{name}"].token_ids == outputs[f"silent/{name}"].token_ids


def test_other_choices_tell_of_their_own_tokens_only(
    mixtral: Served, chosen: dict[int, tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they may have the prompt out of the prefix cache."""
    engine = mixtral.engine()
    told = Told(engine, monkeypatch)
    run(engine, [request("before", PROMPT, "R-norm")])
    other = request("other", PROMPT, "R-norm", choice=1, return_routing=True)
    output = run(engine, [other])["other"]
    assert output.num_cached_tokens == 16
    assert_as_peft(mixtral, chosen, "R-norm", PROMPT + output.token_ids[:-1], told.of("other"), start=len(PROMPT))


def test_a_prompt_that_is_only_scored(
    mixtral: Served, chosen: dict[int, tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = mixtral.engine()
    told = Told(engine, monkeypatch)
    run(engine, [asked("R-lora", max_tokens=0, prompt_logprobs=0)])
    assert_as_peft(mixtral, chosen, "R-lora", PROMPT, told.of("asked/R-lora"))


def test_the_base_has_none(mixtral: Served) -> None:
    engine = mixtral.engine()
    with pytest.raises(RequestError, match="the base has no adapter experts"):
        engine.submit(request("x", PROMPT, return_routing=True))


def test_steps_in_which_nobody_asks_run_as_ever(mixtral: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode programs are refused to those steps only in which somebody does."""
    engine = mixtral.engine()
    kept: list[bool] = []
    run_program = DecodePrograms.run

    def watched(self: DecodePrograms, batch: Any) -> Any:
        kept.append(bool(batch.routed_rows))
        return run_program(self, batch)

    monkeypatch.setattr(DecodePrograms, "run", watched)
    run(engine, [request("plain", PROMPT, "R-lora")])
    assert not any(kept)
    assert engine._runner._seam.routed == {}
    engine.submit(asked("R-lora", max_tokens=3))
    engine.submit(request("plain", PROMPT, "R-lora", max_tokens=9))
    kept.clear()
    outputs = {"asked/R-lora": Output(), "plain": Output()}
    while engine.has_work():
        step(engine, outputs)
    assert kept == [False] * 6  # of nine steps
    assert engine._runner._seam.routed == {}
