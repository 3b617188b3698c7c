"""What the two generating endpoints share: reading a request, following its completions.

In: HTTP requests with a JSON body. Out: HTTP replies. Each endpoint says how its requests become prompts and how its replies
look (`ReplyFormat`).
"""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.engine.events import EngineRequest, TokenEvent
from perft_serve.engine.params import RequestError
from perft_serve.inputs import InputProcessor
from perft_serve.outputs import CompletionStream, Delta, token_routing
from perft_serve.server.client import EngineClient, EventStream
from perft_serve.server.config import ServerConfig
from perft_serve.server.errors import ApiError
from perft_serve.server.exchange import exchange_of
from perft_serve.server.models import ModelNames
from perft_serve.server.protocol import PromptTokensDetails, RequestMetrics, RequestT, Routing, Usage, parse_request
from perft_serve.server.sse import CLIENT_CLOSED_REQUEST, EventStreamResponse, until_disconnect
from perft_serve.text import TextTokenizer

T = TypeVar("T")

# The prompt in a body of this length is tokenised in about a millisecond, and a longer body parsed; what may take longer goes
# to a thread, so that streams go on meanwhile. The body's length bounds all there is to do: characters, token ids, messages.
_INLINE_ENCODED_BYTES = 4096
_INLINE_PARSED_BYTES = 256 << 10

_FINGERPRINT_DIGITS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt of a request: its token ids, and its text if it was given as text."""

    ids: tuple[int, ...]
    text: str | None


class Fingerprint:
    """`system_fingerprint`: which base, and which adapter, a reply was computed with, by the beginnings of their digests.

    The adapter's is known from the first event on, before which nothing is sent.
    """

    def __init__(self, base_digest: str) -> None:
        self.text = f"fp_{base_digest[:_FINGERPRINT_DIGITS]}"
        self._has_adapter = False

    def see(self, deltas: Sequence[Delta]) -> None:
        """Learn the adapter's digest: all completions of a request are on the same version of it."""
        for delta in deltas:
            if delta.adapter_digest is not None and not self._has_adapter:
                self._has_adapter = True
                self.text += f"_{delta.adapter_digest[:_FINGERPRINT_DIGITS]}"


def routing_of(deltas: Sequence[Delta]) -> Routing | None:
    """Which adapter experts the tokens took that these deltas tell of; `None` if they tell of none."""
    routing = token_routing([delta.routing for delta in deltas if delta.routing is not None])
    if routing is None:
        return None
    return Routing(start=routing.start, layers=routing.layers, ids=routing.ids, weights=routing.weights)


class ReplyFormat(ABC):
    """How the completions of one request are written down; the choices are numbered over all prompts."""

    @abstractmethod
    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> str | None:
        """The stream's chunk for what was added to a choice, as JSON; `None` if there is nothing to show."""

    @abstractmethod
    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> str:
        """The stream's last chunk, with the token counts and the request's times (if they are to be told), as JSON."""

    @abstractmethod
    def whole(self, choices: Sequence[Sequence[Delta]], usage: Usage, metrics: RequestMetrics | None) -> str:
        """The reply that is not streamed, as JSON; all deltas of each choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMode:
    """Whether a reply is streamed, and what token counts it carries then."""

    stream: bool
    include_usage: bool
    continuous_usage: bool


class Generation:
    """One HTTP request in the engine: all its prompts, each with `n` completions.

    Args:
        prompts: the prompts with their engine requests.
        kept_ids: special tokens that are in the text, though others are not.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        prompts: Sequence[tuple[Prompt, Sequence[EngineRequest]]],
        reply: ReplyFormat,
        mode: StreamMode,
        *,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.requests = [request for _, requests in prompts for request in requests]
        self._index = {request.request_id: index for index, request in enumerate(self.requests)}
        self._choices = [
            CompletionStream(tokenizer, request.prompt_ids, request.params, kept_ids=kept_ids)
            for request in self.requests
        ]
        self._num_prompt_tokens = sum(len(prompt.ids) for prompt, _ in prompts)
        # Of each prompt, what none of its completions had to compute, as far as they have said; `None`: none has yet
        self._num_cached_tokens: list[int | None] = [None] * len(prompts)
        self._prompt_of = [position for position, (_, requests) in enumerate(prompts) for _ in requests]
        self._reply = reply
        self._mode = mode

    @property
    def streams(self) -> bool:
        """Whether the reply is streamed."""
        return self._mode.stream

    def requests_for(self, adapter: AdapterRef | None) -> Sequence[EngineRequest]:
        """The engine requests, all pinned to this version of their adapter."""
        return [
            request if request.adapter == adapter else replace(request, adapter=adapter) for request in self.requests
        ]

    def chunks(self, stream: EventStream, events: Iterable[TokenEvent]) -> Iterator[str]:
        """The chunks of a stream for some events."""
        for index, delta in self._deltas(stream, events):
            usage = self._usage() if self._mode.continuous_usage else None
            chunk = self._reply.chunk(index, delta, usage)
            if chunk is not None:
                yield chunk

    def last_chunks(self, metrics: RequestMetrics | None) -> Iterator[str]:
        """What a stream ends with."""
        if self._mode.include_usage:
            yield self._reply.usage_chunk(self._usage(), metrics)

    async def whole(self, submit: Callable[[], EventStream], metrics: Callable[[], RequestMetrics | None]) -> str:
        """Runs to the end, and gives the reply that is not streamed."""
        deltas: list[list[Delta]] = [[] for _ in self.requests]
        with submit() as stream:
            async for events in stream:
                for index, delta in self._deltas(stream, events):
                    deltas[index].append(delta)
        return self._reply.whole(deltas, self._usage(), metrics())

    def _deltas(self, stream: EventStream, events: Iterable[TokenEvent]) -> Iterator[tuple[int, Delta]]:
        for event in events:
            index = self._index[event.request_id]
            choice = self._choices[index]
            if choice.finished:  # by a stop string; the engine was a step ahead
                continue
            if event.num_cached_tokens is not None:
                self._count_cached(self._prompt_of[index], event.num_cached_tokens)
            delta = choice.push(event)
            if delta.finish_reason == "error":
                raise _failure(event, self.requests[index])
            if choice.stopped:
                stream.finish(event.request_id)
            yield index, delta

    def _count_cached(self, prompt: int, num_tokens: int) -> None:
        known = self._num_cached_tokens[prompt]
        self._num_cached_tokens[prompt] = num_tokens if known is None else min(known, num_tokens)

    def _usage(self) -> Usage:
        num_completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_completion_tokens,
            total_tokens=self._num_prompt_tokens + num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(count or 0 for count in self._num_cached_tokens)
            ),
        )


def _failure(event: TokenEvent, request: EngineRequest) -> Exception:
    """Why the engine gave a request up."""
    if event.error_kind == "adapter":
        return AdapterError(event.error)
    if event.error_kind == "deleted":
        return RequestError(str(event.error), param="model")
    if event.error_kind == "request":
        outputs = request.params.structured_outputs
        return RequestError(str(event.error), param=None if outputs is None else outputs.param)
    return ApiError(500, f"generation has failed: {event.error}")


class Service:
    """What an endpoint needs to answer a request."""

    def __init__(
        self, client: EngineClient, tokenizer: TextTokenizer | None, models: ModelNames, config: ServerConfig
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.models = models
        self.inputs = InputProcessor(tokenizer, client.limits)
        self._config = config
        self.tool_call_parser = config.tool_call_parser

    async def read_json(self, request: Request) -> bytes:
        """The body of a request that must be JSON, not yet parsed.

        Raises:
            ApiError: 415, it is not declared as JSON; 413, it is too long; 408, it does not come in time.
        """
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, f"the content-type must be application/json, not {content_type or 'empty'!r}")
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ApiError(415, f"the content-encoding {encoding!r} is not supported: send the body as it is")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._config.max_body_size:
            raise self._too_long()
        timeout = self._config.receive_timeout
        try:
            return await asyncio.wait_for(self._read(request), timeout)
        except asyncio.TimeoutError as error:
            message = f"the body has not come whole within {timeout} seconds"
            raise ApiError(408, message, headers={"connection": "close"}) from error

    async def _read(self, request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._config.max_body_size:
                raise self._too_long()
            parts.append(part)
        return b"".join(parts)

    async def parse(self, kind: type[RequestT], body: bytes) -> RequestT:
        """The request in a body.

        Raises:
            ApiError, RequestError: as `parse_request`.
        """
        return await _work(lambda: parse_request(kind, body), in_thread=len(body) > _INLINE_PARSED_BYTES)

    async def encode(self, body: bytes, work: Callable[[], T]) -> T:
        """Does `work`, which makes token ids of a body's prompts."""
        return await _work(work, in_thread=len(body) > _INLINE_ENCODED_BYTES)

    def _check_routing(self, requests: Sequence[EngineRequest]) -> None:
        """Refuse `return_routing` for more tokens than the server's bound: a reply has some hundred numbers a token."""
        num_tokens = 0
        for each in requests:
            if each.params.return_routing:
                room = self.client.limits.room(each.prompt_ids)
                num_tokens += 0 if each.choice else len(each.prompt_ids)
                num_tokens += room if each.params.max_tokens is None else each.params.max_tokens
        if num_tokens > self._config.max_routed_tokens:
            raise RequestError(
                f"return_routing of up to {num_tokens} tokens, prompts and completions together, but this server's limit is "
                f"{self._config.max_routed_tokens}: set a smaller max_tokens, or leave it out",
                param="return_routing",
            )

    async def respond(self, request: Request, generation: Generation, model: str) -> Response:
        """Runs a request in the engine and answers it; whatever is not finished when the client hangs up is aborted.

        Raises:
            RequestError: it asks for the routing of too many tokens.
        """
        self._check_routing(generation.requests)

        def submit() -> EventStream:
            # Once more: while the prompt was encoded, the adapter may have been reloaded or deleted, and a version that has
            # been let go takes no new requests.
            stream = self.client.submit(generation.requests_for(self.models.resolve(model, request.state.tenant)))
            exchange_of(request).follow(model, stream.recorders)
            return stream

        def metrics() -> RequestMetrics | None:
            return exchange_of(request).metrics if self._config.per_request_metrics == "on" else None

        if generation.streams:
            return EventStreamResponse(
                submit,
                generation.chunks,
                lambda: generation.last_chunks(metrics()),
                keep_alive=self._config.stream_keep_alive,
            )
        try:
            body = await until_disconnect(request.receive, generation.whole(submit, metrics))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(body, media_type="application/json")

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the body is longer than {self._config.max_body_size} bytes, which is this server's limit"
        )


async def _work(work: Callable[[], T], *, in_thread: bool) -> T:
    return await asyncio.to_thread(work) if in_thread else work()


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex
