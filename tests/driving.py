"""Driving an engine from a test: submit, step until done, collect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest, TokenEvent, TokenLogprobs
from perft_serve.engine.params import SamplingParams


@dataclass(slots=True)
class Output:
    """All that came out for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    error: str | None = None
    num_cached_tokens: int | None = None

    def add(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "an event after the last one"
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.num_cached_tokens is not None:
            assert self.num_cached_tokens is None, "said once"
            self.num_cached_tokens = event.num_cached_tokens
        self.finish_reason, self.error = event.finish_reason, event.error


def request(
    request_id: str,
    prompt_ids: Sequence[int],
    adapter: str | AdapterRef | None = None,
    choice: int = 0,
    scope: str = "",
    **params: Any,
) -> EngineRequest:
    """A greedy request for 8 tokens with log-probabilities, unless told otherwise.

    A name as `adapter` stands for one that the engine was given at its start.
    """
    settings = {"max_tokens": 8, "temperature": 0.0, "logprobs": 0, **params}
    return EngineRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        adapter=AdapterRef(name=adapter, source="given at the start") if isinstance(adapter, str) else adapter,
        choice=choice,
        cache_scope=scope,
        params=SamplingParams(**settings),
    )


def step(engine: Engine, outputs: dict[str, Output]) -> None:
    """One step, or a wait for the adapters that all wait for."""
    if not engine.has_work():
        assert engine.wait(30), "nothing comes any more"
    for event in engine.step():
        outputs[event.request_id].add(event)


def run(engine: Engine, requests: Sequence[EngineRequest], max_steps: int = 2000) -> dict[str, Output]:
    """Submit all, step until nothing is left; outputs by request id."""
    for one in requests:
        engine.submit(one)
    outputs = {one.request_id: Output() for one in requests}
    for _ in range(max_steps):
        if all(output.finish_reason is not None for output in outputs.values()):
            break
        step(engine, outputs)
    assert all(output.finish_reason is not None for output in outputs.values()), f"not done after {max_steps} steps"
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    return outputs
