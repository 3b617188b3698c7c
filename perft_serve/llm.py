"""`LLM`: the engine without a server, for scripts and tests, with vLLM's names.

In: prompts (text, token ids or chat messages), sampling parameters, an adapter's name per prompt. Out: results in the order
of the prompts. Drives the engine step by step in the caller's thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterCatalog, AdapterRef, UnknownAdapterError
from perft_serve.adapters.status import AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.params import RequestError, SamplingParams
from perft_serve.inputs import InputProcessor
from perft_serve.outputs import CompletionCollector, RequestOutput, logprob_dict
from perft_serve.text import load_tokenizer

Prompt: TypeAlias = "str | Sequence[int]"
Message: TypeAlias = "Mapping[str, Any]"

# Nothing is lost by it, but a signal is noticed: how long to wait for an adapter without looking up.
_WAIT_SECONDS = 1.0


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
        adapters: name to source (a folder, a Hub id or a URL), loaded at once.
        settings: fields of `EngineConfig` (`dtype`, `max_num_seqs`, `kv_memory`, `adapter_dir`, ...).

    Attributes:
        catalog: the adapters' names; one that is registered there is loaded when it is first used.

    Raises:
        BaseModelError: the base cannot be used.
        AdapterError: an adapter is broken or does not fit the base.
        ValueError: a setting is out of its range.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, **settings: Any) -> None:
        self.config = EngineConfig(model=model, adapters=dict(adapters or {}), **settings)
        self.catalog = AdapterCatalog(self.config.adapters, self.config.adapter_dir)
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
        priority: int | Sequence[int] = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, all in one batch as far as the engine's settings allow.

        Args:
            prompts: one prompt, or a list of them; a prompt is a string or a list of token ids.
            params: for all prompts, or a list with one per prompt.
            adapter: name of the adapter for all prompts (`None`: the base), or a list with one per prompt.
            priority: of all prompts, or a list with one per prompt; lower starts first (`scheduling_policy="priority"`).
            progress: show a progress bar.

        Returns:
            One result per prompt, in order.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing has run then.
        """
        prompt_list = _prompt_list(prompts)
        params_list = _params_list(params, len(prompt_list))
        encoded = [
            (prompt if isinstance(prompt, str) else None, self._inputs.prompt_ids(prompt, one_params))
            for prompt, one_params in zip(prompt_list, params_list, strict=True)
        ]
        return self._run(encoded, params_list, adapter, priority, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        priority: int | Sequence[int] = 0,
        progress: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations, written in the tokenizer's own chat template.

        Args:
            messages: one conversation (a list of `{"role": ..., "content": ...}`), or a list of conversations; what else
                messages have (`tool_calls`, `name`) is as the template takes it.
            params, adapter, priority, progress: as in `generate`.
            tools: what the model may call in all of them, in OpenAI's form (`{"type": "function", "function": {...}}`). Calls
                come back in the text, as the model writes them.
            add_generation_prompt: open the conversation for the assistant's answer.
            continue_final_message: leave the last message open, so that the answer continues it (with
                `add_generation_prompt=False`).
            chat_template_kwargs: further variables of the template.

        Raises:
            RequestError: as in `generate`; or the model has no chat template, or one without a place for tools.
        """
        if not messages:
            raise RequestError("there are no messages", param="messages")
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt begins an answer, continue_final_message continues one: set one of them to False",
                param="continue_final_message",
            )
        single = isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if single else messages)
        params_list = _params_list(params, len(conversations))
        encoded: list[tuple[str | None, tuple[int, ...]]] = []
        for conversation, one_params in zip(conversations, params_list, strict=True):
            ids = self._inputs.chat_ids(
                [dict(message) for message in conversation],
                one_params,
                tools=tools or (),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            encoded.append((self.tokenizer.decode(ids) if self.tokenizer else None, ids))
        return self._run(encoded, params_list, adapter, priority, progress)

    def load_adapter(self, name: str, source: str, *, pin: bool = False) -> AdapterStatus:
        """Reads an adapter and lets `name` stand for it; what the name stood for before is dropped.

        Args:
            source: a folder, a Hub id (`org/name[@revision]`) or a URL.
            pin: keep it in the arena, used or not.

        Raises:
            AdapterError: it cannot be loaded, or not be pinned; the name stands for what it did.
        """
        ref = self.catalog.prepare(name, source)
        self.engine.warm(ref, pin)
        status = self._wait_for(ref)
        if status.state == "failed" or (pin and not status.pinned):
            self.catalog.abandon(ref)
            self.engine.retire(name, ref.version, only=True)
            raise AdapterError(f"adapter {name!r} could not be loaded: {status.error}")
        self.catalog.commit(ref)
        self.engine.retire(name, ref.version - 1)
        return status

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            AdapterError: there is none of that name.
        """
        ref = self.catalog.remove(name)
        self.engine.retire(name, ref.version)

    def close(self) -> None:
        """Ends what runs beside the caller's thread; nothing can be generated any more."""
        self.engine.close()

    def _wait_for(self, ref: AdapterRef) -> AdapterStatus:
        """The status of an adapter that is being loaded, once it is, or has failed."""
        while True:
            for status in self.engine.adapter_updates():
                ours = (status.name, status.version) == (ref.name, ref.version)
                if ours and status.state in ("host", "resident", "failed"):
                    return status
            self._step({})

    def _run(
        self,
        prompts: Sequence[tuple[str | None, tuple[int, ...]]],
        params_list: Sequence[SamplingParams],
        adapter: str | Sequence[str | None] | None,
        priority: int | Sequence[int],
        progress: bool,
    ) -> list[RequestOutput]:
        adapter_list = _one_per_prompt("adapter", adapter, len(prompts), str)
        priority_list = _one_per_prompt("priority", priority, len(prompts), int)
        for one_params in params_list:
            if one_params.structured_outputs is not None:
                self.engine.check_grammar(one_params.structured_outputs)
        refs = [None if name is None else self._resolve(name) for name in adapter_list]
        for ref in self.catalog.take_dropped():
            self.engine.retire(ref.name, ref.version)
        arrival = time.monotonic()
        jobs = [
            self._job(text, ids, one_params, ref, one_priority, arrival)
            for (text, ids), one_params, ref, one_priority in zip(
                prompts, params_list, refs, priority_list, strict=True
            )
        ]
        self._complete(jobs, progress)
        return [_result(job) for job in jobs]

    def _resolve(self, name: str) -> AdapterRef:
        try:
            return self.catalog.resolve(name)
        except UnknownAdapterError as error:
            raise RequestError(str(error), param="adapter") from error

    def _job(
        self,
        text: str | None,
        ids: tuple[int, ...],
        params: SamplingParams,
        ref: AdapterRef | None,
        priority: int,
        arrival: float,
    ) -> _Job:
        request_id = str(next(self._request_numbers))
        requests = self._inputs.engine_requests(
            request_id, ids, params, adapter=ref, arrival=arrival, priority=priority
        )
        completions = [CompletionCollector(index, self.tokenizer, ids, params) for index in range(params.n)]
        return _Job(prompt=text, adapter=None if ref is None else ref.name, requests=requests, completions=completions)

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
        """One step of the engine, or a wait for the adapters that all requests wait for."""
        if not self.engine.has_work():
            self.engine.wait(_WAIT_SECONDS)
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
        num_cached_tokens=min(completion.num_cached_tokens for completion in job.completions),
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


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """The sampling parameters of every prompt."""
    return _one_per_prompt("params", SamplingParams() if params is None else params, num_prompts, SamplingParams)


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
