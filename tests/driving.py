"""Driving an engine from a test: submit, step until done, collect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def add(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "an event after the last one"
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.finish_reason, self.error = event.finish_reason, event.error


def request(
    request_id: str, prompt_ids: Sequence[int], adapter: str | None = None, choice: int = 0, **params: Any
) -> EngineRequest:
    """A greedy request for 8 tokens with log-probabilities, unless told otherwise."""
    settings = {"max_tokens": 8, "temperature": 0.0, "logprobs": 0, **params}
    return EngineRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        adapter=adapter,
        choice=choice,
        params=SamplingParams(**settings),
    )


def run(engine: Engine, requests: Sequence[EngineRequest], max_steps: int = 2000) -> dict[str, Output]:
    """Submit all, step until nothing is left; outputs by request id."""
    for one in requests:
        engine.submit(one)
    outputs = {one.request_id: Output() for one in requests}
    for _ in range(max_steps):
        if not engine.has_work():
            break
        for event in engine.step():
            outputs[event.request_id].add(event)
    assert not engine.has_work(), f"not done after {max_steps} steps"
    assert engine.stats().kv_usage == 0
    return outputs
