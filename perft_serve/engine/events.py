"""What goes into the engine and what comes out of it: requests and token events. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perft_serve.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One sequence to generate (a request with `n` > 1 is `n` of these, told apart by `choice`).

    Args:
        request_id: unique among the requests in flight.
        prompt_ids: token ids of the prompt, at least one.
        params: sampling parameters; `n` and `stop` (strings) are the caller's business, not the engine's.
        adapter: name of a resident adapter, or `None` for the base.
        choice: which of the `n` completions this is; it enters the seed, so that they differ.
        arrival: `time.monotonic()` when the request came in.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None
    choice: int = 0
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token that is there, and of the likeliest ones, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """When a request's life's steps happened (`time.monotonic()`, one process): sent with its first token."""

    arrival: float
    scheduled: float
    first_token: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One step forward of one request. The last event of a request, and only that, has a `finish_reason`.

    Args:
        token_id: the new token; `None` when the request ended without one (aborted, failed, `max_tokens` 0).
        logprobs: of the new token, if asked for.
        prompt_logprobs: one entry per prompt token, the first `None`; on the first event, if asked for.
        finish_reason: `stop` (end-of-sequence or a stop token: `stop_reason` holds a stop token's id), `length`,
            `abort`, `error` (`error` says why).
        timing: on the first event.
    """

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    timing: Timing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine's state after a step, for metrics."""

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    num_steps: int
