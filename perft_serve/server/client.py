"""The asyncio side of the engine: requests in, their events as streams; adapters warmed and retired.

In: `EngineRequest`s and `AdapterRef`s, from the event loop. Out: `TokenEvent`s as an `EventStream`, and what the engine says of
its adapters. It keeps the catalogue of adapters, which outlives engines, and a mirror of what the present engine has of them.
Knows no HTTP, no text; what becomes of the engine's process is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from typing_extensions import Self

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterCatalog, AdapterRef, DeletedAdapterError
from perft_serve.adapters.status import AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineRequest, EngineStats, FinishReason, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.loop import WINDOW
from perft_serve.engine.messages import Abort, Delivered, Refusal, Retire, Started, StepOutput, Submit, Warm
from perft_serve.engine.params import MAX_LOGPROBS, RequestError
from perft_serve.server.config import ServerConfig
from perft_serve.server.metrics import EngineReading, Metrics, RequestRecorder
from perft_serve.server.supervisor import ENGINE_COMMAND, EngineLink, EngineState, Supervisor

# Events a reader may be behind, per request, beside what sockets buffer; more than come while the event loop is held up, which
# is a window of the engine's. One with all the log-probabilities that can be asked for is ten times as large, and counts twice.
MAX_PENDING_EVENTS = 4 * WINDOW
# How long what has happened already may take to be sent, once nothing more will.
DRAIN_SECONDS = 60.0
# The engine learns after so many steps that they have been delivered; well below its window.
_STEPS_PER_DELIVERED = 16

# What of the statistics only ever grows, and goes on over restarts.
_COUNTERS = ("num_preemptions", "num_steps", "prefix_queries", "prefix_hits")
_MEMORY_COUNTERS = ("num_loads", "num_load_failures", "num_evictions", "load_seconds")


class EngineDeadError(RuntimeError):
    """There is no engine that takes requests now; it may be back after `retry_after` seconds, or (`None`) never."""

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineBusyError(RuntimeError):
    """So many requests are open that no more are taken now."""


class TenantBusyError(RuntimeError):
    """So many requests of one tenant are open that no more of them are taken now."""


class SlowReaderError(RuntimeError):
    """A client reads its stream so slowly that its request was given up."""


class EventStream:
    """The events of a few engine requests, in the order in which they happened; belongs to the event loop.

    Iterating gives lists: all events since the last one. Leaving the `with` block aborts what has not finished, so a
    handler that is cancelled frees its requests' pages. Until then its requests count as open, finished or not: whoever does
    not read the end of a reply holds memory as well.
    """

    def __init__(self, client: EngineClient, recorders: dict[str, RequestRecorder], tenant: str) -> None:
        self._client = client
        self.recorders = tuple(recorders.values())
        self._open = recorders
        self._tenant = tenant
        self._num_requests = len(recorders)
        self._max_pending = MAX_PENDING_EVENTS * len(recorders)
        self._events: list[TokenEvent] = []
        self._pending = 0.0  # what `_events` weigh
        self._failure: Exception | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up("abort")
        self._client._close_stream(self)

    async def overdue(self) -> None:
        """Returns when everything has happened for so long that a reader who still takes what there is has stopped."""
        await self._over.wait()
        await asyncio.sleep(DRAIN_SECONDS)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        events, self._events, self._pending = self._events, [], 0.0
        return events

    def finish(self, request_id: str) -> None:
        """Ends one request early because its text is complete: a stop string was found."""
        recorder = self._open.pop(request_id, None)
        if recorder is not None:
            recorder.finish("stop", time.monotonic())
            self._client._abort([request_id])
            self._note_end()

    def _push(self, event: TokenEvent, now: float) -> None:
        recorder = self._open.get(event.request_id)
        if recorder is None:
            return
        recorder.record(event, now)
        self._events.append(event)
        self._pending += 1.0 if event.logprobs is None else 1.0 + len(event.logprobs.top) / MAX_LOGPROBS
        if event.finish_reason is not None:
            del self._open[event.request_id]
            self._note_end()
        elif self._pending > self._max_pending:
            self._fail(SlowReaderError(f"the client is {self._max_pending} tokens behind: the request was given up"))
        self._changed.set()

    def _fail(self, failure: Exception) -> None:
        self._events, self._pending = [], 0.0
        self._failure = failure
        self._give_up("error")
        self._changed.set()

    def _give_up(self, reason: FinishReason) -> None:
        now = time.monotonic()
        for recorder in self._open.values():
            recorder.finish(reason, now)
        self._client._abort(list(self._open))
        self._open.clear()
        self._note_end()

    def _note_end(self) -> None:
        if not self._open:
            self._over.set()


class EngineClient:
    """An engine in a process of its own, as the event loop sees it.

    Everything but `start`, `close` and the properties belongs to one event loop.

    Args:
        engine_config: of the engine.
        config: how many requests may be open, and how the engine's process is watched.
        metrics: where requests are recorded, and the engine's state is read.
        command: the command line of the engine's process.

    Attributes:
        catalog: the adapters that requests can name.
        limits, base_digest: the engine's, once it has started.

    Raises:
        AdapterError: an adapter has no proper name, or the folder of adapters is not there.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        metrics: Metrics,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.catalog = AdapterCatalog(engine_config.adapters, engine_config.adapter_dir)
        self.limits = Limits(max_model_len=0, vocab_size=0)
        self.base_digest = ""
        self._metrics = metrics
        self._max_open_requests = config.max_open_requests
        self._max_tenant_requests = config.max_tenant_requests or config.max_open_requests
        self._engine_config = engine_config
        self._supervisor = Supervisor(engine_config, config, self, command=command)
        # Where the supervisor's reports go; before there is a loop, nobody else is there and its own thread takes them
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()
        # The present engine
        self._link: EngineLink | None = None
        self._why_down = "the engine has not started"
        self._retry_after: int | None = None
        self._lost: list[AdapterStatus] = []  # what the present engine was to have of what the last one had
        self._num_outputs = 0
        self._streams: dict[str, EventStream] = {}  # by request, until that is over
        self._num_open = 0  # requests of streams that are not closed
        self._num_open_of: Counter[str] = Counter()  # by tenant
        self._statuses: dict[str, dict[int, AdapterStatus]] = {}  # by name and version
        self._stats = EngineStats()
        # What engines that are gone have counted
        self._before = EngineStats()
        # Those who wait for a command to be taken up, by its number; and for news of an adapter, by its name
        self._numbers = itertools.count()
        self._replies: dict[int, asyncio.Future[str | None]] = {}
        self._watchers: dict[str, set[asyncio.Future[None]]] = {}
        metrics.watch_engine(self._read)

    def start(self) -> None:
        """Starts the engine, and waits until it takes requests.

        Raises:
            EngineStartError: it cannot be started.
            OSError: its process cannot.
        """
        self._supervisor.start()

    def close(self) -> None:
        """Stops the engine after its present step, and waits for that; open requests get no more events."""
        self._supervisor.close()

    @property
    def engine_state(self) -> EngineState:
        """Whether the engine takes requests, and if not, whether it will."""
        return self._supervisor.state

    @property
    def error(self) -> str | None:
        """Why the engine is not ready, if it was once; in words for clients."""
        return self._supervisor.error

    @property
    def num_restarts(self) -> int:
        """How many times the engine's process has been started again."""
        return self._supervisor.num_restarts

    @property
    def engine_pid(self) -> int | None:
        """The present process."""
        return self._supervisor.pid

    @property
    def retry_after(self) -> int | None:
        """While the engine is down: seconds until it may be back, or `None` if it will not be."""
        return self._retry_after

    def stats(self) -> EngineStats:
        """The engine's state after its last step; what it counts goes on over restarts."""
        return _added(self._stats, self._before)

    def submit(self, requests: Sequence[EngineRequest]) -> EventStream:
        """Hands requests of one tenant to the engine; their events come through one stream.

        While the engine is down they are refused rather than kept: nobody can say how long it will take, and another server may
        answer at once.

        Raises:
            EngineDeadError: the engine is down.
            EngineBusyError: too many requests are open.
            TenantBusyError: too many of the tenant's requests are open.
            RequestError: these are more than may ever be open at a time.
        """
        try:
            link = self._present_link()
        except EngineDeadError:
            self._metrics.count_rejection("engine_down")
            raise
        self.check_number(len(requests))
        if self._num_open + len(requests) > self._max_open_requests:
            self._metrics.count_rejection("busy")
            raise EngineBusyError(f"{self._num_open} completions are running or waiting: try again later")
        tenant = requests[0].tenant
        if self._num_open_of[tenant] + len(requests) > self._max_tenant_requests:
            self._metrics.count_rejection("tenant_busy")
            raise TenantBusyError(
                f"{self._num_open_of[tenant]} of your completions are running or waiting, and no more than "
                f"{self._max_tenant_requests} may: try again when some have ended"
            )
        assert not any(request.request_id in self._streams for request in requests), "a request's id is in use"
        link.send(Submit(requests=list(requests)))
        stream = EventStream(self, self._metrics.track(requests), tenant)
        for request in requests:
            self._streams[request.request_id] = stream
        self._num_open += len(requests)
        self._num_open_of[tenant] += len(requests)
        return stream

    def check_number(self, num_requests: int) -> None:
        """Refuses what `submit` would refuse at any time; to be asked before work is put into so many requests.

        Raises:
            RequestError: these are more than may ever be open at a time.
        """
        most = min(self._max_open_requests, self._max_tenant_requests)
        if num_requests > most:
            self._metrics.count_rejection("too_many")
            raise RequestError(f"{num_requests} completions asked for at once, but this server runs at most {most}")

    def status(self, name: str) -> AdapterStatus:
        """What the engine has said last of the name's present version.

        Raises:
            UnknownAdapterError: there is no adapter of that name.
        """
        ref = self.catalog.resolve(name)
        status = self._status(ref.name, ref.version)
        return status or AdapterStatus(name=ref.name, version=ref.version)

    async def warm_adapter(self, ref: AdapterRef, pin: bool | None = None) -> AdapterStatus:
        """Brings an adapter into the engine's memory; it need not be in the catalogue. If the caller is cancelled, it goes on.

        Args:
            pin: never evict it, or (`False`) no longer; `None` leaves that as it is.

        Returns:
            Its status: in host memory or in the arena; in the arena, if it is pinned.

        Raises:
            DeletedAdapterError: it was retired meanwhile.
            AdapterError: it cannot be loaded, or not be pinned.
            EngineDeadError: the engine is down, or went down meanwhile.
        """
        error = await self._manage(Warm(number=next(self._numbers), ref=ref, pin=pin))
        while error is None:
            status = self._status(ref.name, ref.version)
            if status is None:
                raise DeletedAdapterError(ref.name)
            if status.state == "failed" or (pin and not status.pinned and status.error is not None):
                error = status.error or f"adapter {ref.name!r} could not be loaded"
            elif status.state == "resident" or (status.state == "host" and not pin):
                return status
            else:
                await self._news_of(ref.name)
        if not self._is_current(ref.name, ref.version):  # nobody will ask for it again, whatever there is of it
            self.let_go(ref.name, ref.version, only=True)
        raise AdapterError(error)

    async def retire_adapter(self, name: str, up_to_version: int, force: bool = False) -> None:
        """Waits until the engine has let go of these versions of an adapter. If the caller is cancelled, it goes on.

        Args:
            force: end the requests that run on them; otherwise they are waited for.

        Raises:
            EngineDeadError: the engine is down, or went down meanwhile, and with it all that it had.
        """
        error = await self._manage(
            Retire(number=next(self._numbers), name=name, up_to_version=up_to_version, force=force)
        )
        if error is not None:
            raise AdapterError(error)
        while any(_is_held(status) for status in self._versions(name, up_to_version)):
            await self._news_of(name)
        for status in self._versions(name, up_to_version):
            self._forget(name, status.version)

    def let_go(self, name: str, up_to_version: int, *, only: bool = False) -> None:
        """Has the engine let go of these versions of an adapter when their requests have ended; nobody waits for that.

        Args:
            only: of the last of them, and of none before it.
        """
        if self._link is not None:  # else it has gone with the engine
            self._link.send(Retire(number=next(self._numbers), name=name, up_to_version=up_to_version, only=only))
        for status in self._versions(name, up_to_version):
            if not _is_held(status) and (status.version == up_to_version or not only):
                self._forget(name, status.version)

    def adapters(self, after: str | None = None, limit: int | None = None) -> list[AdapterRef]:
        """The catalogue's page of adapters; what has left the folder of adapters leaves the engine too."""
        refs = self.catalog.page(after, limit)
        self._let_go_of_dropped()
        return refs

    def _let_go_of_dropped(self) -> None:
        for ref in self.catalog.take_dropped():
            self.let_go(ref.name, ref.version)

    def _status(self, name: str, version: int) -> AdapterStatus | None:
        return self._statuses.get(name, {}).get(version)

    def _versions(self, name: str, up_to: int) -> list[AdapterStatus]:
        """What is known of these versions of an adapter."""
        return [status for version, status in self._statuses.get(name, {}).items() if version <= up_to]

    def _note(self, status: AdapterStatus) -> None:
        if status.state == "removed":
            self._forget(status.name, status.version)
        else:
            self._statuses.setdefault(status.name, {})[status.version] = status

    def _forget(self, name: str, version: int) -> None:
        versions = self._statuses.get(name, {})
        versions.pop(version, None)
        if not versions:
            self._statuses.pop(name, None)

    def engine_started(self, link: EngineLink, started: Started) -> None:
        """The supervisor's word."""
        self._in_loop(self._take_engine, link, started)

    def engine_said(self, link: EngineLink, output: StepOutput) -> None:
        """The supervisor's word."""
        self._in_loop(self._deliver, link, output, time.monotonic())

    def engine_gone(self, reason: str, retry_after: int | None) -> None:
        """The supervisor's word."""
        what = "has stopped" if retry_after is None else "is being restarted, try again"
        self._in_loop(self._lose_engine, f"the engine {what}: {reason}", retry_after)

    def _in_loop(self, function: Callable[..., None], *args: object) -> None:
        """In the supervisor's thread: has something done in the event loop."""
        with self._loop_lock:
            if self._loop is not None:
                try:
                    self._loop.call_soon_threadsafe(function, *args)
                    return
                except RuntimeError:  # it is closed: nobody waits for anything any more
                    self._loop = None
            function(*args)

    def _take_engine(self, link: EngineLink, started: Started) -> None:
        self.limits = started.limits
        self.base_digest = started.base_digest
        self._stats = started.stats
        self._statuses = {}
        for status in started.adapters:
            self._note(status)
        self._num_outputs = 0
        self._link = link
        for lost in self._lost:
            if self._is_current(lost.name, lost.version):
                ref = self.catalog.resolve(lost.name)
                link.send(Warm(number=next(self._numbers), ref=ref, pin=lost.pinned))

    def _deliver(self, link: EngineLink, output: StepOutput, now: float) -> None:
        """Hands what a step has brought to those who wait for it."""
        if link is not self._link:
            return
        self._num_outputs += 1
        if self._num_outputs % _STEPS_PER_DELIVERED == 0:
            link.send(Delivered(num_outputs=self._num_outputs))
        self._stats = output.stats
        if output.counts is not None:
            self._metrics.count_engine(output.counts)
        for event in output.events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # aborted meanwhile
                continue
            if event.finish_reason is not None:
                del self._streams[event.request_id]
            stream._push(event, now)
        for refusal in output.refused:
            stream = self._streams.get(refusal.request_id)
            if stream is not None:
                self._metrics.count_rejection("internal" if refusal.internal else "refused")
                stream._fail(_refused(refusal))
        for status in output.adapters:
            self._note(status)
            for watcher in self._watchers.pop(status.name, ()):
                if not watcher.done():
                    watcher.set_result(None)
        for reply in output.replies:
            future = self._replies.pop(reply.number, None)
            if future is not None and not future.done():
                future.set_result(reply.error)

    def _lose_engine(self, why: str, retry_after: int | None) -> None:
        """Ends all that waits for an engine that is gone."""
        self._lost = _worth_reloading(self._statuses, self._lost)
        self._link = None
        self._why_down, self._retry_after = why, retry_after
        self._before, self._stats = self.stats(), EngineStats()
        self._statuses = {}
        for stream in set(self._streams.values()):
            stream._fail(self._dead())
        waiting: list[asyncio.Future[Any]] = [*self._replies.values(), *itertools.chain(*self._watchers.values())]
        self._replies, self._watchers = {}, {}
        for future in waiting:
            if not future.done():
                future.set_exception(self._dead())

    def _is_current(self, name: str, version: int) -> bool:
        return name in self.catalog and self.catalog.resolve(name).version == version

    def _present_link(self) -> EngineLink:
        """From now on, the running loop is where things are reported.

        Raises:
            EngineDeadError: the engine is down.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            with self._loop_lock:
                self._loop = loop
        if self._link is None:
            raise self._dead()
        return self._link

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(self._why_down, retry_after=self._retry_after)

    def _close_stream(self, stream: EventStream) -> None:
        self._num_open -= stream._num_requests
        self._num_open_of[stream._tenant] -= stream._num_requests
        if not self._num_open_of[stream._tenant]:
            del self._num_open_of[stream._tenant]
        stream._num_requests = 0

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            del self._streams[request_id]
        if request_ids and self._link is not None:
            self._link.send(Abort(request_ids=list(request_ids)))

    async def _manage(self, command: Warm | Retire) -> str | None:
        """Gives a command for adapters; returns once it is taken up: why the engine refuses it, if it does."""
        link = self._present_link()
        link.send(command)
        reply: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._replies[command.number] = reply
        return await reply

    async def _news_of(self, name: str) -> None:
        """Waits until the engine says something of an adapter."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.setdefault(name, set()).add(news)
        await news

    def _read(self) -> EngineReading:
        num_adapters = len(self.catalog)
        self._let_go_of_dropped()
        return EngineReading(
            stats=self.stats(),
            config=self._engine_config,
            is_up=self.engine_state == "ready",
            num_restarts=self.num_restarts,
            num_adapters=num_adapters,
        )


def _key(status: AdapterStatus) -> tuple[str, int]:
    return status.name, status.version


def _is_held(status: AdapterStatus) -> bool:
    """Whether the engine holds something of an adapter. Of one that failed it keeps nothing, and says so once."""
    return status.state != "failed" or status.num_in_flight > 0


def _worth_reloading(
    statuses: Mapping[str, Mapping[int, AdapterStatus]], lost: Iterable[AdapterStatus]
) -> list[AdapterStatus]:
    """What a new engine should have of what the last one had: the pinned adapters first, then what was in the arena, the last
    used first. The others come when they are asked for, and need not wait behind thousands that nobody asks for.

    Args:
        statuses: the last engine's.
        lost: what that one should have had; it may have died before it was done.
    """
    known = {_key(status): status for versions in statuses.values() for status in versions.values()}
    had = [status for status in known.values() if status.pinned or status.state == "resident"]
    missed = [status for status in lost if (now := known.get(_key(status))) is None or now.state == "loading"]
    kept = {_key(status): status for status in (*missed, *had)}
    return sorted(kept.values(), key=lambda status: (not status.pinned, -(status.last_used or 0.0)))


def _refused(refusal: Refusal) -> Exception:
    if refusal.internal:
        return RuntimeError(f"the engine could not take request {refusal.request_id}; its log says why")
    return RequestError(refusal.reason, param=refusal.param)


def _added(stats: EngineStats, before: EngineStats) -> EngineStats:
    """`stats`, counting on from `before`."""
    memory = {name: getattr(stats.adapters, name) + getattr(before.adapters, name) for name in _MEMORY_COUNTERS}
    counters = {name: getattr(stats, name) + getattr(before, name) for name in _COUNTERS}
    return replace(stats, **counters, adapters=replace(stats.adapters, **memory))
