"""The engine: requests in, token events out, one step at a time. An ordinary object that one thread drives:

while True:
    if engine.has_work():
        events = engine.step()
    else:
        ...  # wait for a request, or until `wake` is called (or `engine.wait`)
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise

from perft_serve.adapters.catalog import AdapterCatalog, AdapterRef
from perft_serve.adapters.status import AdapterStatus, load_failure
from perft_serve.adapters.store import AdapterStore
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import STEP_HISTOGRAMS, Counter, EngineCounts
from perft_serve.engine.events import EngineRequest, EngineStats, TokenEvent
from perft_serve.engine.grammar import GrammarError, Grammars
from perft_serve.engine.limits import Limits
from perft_serve.engine.pages import PagePool
from perft_serve.engine.params import RequestError, StructuredOutputsParams
from perft_serve.engine.policy import FirstComeFirstServed, LowestPriorityFirst
from perft_serve.engine.runner import Runner, Step
from perft_serve.engine.scheduler import ChunkResult, Plan, Scheduler
from perft_serve.engine.sequence import Sequence


class Engine:
    """A base model, its adapters, and the requests that run on them.

    Everything but `wait` and `foresee` belongs to the thread that drives the engine.

    Args:
        config: what to load and how large to be.
        wake: called from another thread when an adapter has been read, or could not be, or a grammar has been compiled: there
            is work again.

    Attributes:
        limits: the longest prompt plus completion, and the vocabulary.
        eos_token_ids: tokens that end a text.
        base_digest: tells this base model from others.

    Raises:
        BaseModelError: the base cannot be loaded or served.
        AdapterError: one of `config.adapters` is broken, or can never fit.
        ValueError: a setting has no meaning here.
    """

    def __init__(self, config: EngineConfig, wake: Callable[[], None] | None = None) -> None:
        self._runner = Runner(config)
        self._counter = Counter()
        self._pool = PagePool(self._runner.num_pages, config.page_size, observe=self._counter.observe)
        self._grammars = Grammars(
            config.model, self._runner.vocab_size, self._runner.eos_token_ids, wake=self._tell_news
        )
        self._runner.grammars = self._grammars
        self.limits = self._limits(config)
        self.eos_token_ids = self._runner.eos_token_ids
        self.base_digest = self._runner.base_digest
        self._wake = wake
        self._news = threading.Event()
        self._adapters = AdapterStore(
            self._runner.arena,
            host_bytes=config.host_adapter_memory,
            wake=self._tell_news,
            observe=self._counter.observe,
        )
        self._updates: dict[tuple[str, int], AdapterStatus] = {}
        self._deleted: dict[str, int] = {}  # the last version that was deleted, by name
        self._scheduler = Scheduler(
            self._pool,
            self._adapters,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            eos_token_ids=self.eos_token_ids,
            base_digest=self.base_digest,
            prefix_caching=config.prefix_caching == "on",
            order=LowestPriorityFirst() if config.scheduling_policy == "priority" else FirstComeFirstServed(),
        )
        self._in_flight: Step | None = None  # launched ahead of the results of the step before it
        self._num_steps = 0
        self._num_corrupted = 0  # that were counted
        try:
            catalog = AdapterCatalog(config.adapters)  # gives them the names and versions that requests will ask for
            for name in config.adapters:
                self._adapters.load_now(catalog.resolve(name))
        except BaseException:
            self.close()
            raise

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served as it stands; the engine is as before.
        """
        params, ref = request.params, request.adapter
        if request.request_id in self._scheduler:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        if ref is not None and ref.version <= self._deleted.get(ref.name, 0):
            raise RequestError(_was_deleted(ref.name), param="model")
        self.limits.check_prompt(request.prompt_ids)
        self.limits.check_length(request.prompt_ids, params)
        self.limits.check_tokens(params, request.bad_words)
        self.limits.check_request(params, priority=request.priority, has_adapter=ref is not None)
        seq = Sequence(
            request=request,
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            max_tokens=self.limits.room(request.prompt_ids) if params.max_tokens is None else params.max_tokens,
        )
        self._scheduler.add(seq, ready=params.structured_outputs is None)
        if params.structured_outputs is not None:
            self._grammars.start(seq, params)

    def check_grammar(self, outputs: StructuredOutputsParams) -> None:
        """Compile a grammar and wait for it, so that a request that has it can be refused before it is submitted.

        Raises:
            RequestError: there is something wrong with it.
        """
        self._grammars.check(outputs)

    def foresee(self, request: EngineRequest) -> None:
        """From any thread: this request will be submitted when the present step is over; what it needs may be fetched now."""
        if request.adapter is not None:
            self._adapters.foresee(request.adapter)

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; one that is over, or never was, is ignored."""
        self._scheduler.abort(request_id)

    def abort_all(self) -> list[str]:
        """Drop every request; returns their ids."""
        return self._scheduler.abort_all()

    def step(self) -> list[TokenEvent]:
        """One step forward for as many requests as fit; nothing is computed if all of them wait for their adapters.

        With `async_scheduling` the next step is launched before this one's results are collected, where it does not depend on
        them: the device goes on while the host tells what has come.

        Whatever it raises, the requests stay as they were before.
        """
        began = time.monotonic()
        self._news.clear()
        self._adapters.poll()
        self._take_updates()
        self._take_grammars()
        polled = time.monotonic()
        step, self._in_flight = self._in_flight, None
        plan = self._scheduler.schedule() if step is None else step.plan
        scheduled = computed = time.monotonic()
        results: list[ChunkResult] = []
        try:
            if step is None and plan.chunks:
                step = self._runner.launch(plan)
                computed = step.computed_at
            if step is not None:
                if self._runner.runs_ahead and (ahead := self._scheduler.schedule_ahead(plan)) is not None:
                    self._in_flight = self._runner.launch(ahead, after=step)
                    computed = self._in_flight.computed_at
                results = self._runner.collect(step)
        except BaseException:
            self._in_flight = None
            self._scheduler.roll_back(plan)
            raise
        ran = time.monotonic()
        events = self._scheduler.commit(plan, results)
        if self._in_flight is not None and not self._scheduler.is_alive(self._in_flight.plan):
            self._in_flight = None
        self._take_updates()  # asking for one adapter moves others, and who waits for those must find out without a step
        if plan.chunks:
            self._num_steps += 1
            self._count_step(plan, (began, polled, scheduled, computed, ran, time.monotonic()))
        return events

    def has_work(self) -> bool:
        """Whether `step` would do something now. If not, nobody waits, or all that do wait for adapters being read or
        grammars being compiled.
        """
        return self._scheduler.has_work() or self._adapters.has_work() or self._grammars.has_news()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until an adapter has been read, or could not be, or a grammar is compiled; false after `timeout` seconds."""
        return self._news.wait(timeout)

    def stats(self) -> EngineStats:
        """The engine's state now."""
        return EngineStats(
            num_pages=self._pool.num_pages,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_usage=self._pool.usage,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            adapters=self._adapters.memory(),
        )

    def take_counts(self) -> EngineCounts | None:
        """What was counted for metrics since the last call, if anything was."""
        self._counter.count_corrupted(self._scheduler.num_corrupted - self._num_corrupted)
        self._num_corrupted = self._scheduler.num_corrupted
        self._counter.note_balances(self._runner.balances.take())
        return self._counter.take()

    def warm(self, ref: AdapterRef, pin: bool | None = None) -> None:
        """Start bringing an adapter without a request; `adapter_updates` tells how it went.

        Raises:
            AdapterError: it cannot be pinned.
        """
        self._adapters.warm(ref, pin)
        self._take_updates()

    def retire(self, name: str, up_to_version: int, force: bool = False, only: bool = False) -> None:
        """Drop these versions of an adapter as soon as no request in flight is on them; with `force`, end those requests. With
        `only`, drop just the last of them, which nobody was told of.

        Without force, a request that was on its way meanwhile is still served.
        """
        if force:
            self._deleted[name] = max(up_to_version, self._deleted.get(name, 0))
            self._scheduler.delete_adapter(name, up_to_version, _was_deleted(name))
        self._adapters.retire(name, up_to_version, only=only)
        self._take_updates()

    def adapter_updates(self) -> list[AdapterStatus]:
        """The adapters that have changed since the last call, as they are now."""
        self._take_updates()
        updates, self._updates = [*self._updates.values()], {}
        return updates

    def close(self) -> None:
        """Drop all requests and stop what runs beside the steps."""
        self.abort_all()
        self._grammars.close()
        self._adapters.close()

    def _take_grammars(self) -> None:
        for seq, grammar in self._grammars.poll():
            assert isinstance(seq, Sequence)
            if isinstance(grammar, GrammarError):
                self._scheduler.refuse(seq, grammar.reason, "engine" if grammar.is_internal else "request")
            else:
                seq.grammar = grammar
                self._scheduler.ready(seq)

    def _count_step(self, plan: Plan, times: tuple[float, ...]) -> None:
        """`times`: when each phase of the step began, and when the last ended."""
        observe = self._counter.observe
        for phase, (start, end) in zip(STEP_HISTOGRAMS, pairwise(times), strict=True):
            observe(phase, end - start)
        observe("iteration_tokens", sum(chunk.num_tokens for chunk in plan.chunks))

    def _take_updates(self) -> None:
        latest = {(status.name, status.version): status for status in self._adapters.updates()}
        self._updates |= latest
        for (name, version), status in latest.items():
            if status.state == "failed" and status.error is not None:
                self._scheduler.adapter_failed(name, version, load_failure(name, status.error))
            else:
                self._scheduler.adapter_changed(name, version)

    def _tell_news(self) -> None:
        self._news.set()
        if self._wake is not None:
            self._wake()

    def _limits(self, config: EngineConfig) -> Limits:
        in_cache = self._pool.num_pages * config.page_size
        context = self._runner.max_position_embeddings
        if config.max_model_len is not None:
            if context is not None and config.max_model_len > context:
                raise ValueError(
                    f"max_model_len={config.max_model_len} is more than the model's context of {context} tokens"
                )
            if config.max_model_len > in_cache:
                raise ValueError(
                    f"max_model_len={config.max_model_len} does not fit into the KV cache, which holds {in_cache} tokens; "
                    "give more kv_memory or a shorter max_model_len"
                )
        asked = config.max_model_len or context
        return Limits(
            max_model_len=in_cache if asked is None else min(in_cache, asked),
            vocab_size=self._runner.vocab_size,
            num_pages=self._pool.num_pages if asked is None or in_cache < asked else None,
            priorities=config.scheduling_policy == "priority",
        )


def _was_deleted(name: str) -> str:
    return f"adapter {name!r} was deleted"
