"""`LLM`: the engine without a server, for scripts and tests, with vLLM's names.

In: prompts (text, token ids or chat messages), sampling parameters, an adapter's name per prompt. Out: results in the order
of the prompts. Drives the engine step by step in the caller's thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.inputs import InputProcessor
from perft_serve.outputs import CompletionCollector, RequestOutput, logprob_dict
from perft_serve.text import load_tokenizer

Prompt: TypeAlias = "str | Sequence[int]"
Message: TypeAlias = "Mapping[str, str]"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A prompt on its way: its engine requests and the completions that grow from them."""

    prompt: str | None
    adapter: str | None
    requests: list[EngineRequest]
    completions: list[CompletionCollector]


class LLM:
    """A base model and its adapters, in this process.

    Args:
        model: folder or Hub id of the base.
        adapters: name to folder.
        settings: fields of `EngineConfig` (`dtype`, `max_num_seqs`, `kv_memory`, ...).

    Raises:
        BaseModelError: the base cannot be used.
        AdapterError: an adapter is broken or does not fit the base.
        ValueError: a setting is out of its range.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, **settings: Any) -> None:
        self.config = EngineConfig(model=model, adapters=dict(adapters or {}), **settings)
        self.tokenizer = load_tokenizer(model)
        self.engine = Engine(self.config)
        self._inputs = InputProcessor(self.tokenizer, self.engine.limits)
        self._request_numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, all in one batch as far as the engine's settings allow.

        Args:
            prompts: one prompt, or a list of them; a prompt is a string or a list of token ids.
            params: for all prompts, or a list with one per prompt.
            adapter: name of the adapter for all prompts (`None`: the base), or a list with one per prompt.
            progress: show a progress bar.

        Returns:
            One result per prompt, in order.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing has run then.
        """
        prompt_list = _prompt_list(prompts)
        return self._run(
            [(prompt if isinstance(prompt, str) else None, self._inputs.prompt_ids(prompt)) for prompt in prompt_list],
            params,
            adapter,
            progress,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers conversations, written in the tokenizer's own chat template.

        Args:
            messages: one conversation (a list of `{"role": ..., "content": ...}`), or a list of conversations.
            params, adapter, progress: as in `generate`.

        Raises:
            RequestError: as in `generate`; or the model has no chat template.
        """
        if not messages:
            raise RequestError("there are no messages", param="messages")
        single = isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if single else messages)
        encoded: list[tuple[str | None, tuple[int, ...]]] = []
        for conversation in conversations:
            ids = self._inputs.chat_ids([dict(message) for message in conversation])
            encoded.append((self.tokenizer.decode(ids) if self.tokenizer else None, ids))
        return self._run(encoded, params, adapter, progress)

    def _run(
        self,
        prompts: Sequence[tuple[str | None, tuple[int, ...]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        num_prompts = len(prompts)
        params_list = _one_per_prompt(
            "params", SamplingParams() if params is None else params, num_prompts, SamplingParams
        )
        adapter_list = _one_per_prompt("adapter", adapter, num_prompts, str)
        known = {info.name for info in self.engine.list_adapters()}
        for name in adapter_list:
            if name is not None and name not in known:
                raise RequestError(f"no adapter is named {name!r}; there are: {sorted(known)}", param="adapter")
        arrival = time.monotonic()
        jobs = [
            self._job(text, ids, one_params, name, arrival)
            for (text, ids), one_params, name in zip(prompts, params_list, adapter_list, strict=True)
        ]
        self._complete(jobs, progress)
        return [_result(job) for job in jobs]

    def _job(
        self, text: str | None, ids: tuple[int, ...], params: SamplingParams, adapter: str | None, arrival: float
    ) -> _Job:
        request_id = str(next(self._request_numbers))
        requests = self._inputs.engine_requests(request_id, ids, params, adapter=adapter, arrival=arrival)
        if params.max_tokens != 0:  # the prompt's log-probabilities are the same for every completion of it
            others = replace(params, prompt_logprobs=None)
            requests[1:] = [replace(request, params=others) for request in requests[1:]]
        completions = [CompletionCollector(index, self.tokenizer, ids, params) for index in range(params.n)]
        return _Job(prompt=text, adapter=adapter, requests=requests, completions=completions)

    def _complete(self, jobs: Sequence[_Job], progress: bool) -> None:
        pending: dict[str, CompletionCollector] = {}
        total = sum(len(job.requests) for job in jobs)
        bar = Progress(
            TextColumn("completions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), disable=not progress
        )
        try:
            for job in jobs:
                for request, completion in zip(job.requests, job.completions, strict=True):
                    self.engine.submit(request)
                    pending[request.request_id] = completion
            with bar:
                task = bar.add_task("completions", total=total)
                while pending:
                    self._step(pending)
                    bar.update(task, completed=total - len(pending))
        finally:
            for request_id in pending:  # only after an exception
                self.engine.abort(request_id)

    def _step(self, pending: dict[str, CompletionCollector]) -> None:
        assert self.engine.has_work(), f"the engine has lost {len(pending)} requests"
        for event in self.engine.step():
            completion = pending.get(event.request_id)
            if completion is None:
                continue
            completion.push(event)
            if completion.stopped and event.finish_reason is None:
                self.engine.abort(event.request_id)
            if completion.finished:
                del pending[event.request_id]


def _result(job: _Job) -> RequestOutput:
    first = job.requests[0]
    prompt_logprobs = job.completions[0].prompt_logprobs
    return RequestOutput(
        request_id=first.request_id.rpartition("-")[0],
        prompt=job.prompt,
        prompt_token_ids=list(first.prompt_ids),
        prompt_logprobs=(
            None
            if prompt_logprobs is None
            else [None if entry is None else logprob_dict(entry) for entry in prompt_logprobs]
        ),
        outputs=[completion.output() for completion in job.completions],
        adapter=job.adapter,
    )


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    for position, item in enumerate(prompts):
        if not isinstance(item, (str, list, tuple)):
            raise RequestError(
                f"a prompt must be a string or a list of token ids, got {item!r} at position {position}", param="prompt"
            )
    return list(cast("Sequence[Prompt]", prompts))


def _one_per_prompt(name: str, value: Any, num_prompts: int, kind: type) -> list[Any]:
    """`value` for every prompt, or the values of a list with one per prompt."""
    if value is None or isinstance(value, kind):
        return [value] * num_prompts
    values = list(value)
    if len(values) != num_prompts:
        raise RequestError(f"{name} has {len(values)} entries for {num_prompts} prompts", param=name)
    for item in values:
        if not isinstance(item, kind) and not (item is None and kind is str):
            raise RequestError(f"{name} must hold {kind.__name__} values, got {item!r}", param=name)
    return values
