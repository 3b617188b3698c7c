"""`POST /v1/chat/completions`: a conversation in, answers out.

In: a `ChatRequest`. Out: a `ChatCompletion`, or `ChatChunk`s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from perft_serve.outputs import Delta
from perft_serve.server.logprobs import LogprobFormat
from perft_serve.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Usage,
)
from perft_serve.server.service import Fingerprint, Generation, Prompt, ReplyFormat, Service, StreamMode, routing_of


class ChatEndpoint:
    """Answers chat requests."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Answers a conversation."""
        service = self._service
        arrival = time.monotonic()
        raw = await service.read_json(request)
        body = await service.parse(ChatRequest, raw)
        adapter = service.models.resolve(body.model)
        params = body.params()
        ids = await service.encode(
            raw, lambda: service.inputs.chat_ids([message.as_dict() for message in body.messages], params)
        )
        request_id: str = request.state.request_id
        tenant: str = request.state.tenant
        requests = service.inputs.engine_requests(
            request_id,
            ids,
            params,
            adapter=adapter,
            arrival=arrival,
            cache_scope=body.cache_scope(tenant),
            priority=body.priority or 0,
            tenant=tenant,
        )
        options = body.stream_options
        mode = StreamMode(
            stream=bool(body.stream),
            include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
        )
        prompt = Prompt(ids=ids, text=None)
        reply = ChatFormat(service, body, request_id, prompt)
        return await service.respond(
            request, Generation(service.tokenizer, [(prompt, requests)], reply, mode), body.model
        )


class ChatFormat(ReplyFormat):
    """Answers as OpenAI's API writes them."""

    def __init__(self, service: Service, body: ChatRequest, request_id: str, prompt: Prompt) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._body = body
        self._prompt = prompt
        self._logprobs = LogprobFormat(service.tokenizer, as_token_ids=bool(body.return_tokens_as_token_ids))
        self._fingerprint = Fingerprint(service.client.base_digest)
        self._started: set[int] = set()

    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> str | None:
        self._fingerprint.see([delta])
        is_first = index not in self._started
        self._started.add(index)
        logprobs = self._logprobs_of([delta])
        shows_ids = bool(self._body.return_token_ids) and delta.token_id is not None
        if not (is_first or delta.text or delta.finish_reason or logprobs or shows_ids or delta.routing):
            return None
        message = ChatMessage(role="assistant", content=delta.text) if is_first else ChatMessage(content=delta.text)
        choice = ChatChunkChoice(
            index=index,
            delta=message,
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if shows_ids:
            choice.token_ids = _token_ids([delta])
        if (routing := routing_of([delta])) is not None:
            choice.routing = routing
        chunk = self._chunk([choice])
        if is_first and self._body.return_token_ids:
            chunk.prompt_token_ids = list(self._prompt.ids)
        if usage is not None:
            chunk.usage = usage
        return chunk.to_json()

    def usage_chunk(self, usage: Usage) -> str:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk.to_json()

    def whole(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> str:
        for deltas in choices:
            self._fingerprint.see(deltas)
        completion = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            system_fingerprint=self._fingerprint.text,
            choices=[self._choice(index, deltas) for index, deltas in enumerate(choices)],
            usage=usage,
        )
        if self._body.return_token_ids:
            completion.prompt_token_ids = list(self._prompt.ids)
        if self._body.prompt_logprobs is not None:
            scores = next(delta.prompt_logprobs for delta in choices[0] if delta.prompt_logprobs is not None)
            completion.prompt_logprobs = self._logprobs.prompt(scores, self._body.prompt_logprobs)
        return completion.to_json()

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            system_fingerprint=self._fingerprint.text,
            choices=choices,
        )

    def _choice(self, index: int, deltas: Sequence[Delta]) -> ChatChoice:
        finish_reason = deltas[-1].finish_reason
        assert finish_reason is not None, "not finished"
        choice = ChatChoice(
            index=index,
            message=ChatMessage(role="assistant", content="".join(delta.text for delta in deltas)),
            logprobs=self._logprobs_of(deltas),
            finish_reason=finish_reason,
            stop_reason=deltas[-1].stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = _token_ids(deltas)
        if (routing := routing_of(deltas)) is not None:
            choice.routing = routing
        return choice

    def _logprobs_of(self, deltas: Sequence[Delta]) -> ChatLogprobs | None:
        entries = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        return self._logprobs.chat(entries) if entries else None


def _token_ids(deltas: Sequence[Delta]) -> list[int]:
    return [delta.token_id for delta in deltas if delta.token_id is not None]
