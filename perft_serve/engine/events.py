"""What goes into the engine and what comes out of it: requests and token events. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterMemory
from perft_serve.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorKind = Literal["engine", "adapter", "deleted", "request"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One sequence to generate (a request with `n` > 1 is `n` of these, told apart by `choice`).

    Args:
        request_id: unique among the requests in flight.
        prompt_ids: token ids of the prompt, at least one.
        params: sampling parameters; `n` and the strings (`stop`, `bad_words`) are the caller's business, not the engine's.
        adapter: the version of an adapter that the request is pinned to, or `None` for the base.
        choice: which of the `n` completions this is; it enters the seed, so that they differ.
        arrival: `time.monotonic()` when the request came in.
        bad_words: `params.bad_words` as token ids: sequences that must not be generated.
        cache_scope: requests of different scopes never share a page of the prefix cache.
        priority: where the scheduling policy minds it, lower goes first.
        tenant: whose request it is, for a scheduling policy that is fair between tenants.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterRef | None = None
    choice: int = 0
    arrival: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_scope: str = ""
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token that is there, and of the likeliest ones, likeliest first.

    `rank` is one more than how many tokens are likelier than the one that is there.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which adapter experts some tokens that follow one another took, in the layers that their adapter is in.

    Args:
        start: position of the first of the tokens in its sequence.
        layers: numbers of the layers, L of them.
        width: adapter experts that a token takes at the most, k.
        ids: adapter experts `[T, L, k]`, counted from 0 in each layer, as int32 in the machine's byte order; -1: none.
        weights: what their outputs were multiplied with, `[T, L, k]`, as float32.
    """

    start: int
    layers: tuple[int, ...]
    width: int
    ids: bytes
    weights: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """When the steps of a request's life happened, all by the engine's clock: sent with its first token.

    Args:
        queued: it reached the engine.
        scheduled: it became part of a step for the first time.
        first_token: that step, or a later one, gave its first token.
    """

    queued: float
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
        completes: it is over (`stop`) because its grammar has nothing to add: the last token is of the text.
        error_kind: whose error it is: the adapter's, which could not be loaded; nobody's, it was deleted while the request
            was in flight; the request's, which left no token to choose; or else the engine's.
        timing: on the first event, unless the request ended before it was ever scheduled.
        num_cached_tokens: how many tokens of the prompt were found in the prefix cache; on the first event.
        adapter_digest: identity of what the adapter computes, which the request ran on; on the first event.
        routing: of the tokens that were computed since the last event, if asked for; the last token never is.
    """

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    completes: bool = False
    error: str | None = None
    error_kind: ErrorKind | None = None
    timing: Timing | None = None
    num_cached_tokens: int | None = None
    adapter_digest: str | None = None
    routing: Routing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine's state after a step, for metrics.

    Args:
        num_pages: pages of the KV cache.
        num_running: requests that hold KV pages.
        num_waiting: requests that hold none: for want of pages or of room in the batch, or for their adapter.
        kv_usage: share of the KV pages that requests hold, in [0, 1]; what the prefix cache keeps besides is free.
        num_preemptions, num_steps: since the start.
        prefix_queries: prompt tokens looked up in the prefix cache since the start.
        prefix_hits: prompt tokens found there.
        adapters: the adapters' memory.
    """

    num_pages: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_preemptions: int = 0
    num_steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    adapters: AdapterMemory = field(default_factory=AdapterMemory)
