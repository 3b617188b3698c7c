"""The engine's process with an engine that counts: each request is answered with 0, 1, 2, ...; no model, no torch.

The source of an adapter says how its load goes: "20" takes so many milliseconds, "bad" fails, "refused" is not even tried,
"unpinnable" cannot be pinned.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import without_torch  # noqa: F401  # before anything of ours
from knobs import Knobs

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import Counter, EngineCounts
from perft_serve.engine.events import EngineRequest, EngineStats, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.loop import run_process
from perft_serve.engine.params import RequestError

Key = tuple[str, int]


class CountingEngine:
    """What `EngineLoop` needs of an engine."""

    limits = Limits(max_model_len=10_000, vocab_size=10_000)
    base_digest = "counting"

    def __init__(self, config: EngineConfig, wake: Callable[[], None], knobs: Knobs) -> None:
        knobs.fail_start()
        self._knobs = knobs
        self._wake = wake
        self._requests: dict[str, tuple[EngineRequest, int]] = {}
        self._num_steps = 0
        self._counter = Counter()
        self._most_running = 0
        self._statuses: dict[Key, AdapterStatus] = {}
        self._changed: set[Key] = set()
        self._loaded: list[Key] = []
        for name, source in config.adapters.items():
            self.warm(AdapterRef(name=name, source=source))

    def foresee(self, request: EngineRequest) -> None:
        """Nothing can be prepared for counting."""

    def submit(self, request: EngineRequest) -> None:
        refuse = self._knobs.read().refuse
        if request.prompt_ids == refuse:
            raise KeyError("a bug")
        if len(request.prompt_ids) > 100:
            raise RequestError("the prompt is too long", param="prompt")
        self._requests[request.request_id] = (request, 0)

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._requests or self._loaded)

    def step(self) -> list[TokenEvent]:
        settings = self._knobs.read()
        time.sleep(settings.pace)
        if settings.failure is not None:
            raise RuntimeError(settings.failure)
        while self._loaded:
            key = self._loaded.pop()
            if key in self._statuses and self._statuses[key].state == "loading":
                self._set(key, state="resident")
        self._num_steps += bool(self._requests)
        if self._requests:
            self._counter.observe("iteration_tokens", len(self._requests))
        self._most_running = max(self._most_running, len(self._requests))
        events = []
        for request_id, (request, count) in list(self._requests.items()):
            last = count + 1 == request.params.max_tokens
            events.append(TokenEvent(request_id=request_id, token_id=count, finish_reason="length" if last else None))
            self._requests[request_id] = (request, count + 1)
            if last:
                del self._requests[request_id]
        return events

    def stats(self) -> EngineStats:
        # The most that ran at a time passes for a number of preemptions
        return EngineStats(
            num_running=len(self._requests), num_preemptions=self._most_running, num_steps=self._num_steps
        )

    def take_counts(self) -> EngineCounts | None:
        return self._counter.take()

    def warm(self, ref: AdapterRef, pin: bool | None = None) -> None:
        if ref.source == "refused":
            raise AdapterError("it is not even tried")
        key = ref.name, ref.version
        if key in self._statuses and self._statuses[key].state == "resident":
            if pin is not None:
                self._set(key, pinned=pin)
            return
        self._statuses[key] = AdapterStatus(name=ref.name, version=ref.version, pinned=bool(pin))
        if ref.source == "bad":
            self._set(key, state="failed", error="it is broken")
            return
        if ref.source == "unpinnable":
            self._set(key, state="host", pinned=False, error="it cannot be pinned")
            return
        self._set(key, state="loading")
        timer = threading.Timer(int(ref.source) / 1000, self._finish, (key,))
        timer.daemon = True
        timer.start()

    def retire(self, name: str, up_to_version: int, force: bool = False, only: bool = False) -> None:
        for key in list(self._statuses):
            if key[0] == name and (key[1] == up_to_version if only else key[1] <= up_to_version):
                self._set(key, state="removed")

    def adapter_updates(self) -> list[AdapterStatus]:
        changed, self._changed = self._changed, set()
        updates = [self._statuses[key] for key in changed]
        for status in updates:
            if status.state in ("removed", "failed"):  # as the real one: what has failed is reported once, and not kept
                del self._statuses[status.name, status.version]
        return updates

    def close(self) -> None:
        self._requests.clear()

    def _finish(self, key: Key) -> None:
        """In a thread that loads."""
        self._loaded.append(key)
        self._wake()

    def _set(self, key: Key, **fields: object) -> None:
        self._statuses[key] = replace(self._statuses[key], **fields)  # type: ignore[arg-type]
        self._changed.add(key)


def main() -> int:
    assert "torch" not in sys.modules
    knobs = Knobs(Path(sys.argv[1]))
    return run_process(sys.argv[2:], lambda config, wake: CountingEngine(config, wake, knobs))
