"""`POST /v1/chat/completions`: a conversation in, answers out.

In: a `ChatRequest`. Out: a `ChatCompletion`, or `ChatChunk`s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from perft_serve.engine.params import RequestError
from perft_serve.outputs import Delta
from perft_serve.server.logprobs import LogprobFormat
from perft_serve.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    FunctionDelta,
    RequestMetrics,
    ToolCallDelta,
    Usage,
)
from perft_serve.server.service import Fingerprint, Generation, Prompt, ReplyFormat, Service, StreamMode, routing_of
from perft_serve.server.tools import FORMATS, CallDelta, Piece, ToolCallReader, ToolFormat, format_of


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
        tenant: str = request.state.tenant
        adapter = service.models.resolve(body.model, tenant)
        tool_format = self._tool_format(body)
        params = body.params(None if tool_format is None else self._grammar(body, tool_format))
        ids = await service.encode(raw, lambda: service.inputs.chat_ids(params=params, **body.rendering(body.messages)))
        request_id: str = request.state.request_id
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
        reply = ChatFormat(service, body, request_id, prompt, tool_format)
        marks = self._special(tool_format) if tool_format is not None else {}
        generation = Generation(
            service.tokenizer, [(prompt, requests)], reply, mode, kept_ids=frozenset(marks.values())
        )
        return await service.respond(request, generation, body.model)

    def _tool_format(self, body: ChatRequest) -> ToolFormat | None:
        """How the model writes tool calls; `None` if it may make none.

        Raises:
            RequestError: it knows of no tools, or nobody knows how it writes calls.
        """
        tokenizer = self._service.tokenizer
        if not body.offered_tools or tokenizer is None:
            return None
        tokenizer.check_tools()
        configured = self._service.tool_call_parser
        known = format_of(tokenizer.chat_template(with_tools=True)) if configured == "auto" else FORMATS[configured]
        if known is None:
            raise RequestError(
                "this model's chat template does not show how it writes tool calls: the server must be told "
                "(--tool-call-parser)",
                param="tools",
            )
        return known

    def _special(self, tool_format: ToolFormat) -> dict[str, int]:
        """The token ids of the marks that are special tokens."""
        tokenizer = self._service.tokenizer
        assert tokenizer is not None
        found = {mark: tokenizer.special_id(mark) for mark in (tool_format.begin, tool_format.end) if mark}
        return {mark: token_id for mark, token_id in found.items() if token_id is not None}

    def _grammar(self, body: ChatRequest, tool_format: ToolFormat) -> str | None:
        """The grammar that the answer must follow, if it must be a call."""
        forced = body.forced_tools()
        if forced is None:
            return None
        tools = [(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in forced]
        # one that is named is called once
        parallel = body.parallel_tool_calls is not False and body.tool_choice == "required"
        return tool_format.grammar(tools, self._special(tool_format), parallel=parallel)


class ChatFormat(ReplyFormat):
    """Answers as OpenAI's API writes them."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        request_id: str,
        prompt: Prompt,
        tool_format: ToolFormat | None = None,
    ) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._body = body
        self._prompt = prompt
        self._logprobs = LogprobFormat(service.tokenizer, as_token_ids=bool(body.return_tokens_as_token_ids))
        self._fingerprint = Fingerprint(service.client.base_digest)
        self._started: set[int] = set()
        self._tool_format = tool_format
        self._readers: dict[int, ToolCallReader] = {}

    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> str | None:
        self._fingerprint.see([delta])
        is_first = index not in self._started
        self._started.add(index)
        logprobs = self._logprobs_of([delta])
        shows_ids = bool(self._body.return_token_ids) and delta.token_id is not None
        piece = self._read(index, delta)
        if not (
            is_first or piece.content or piece.calls or delta.finish_reason or logprobs or shows_ids or delta.routing
        ):
            return None
        message = ChatMessage(role="assistant") if is_first else ChatMessage()
        if piece.content or not piece.calls:
            message.content = piece.content
        if piece.calls:
            message.tool_calls = [_call(call, with_index=True) for call in piece.calls]
        choice = ChatChunkChoice(
            index=index,
            delta=message,
            logprobs=logprobs,
            finish_reason=self._finish_reason(index, delta),
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

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> str:
        chunk = self._chunk([])
        chunk.usage = usage
        if metrics is not None:
            chunk.metrics = metrics
        return chunk.to_json()

    def whole(self, choices: Sequence[Sequence[Delta]], usage: Usage, metrics: RequestMetrics | None) -> str:
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
        if metrics is not None:
            completion.metrics = metrics
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
        content = ""
        calls: dict[int, CallDelta] = {}
        for delta in deltas:
            piece = self._read(index, delta)
            content += piece.content
            for call in piece.calls:
                calls.setdefault(call.index, CallDelta(index=call.index, id=call.id, name=call.name))
                calls[call.index].arguments += call.arguments
        finish_reason = self._finish_reason(index, deltas[-1])
        assert finish_reason is not None, "not finished"
        message = ChatMessage(role="assistant", content=content if content or not calls else None)
        if calls:
            message.tool_calls = [_call(call, with_index=False) for call in calls.values()]
        choice = ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs_of(deltas),
            finish_reason=finish_reason,
            stop_reason=deltas[-1].stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = _token_ids(deltas)
        if (routing := routing_of(deltas)) is not None:
            choice.routing = routing
        return choice

    def _read(self, index: int, delta: Delta) -> Piece:
        """What is text and what are tool calls of what was added to a choice."""
        if self._tool_format is None:
            return Piece(content=delta.text)
        reader = self._readers.get(index)
        if reader is None:
            parallel = self._body.parallel_tool_calls is not False
            reader = self._readers[index] = ToolCallReader(self._tool_format, parallel=parallel)
        piece = reader.push(delta.text)
        if delta.finish_reason is not None:
            piece.content += reader.flush().content
        return piece

    def _finish_reason(self, index: int, delta: Delta) -> ChatFinishReason | None:
        """Why a choice has ended: a call is a reason of its own, if it is whole."""
        reader = self._readers.get(index)
        if delta.finish_reason == "stop" and reader is not None and reader.num_calls:
            return "tool_calls"
        return delta.finish_reason

    def _logprobs_of(self, deltas: Sequence[Delta]) -> ChatLogprobs | None:
        entries = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        return self._logprobs.chat(entries) if entries else None


def _call(call: CallDelta, *, with_index: bool) -> ToolCallDelta:
    """A call, or what is added to it, as OpenAI's API writes it."""
    written = ToolCallDelta(function=FunctionDelta(arguments=call.arguments))
    if with_index:
        written.index = call.index
    if call.name is not None:
        written.id, written.type, written.function.name = call.id, "function", call.name
    return written


def _token_ids(deltas: Sequence[Delta]) -> list[int]:
    return [delta.token_id for delta in deltas if delta.token_id is not None]
