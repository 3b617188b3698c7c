"""The engine in a thread of its own, and the asyncio side that talks to it.

In: `EngineRequest`s, from the event loop. Out: their `TokenEvent`s, as an `EventStream`. The engine is built, stepped and
left in its thread; commands reach it through an inbox, and one callback per step brings its events back to the loop.
Knows no HTTP, no text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType

from typing_extensions import Self

from perft_serve.adapters.store import AdapterInfo
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest, EngineStats, FinishReason, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.params import RequestError
from perft_serve.server.metrics import Metrics, RequestRecorder

logger = logging.getLogger(__name__)

# Events a reader may be behind, per request: far beyond what sockets buffer, so only a reader that has stopped gets there.
MAX_PENDING_EVENTS = 4096
# Steps the event loop may be behind before the engine waits for it.
MAX_UNDELIVERED_STEPS = 64


class EngineDeadError(RuntimeError):
    """The engine has failed and takes no more requests."""


class EngineBusyError(RuntimeError):
    """So many requests are open that no more are taken now."""


class SlowReaderError(RuntimeError):
    """A client reads its stream so slowly that its request was given up."""


class EventStream:
    """The events of a few engine requests, in the order in which they happened; belongs to the event loop.

    Iterating gives lists: all events since the last one. Leaving the `with` block aborts what has not finished, so a
    handler that is cancelled frees its requests' pages.
    """

    def __init__(self, client: EngineClient, recorders: dict[str, RequestRecorder]) -> None:
        self._client = client
        self._open = recorders
        self._max_pending = MAX_PENDING_EVENTS * len(recorders)
        self._events: list[TokenEvent] = []
        self._failure: Exception | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up("abort")

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
        events, self._events = self._events, []
        return events

    def finish(self, request_id: str) -> None:
        """Ends one request early because its text is complete: a stop string was found."""
        recorder = self._open.pop(request_id, None)
        if recorder is not None:
            recorder.finish("stop", time.monotonic())
            self._client._abort([request_id])

    def _push(self, event: TokenEvent, now: float) -> None:
        recorder = self._open.get(event.request_id)
        if recorder is None:
            return
        recorder.record(event, now)
        self._events.append(event)
        if event.finish_reason is not None:
            del self._open[event.request_id]
        elif len(self._events) > self._max_pending:
            self._fail(SlowReaderError(f"the client is {self._max_pending} tokens behind: the request was given up"))
        self._changed.set()

    def _fail(self, failure: Exception) -> None:
        self._events = []
        self._failure = failure
        self._give_up("error")
        self._changed.set()

    def _give_up(self, reason: FinishReason) -> None:
        now = time.monotonic()
        for recorder in self._open.values():
            recorder.finish(reason, now)
        self._client._abort(list(self._open))
        self._open.clear()


class EngineClient:
    """Runs an engine in a thread; everything but `start`, `close` and `stats` belongs to one event loop.

    Args:
        build: makes the engine; called in the engine's thread.
        metrics: where requests are recorded.
        max_open_requests: the most requests running or waiting at a time.
    """

    def __init__(self, build: Callable[[], Engine], *, metrics: Metrics, max_open_requests: int = 1024) -> None:
        self._build = build
        self._metrics = metrics
        self._max_open_requests = max_open_requests
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._built: Future[None] = Future()
        self._stats = EngineStats(num_running=0, num_waiting=0, kv_usage=0.0, num_preemptions=0, num_steps=0)
        self._error: Exception | None = None
        # Of the event loop
        self._streams: dict[str, EventStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # Of both threads, under the lock of `_changed`: an abort is a request's id
        self._changed = threading.Condition()
        self._inbox: list[EngineRequest | str] = []
        self._undelivered = 0
        self._closing = False
        # Set once the engine is built
        self.limits = Limits(max_model_len=0, vocab_size=0)
        self.adapters: tuple[AdapterInfo, ...] = ()

    def start(self) -> None:
        """Starts the thread and waits until the engine is built.

        Raises:
            Exception: whatever building it has raised.
        """
        self._thread.start()
        self._built.result()

    def close(self) -> None:
        """Stops the engine after its present step, and waits for that; open requests get no more events."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def error(self) -> Exception | None:
        """Why the engine has stopped working, if it has."""
        return self._error

    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._stats

    def submit(self, requests: Sequence[EngineRequest]) -> EventStream:
        """Hands requests to the engine; their events come through one stream.

        Raises:
            EngineDeadError: the engine has failed.
            EngineBusyError: too many requests are open.
            RequestError: these are more than may ever be open at a time.
        """
        # First the loop, then the error: a failing engine sets the error first, then looks for the loop.
        self._loop = asyncio.get_running_loop()
        if self._error is not None:
            raise EngineDeadError(f"the engine has stopped: {self._error}")
        self.check_number(len(requests))
        if len(self._streams) + len(requests) > self._max_open_requests:
            raise EngineBusyError(f"{len(self._streams)} completions are running or waiting: try again later")
        stream = EventStream(self, {request.request_id: self._metrics.track(request) for request in requests})
        for request in requests:
            assert request.request_id not in self._streams, f"request {request.request_id} is open already"
            self._streams[request.request_id] = stream
        self._post(requests)
        return stream

    def check_number(self, num_requests: int) -> None:
        """Refuses what `submit` would refuse at any time; to be asked before work is put into so many requests.

        Raises:
            RequestError: these are more than may ever be open at a time.
        """
        if num_requests > self._max_open_requests:
            raise RequestError(
                f"{num_requests} completions asked for at once, but this server runs at most {self._max_open_requests}"
            )

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            del self._streams[request_id]
        if request_ids:
            self._post(request_ids)

    def _post(self, commands: Sequence[EngineRequest | str]) -> None:
        with self._changed:
            self._inbox.extend(commands)
            self._changed.notify()

    def _deliver(self, events: Sequence[TokenEvent], refused: dict[str, Exception], now: float) -> None:
        """In the event loop: hands a step's events to their streams."""
        with self._changed:
            self._undelivered -= 1
            self._changed.notify()
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # aborted meanwhile
                continue
            if event.finish_reason is not None:
                del self._streams[event.request_id]
            stream._push(event, now)
        for request_id, error in refused.items():
            stream = self._streams.get(request_id)
            if stream is not None:
                stream._fail(error)

    def _fail_all(self, failure: Exception) -> None:
        """In the event loop: ends all open requests."""
        for stream in set(self._streams.values()):
            stream._fail(failure)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            engine = self._build()
            self.limits = engine.limits
            self.adapters = tuple(engine.list_adapters())
            self._stats = engine.stats()
        except BaseException as error:  # it is raised again in `start`
            self._built.set_exception(error)
            return
        self._built.set_result(None)
        try:
            self._serve(engine)
            self._error = EngineDeadError("it was told to")
        except Exception as error:  # it becomes the reply to every open request
            logger.exception("the engine has failed")
            self._error = error
        self._call_in_loop(self._fail_all, EngineDeadError(f"the engine has stopped: {self._error}"))

    def _serve(self, engine: Engine) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closing
                        or bool(self._inbox)
                        or (engine.has_work() and self._undelivered < MAX_UNDELIVERED_STEPS)
                    )
                )
                if self._closing:
                    return
                commands, self._inbox = self._inbox, []
                may_step = self._undelivered < MAX_UNDELIVERED_STEPS
            refused = _obey(engine, commands)
            events = engine.step() if may_step and engine.has_work() else []
            self._stats = engine.stats()
            if events or refused:
                with self._changed:
                    self._undelivered += 1
                self._call_in_loop(self._deliver, events, refused, time.monotonic())

    def _call_in_loop(self, function: Callable[..., None], *args: object) -> None:
        if self._loop is None:  # nobody has asked for anything yet
            return
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the server has ended, and nobody waits for events
            logger.debug("the engine's last words are dropped: the event loop is closed")


def _obey(engine: Engine, commands: Sequence[EngineRequest | str]) -> dict[str, Exception]:
    """Carries out submissions and aborts; gives the requests that the engine refuses, with the reason."""
    refused: dict[str, Exception] = {}
    for command in commands:
        if isinstance(command, str):
            engine.abort(command)
            continue
        try:
            engine.submit(command)
        except Exception as error:  # it becomes the reply to this one request
            refused[command.request_id] = error
    return refused
