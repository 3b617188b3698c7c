"""The engine: requests in, token events out, one step at a time. An ordinary object that one thread drives."""

from __future__ import annotations

import random

from perft_serve.adapters.store import AdapterInfo, AdapterStore, find_adapters
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineRequest, EngineStats, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.pages import PagePool
from perft_serve.engine.params import RequestError
from perft_serve.engine.runner import Runner
from perft_serve.engine.scheduler import Scheduler
from perft_serve.engine.sequence import Sequence


class Engine:
    """A base model, its adapters, and the requests that run on them.

    Args:
        config: what to load and how large to be.

    Attributes:
        limits: the longest prompt plus completion, and the vocabulary.
        eos_token_ids: tokens that end a text.

    Raises:
        BaseModelError: the base cannot be loaded or served.
        AdapterError: an adapter is broken or does not fit.
        ValueError: a setting has no meaning here.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._runner = Runner(config)
        self._store = AdapterStore(self._runner.arena)
        if config.adapter_dir is not None:
            for name, path in find_adapters(config.adapter_dir).items():
                if name not in config.adapters:
                    self._store.load(name, path)
        for name, named_path in config.adapters.items():
            self._store.load(name, named_path)
        self._pool = PagePool(self._runner.num_pages, config.page_size)
        self.eos_token_ids = self._runner.eos_token_ids
        self.limits = Limits(max_model_len=self._max_model_len(config), vocab_size=self._runner.vocab_size)
        self._scheduler = Scheduler(
            self._pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            eos_token_ids=self.eos_token_ids,
        )
        self._num_steps = 0

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served as it stands; the engine is as before.
        """
        params = request.params
        if request.request_id in self._scheduler:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        if request.adapter is not None and request.adapter not in self._store:
            raise RequestError(f"there is no adapter {request.adapter!r}", param="model")
        self.limits.check_prompt(request.prompt_ids)
        self.limits.check_length(request.prompt_ids, params)
        adapter = request.adapter
        self._scheduler.add(
            Sequence(
                request=request,
                seed=random.getrandbits(63) if params.seed is None else params.seed,
                adapter_slot=-1 if adapter is None else self._store.slot(adapter),
                width=0 if adapter is None else self._store.width(adapter),
                max_tokens=self.limits.room(request.prompt_ids) if params.max_tokens is None else params.max_tokens,
            )
        )

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; one that is over, or never was, is ignored."""
        self._scheduler.abort(request_id)

    def abort_all(self) -> list[str]:
        """Drop every request; returns their ids."""
        return self._scheduler.abort_all()

    def step(self) -> list[TokenEvent]:
        """One step forward for as many requests as fit; nothing if there are none."""
        plan = self._scheduler.schedule()
        if not plan.chunks:
            return []
        results = self._runner.run(plan)
        self._num_steps += 1
        return self._scheduler.commit(plan, results)

    def has_work(self) -> bool:
        """Whether a request is running or waiting."""
        return bool(self._scheduler.num_running or self._scheduler.num_waiting)

    def stats(self) -> EngineStats:
        """The engine's state now."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_usage=self._pool.usage,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
        )

    def list_adapters(self) -> list[AdapterInfo]:
        """The adapters that requests can name."""
        return self._store.list()

    def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the adapter in folder `path`; raises `AdapterError` and changes nothing if it cannot be."""
        return self._store.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Let an adapter go.

        Raises:
            AdapterError: there is none of that name.
            RequestError: requests in flight use it.
        """
        if name in self._store and self._scheduler.uses_slot(self._store.slot(name)):
            raise RequestError(f"adapter {name!r} is in use by requests in flight; wait for them or abort them")
        self._store.unload(name)

    def _max_model_len(self, config: EngineConfig) -> int:
        in_cache = self._pool.num_pages * config.page_size
        context = self._runner.max_position_embeddings
        if config.max_model_len is None:
            return in_cache if context is None else min(in_cache, context)
        if context is not None and config.max_model_len > context:
            raise ValueError(
                f"max_model_len={config.max_model_len} is more than the model's context of {context} tokens"
            )
        if config.max_model_len > in_cache:
            raise ValueError(
                f"max_model_len={config.max_model_len} does not fit into the KV cache, which holds {in_cache} tokens; "
                "give more kv_memory or a shorter max_model_len"
            )
        return config.max_model_len
