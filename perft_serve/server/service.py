"""What the two generating endpoints share: the model's names, reading a request, following its completions.

In: HTTP requests with a JSON body. Out: HTTP replies. Each endpoint says how its requests become prompts and how its replies
look (`ReplyFormat`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from perft_serve.engine.events import EngineRequest, TokenEvent
from perft_serve.inputs import InputProcessor
from perft_serve.outputs import CompletionStream, Delta
from perft_serve.server.client import EngineClient, EventStream
from perft_serve.server.errors import ApiError
from perft_serve.server.protocol import AdapterCard, ModelCard, ModelList, Usage
from perft_serve.server.sse import EventStreamResponse, until_disconnect
from perft_serve.text import TextTokenizer

T = TypeVar("T")

# Text of this length is tokenised in about a millisecond; longer text goes to a thread, so that streams go on meanwhile.
_INLINE_CHARACTERS = 4096
# nginx's status for it; only logs and metrics see it.
_CLIENT_CLOSED_REQUEST = 499


class ModelNames:
    """The names that requests may have in `model`: the base's and the adapters'.

    Raises:
        ValueError: an adapter has the base's name.
    """

    def __init__(self, base_name: str, client: EngineClient) -> None:
        self._base_name = base_name
        self._adapters = {info.name: info for info in client.adapters}
        self._max_model_len = client.limits.max_model_len
        self._created = int(time.time())
        if base_name in self._adapters:
            raise ValueError(
                f"an adapter and the base are both named {base_name!r}: give the base another --served-model-name"
            )

    def adapter(self, model: str) -> str | None:
        """The adapter that `model` names; `None` for the base.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model == self._base_name:
            return None
        if model not in self._adapters:
            raise ApiError(
                404, f"The model {model!r} does not exist; GET /v1/models lists those that do.", param="model"
            )
        return model

    def card(self, model: str) -> ModelCard:
        """A model as `GET /v1/models` shows it.

        Raises:
            ApiError: 404, there is no such model.
        """
        adapter = self.adapter(model)
        card = ModelCard(
            id=model,
            object="model",
            created=self._created,
            owned_by="perft-serve",
            root=self._base_name,
            parent=None if adapter is None else self._base_name,
            max_model_len=self._max_model_len,
        )
        if adapter is not None:
            info = self._adapters[adapter]
            card.adapter = AdapterCard(
                variant=info.variant,
                unit=info.unit,
                num_experts=info.num_experts,
                top_k=info.top_k,
                r=info.r,
                num_parameters=info.num_parameters,
                digest=info.digest,
            )
        return card

    def list(self) -> ModelList:
        """All models, the base first."""
        return ModelList(object="list", data=[self.card(name) for name in (self._base_name, *self._adapters)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt of a request: its token ids, and its text if it was given as text."""

    ids: tuple[int, ...]
    text: str | None


class ReplyFormat(ABC):
    """How the completions of one request are written down; the choices are numbered over all prompts."""

    @abstractmethod
    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> str | None:
        """The stream's chunk for what was added to a choice, as JSON; `None` if there is nothing to show."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> str:
        """The stream's last chunk, with the token counts, as JSON."""

    @abstractmethod
    def whole(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> str:
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
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        prompts: Sequence[tuple[Prompt, Sequence[EngineRequest]]],
        reply: ReplyFormat,
        mode: StreamMode,
    ) -> None:
        self.requests = [request for _, requests in prompts for request in requests]
        self._index = {request.request_id: index for index, request in enumerate(self.requests)}
        self._choices = [CompletionStream(tokenizer, request.prompt_ids, request.params) for request in self.requests]
        self._num_prompt_tokens = sum(len(prompt.ids) for prompt, _ in prompts)
        self._reply = reply
        self._mode = mode

    @property
    def streams(self) -> bool:
        """Whether the reply is streamed."""
        return self._mode.stream

    def chunks(self, stream: EventStream, events: Iterable[TokenEvent]) -> Iterator[str]:
        """The chunks of a stream for some events."""
        for index, delta in self._deltas(stream, events):
            usage = self._usage() if self._mode.continuous_usage else None
            chunk = self._reply.chunk(index, delta, usage)
            if chunk is not None:
                yield chunk

    def last_chunks(self) -> Iterator[str]:
        """What a stream ends with."""
        if self._mode.include_usage:
            yield self._reply.usage_chunk(self._usage())

    async def whole(self, submit: Callable[[], EventStream]) -> str:
        """Runs to the end, and gives the reply that is not streamed."""
        deltas: list[list[Delta]] = [[] for _ in self.requests]
        with submit() as stream:
            async for events in stream:
                for index, delta in self._deltas(stream, events):
                    deltas[index].append(delta)
        return self._reply.whole(deltas, self._usage())

    def _deltas(self, stream: EventStream, events: Iterable[TokenEvent]) -> Iterator[tuple[int, Delta]]:
        for event in events:
            index = self._index[event.request_id]
            choice = self._choices[index]
            if choice.finished:  # by a stop string; the engine was a step ahead
                continue
            delta = choice.push(event)
            if delta.finish_reason == "error":
                raise ApiError(500, f"generation has failed: {delta.error}")
            if choice.stopped:
                stream.finish(event.request_id)
            yield index, delta

    def _usage(self) -> Usage:
        num_completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_completion_tokens,
            total_tokens=self._num_prompt_tokens + num_completion_tokens,
        )


class Service:
    """What an endpoint needs to answer a request."""

    def __init__(
        self, client: EngineClient, tokenizer: TextTokenizer | None, models: ModelNames, *, max_body_size: int
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.models = models
        self.inputs = InputProcessor(tokenizer, client.limits)
        self._max_body_size = max_body_size

    async def read_json(self, request: Request) -> bytes:
        """The body of a request that must be JSON, not yet parsed.

        Raises:
            ApiError: 415, it is not declared as JSON; 413, it is too long.
        """
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, f"the content-type must be application/json, not {content_type or 'empty'!r}")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_size:
            raise self._too_long()
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body_size:
                raise self._too_long()
            parts.append(part)
        return b"".join(parts)

    async def encode(self, num_characters: int, work: Callable[[], T]) -> T:
        """Does tokenisation `work`, in a thread if it may take long."""
        return work() if num_characters <= _INLINE_CHARACTERS else await asyncio.to_thread(work)

    async def respond(self, request: Request, generation: Generation) -> Response:
        """Runs a request in the engine and answers it; whatever is not finished when the client hangs up is aborted."""

        def submit() -> EventStream:
            return self.client.submit(generation.requests)

        if generation.streams:
            return EventStreamResponse(submit, generation.chunks, generation.last_chunks)
        try:
            body = await until_disconnect(request.receive, generation.whole(submit))
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return Response(body, media_type="application/json")

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max_body_size} bytes, which is this server's limit")


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex
