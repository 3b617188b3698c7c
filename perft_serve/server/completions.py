"""`POST /v1/completions`: prompts in, completions out.

In: a `CompletionRequest`. Out: `Completion`s, whole or in chunks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from perft_serve.engine.events import EngineRequest, TokenLogprobs
from perft_serve.engine.params import SamplingParams
from perft_serve.outputs import Delta
from perft_serve.server.logprobs import LogprobFormat, shortened
from perft_serve.server.protocol import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    PromptLogprobs,
    RequestMetrics,
    Usage,
)
from perft_serve.server.service import Fingerprint, Generation, Prompt, ReplyFormat, Service, StreamMode, routing_of


class CompletionEndpoint:
    """Answers completion requests."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Completes one prompt or several."""
        service = self._service
        arrival = time.monotonic()
        raw = await service.read_json(request)
        body = await service.parse(CompletionRequest, raw)
        tenant: str = request.state.tenant
        adapter = service.models.resolve(body.model, tenant)
        given = body.prompts()
        service.client.check_number(len(given) * (body.n or 1))
        whole = body.params(room=service.client.limits.max_model_len)
        prompts = await service.encode(raw, lambda: self._encode(given, body, whole))
        request_id: str = request.state.request_id
        numbered: list[tuple[Prompt, Sequence[EngineRequest]]] = []
        for number, prompt in enumerate(prompts):
            params = body.params(room=service.client.limits.room(prompt.ids))
            name = f"{request_id}-{number}"
            requests = service.inputs.engine_requests(
                name,
                prompt.ids,
                params,
                adapter=adapter,
                arrival=arrival,
                cache_scope=body.cache_scope(tenant),
                priority=body.priority or 0,
                tenant=tenant,
                scored_once=not body.scores_echo,
            )
            numbered.append((prompt, requests))
        options = body.stream_options
        mode = StreamMode(
            stream=bool(body.stream),
            include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
        )
        reply = CompletionFormat(service, body, request_id, prompts)
        return await service.respond(request, Generation(service.tokenizer, numbered, reply, mode), body.model)

    def _encode(
        self, given: Sequence[str] | Sequence[list[int]], body: CompletionRequest, params: SamplingParams
    ) -> list[Prompt]:
        special = body.add_special_tokens is not False
        prompts = []
        for prompt in given:
            ids = self._service.inputs.prompt_ids(prompt, params, add_special_tokens=special)
            text = prompt if isinstance(prompt, str) else None
            if text is not None and params.truncate_prompt_tokens is not None:
                text = self._service.inputs.text_of(ids)
            prompts.append(Prompt(ids=ids, text=text))
        return prompts


class CompletionFormat(ReplyFormat):
    """Completions as OpenAI's API writes them."""

    def __init__(self, service: Service, body: CompletionRequest, request_id: str, prompts: Sequence[Prompt]) -> None:
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._body = body
        self._prompts = prompts
        self._tokenizer = service.tokenizer
        self._fingerprint = Fingerprint(service.client.base_digest)
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}  # by prompt: of its first choice, for all of them
        self._logprobs = LogprobFormat(service.tokenizer, as_token_ids=bool(body.return_tokens_as_token_ids))
        # A base without a tokenizer has nothing else to say
        self._wants_ids = bool(body.return_token_ids) or service.tokenizer is None
        self._started: set[int] = set()

    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> str | None:
        self._fingerprint.see([delta])
        choice = self._choice(index, [delta], is_first=index not in self._started)
        self._started.add(index)
        has_ids = self._wants_ids and choice.token_ids
        if not (choice.text or choice.finish_reason or choice.logprobs or has_ids or delta.routing):
            return None
        chunk = self._completion([choice])
        if usage is not None:
            chunk.usage = usage
        return chunk.to_json()

    def usage_chunk(self, usage: Usage, metrics: RequestMetrics | None) -> str:
        chunk = self._completion([])
        chunk.usage = usage
        if metrics is not None:
            chunk.metrics = metrics
        return chunk.to_json()

    def whole(self, choices: Sequence[Sequence[Delta]], usage: Usage, metrics: RequestMetrics | None) -> str:
        for deltas in choices:
            self._fingerprint.see(deltas)
        completion = self._completion(
            [self._choice(index, deltas, is_first=True) for index, deltas in enumerate(choices)]
        )
        completion.usage = usage
        if metrics is not None:
            completion.metrics = metrics
        return completion.to_json()

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            system_fingerprint=self._fingerprint.text,
            choices=choices,
        )

    def _choice(self, index: int, deltas: Sequence[Delta], *, is_first: bool) -> CompletionChoice:
        prompt_number = index // (self._body.n or 1)
        prompt = self._prompts[prompt_number]
        echo = self._echo(prompt) if self._body.echo else ""
        entries: list[tuple[int, TokenLogprobs | None]] = []
        offsets: list[int] = []
        if self._body.logprobs is not None:
            for delta in deltas:
                if is_first and self._body.echo and delta.prompt_logprobs is not None:
                    scores = [shortened(entry, self._body.logprobs) for entry in delta.prompt_logprobs]
                    entries += zip(prompt.ids, scores, strict=True)
                    offsets += self._logprobs.prompt_offsets(prompt.ids, skip_special_tokens=prompt.text is not None)
                if delta.token_id is not None:
                    entries.append((delta.token_id, delta.logprobs))
                    offsets.append(len(echo) + delta.text_offset)
        choice = CompletionChoice(
            index=index,
            text=(echo if is_first else "") + "".join(delta.text for delta in deltas),
            logprobs=self._logprobs.completion(entries, offsets) if entries else None,
            finish_reason=deltas[-1].finish_reason,
            stop_reason=deltas[-1].stop_reason,
        )
        if self._body.prompt_logprobs is not None:
            for delta in deltas:
                if delta.prompt_logprobs is not None and prompt_number not in self._prompt_logprobs:
                    self._prompt_logprobs[prompt_number] = self._logprobs.prompt(
                        delta.prompt_logprobs, self._body.prompt_logprobs
                    )
            choice.prompt_logprobs = self._prompt_logprobs[prompt_number]
        if (routing := routing_of(deltas)) is not None:
            choice.routing = routing
        if self._wants_ids:
            choice.token_ids = [delta.token_id for delta in deltas if delta.token_id is not None]
            if is_first:
                choice.prompt_token_ids = list(prompt.ids)
        return choice

    def _echo(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt.ids)
