"""The engine's process: started, watched, and started again when it dies or hangs.

In: an `EngineConfig`, and what an operator puts up with (`ServerConfig`). Out: a `Listener` is told what the engine says and
when it is gone. A thread of its own does the watching, so that a busy event loop is never taken for a dead engine. Knows no
requests, no streams, no HTTP.
"""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal, Protocol

import zmq

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.loop import Bell, command_address, report_address
from perft_serve.engine.messages import (
    Command,
    Failed,
    Heartbeat,
    MessageError,
    Report,
    Start,
    Started,
    StartFailed,
    StepOutput,
    Stop,
    decode_report,
    encode,
)
from perft_serve.server.config import ServerConfig

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "restarting", "dead"]

ENGINE_COMMAND = (sys.executable, "-m", "perft_serve.engine.process")
# An engine that has run for so long has not failed because of how it was started: restarts count anew.
RUNS_WELL_SECONDS = 300.0
MAX_BACKOFF_SECONDS = 30.0
# A start may read for long while it holds Python's lock: so much longer may it be silent, once it has said anything. One again
# should take about as long as the first, which had no limit, since it may have fetched the model.
_START_PATIENCE = 6
_MIN_START_SECONDS = 600.0
_START_FACTOR = 10
# For the present step to end after `Stop`; for the stacks of a hanging process to be written; for what an ended process has
# said to come out of the sockets.
_STOP_SECONDS = 10.0
_DUMP_SECONDS = 0.5
_LAST_WORDS_SECONDS = 0.1
# The longest sleep of the watching thread. Silence is counted in sleeps, not by the clock: when the whole server was
# stopped and goes on (Ctrl-Z, a suspended machine), nobody was silent.
_SLICE_SECONDS = 0.5
_RECONNECT_MS = 20
# Of Linux; elsewhere it is shorter still.
_MAX_ADDRESS = 100


class EngineStartError(ValueError):
    """The engine could not be started; the message says why, and what to do about it."""


class EngineGoneError(Exception):
    """The engine's process has ended, or is about to."""


class EngineFailedError(Exception):
    """The engine has raised something; the message says what."""


class EngineHangsError(Exception):
    """The engine's process is there, but does nothing."""


_KNOWN_ERRORS = (EngineStartError, EngineFailedError, EngineGoneError, EngineHangsError, MessageError, OSError)


class Listener(Protocol):
    """Whoever uses the engine. All calls come from the supervisor's thread, in the order in which things happen."""

    def engine_started(self, link: EngineLink, started: Started) -> None:
        """An engine takes commands through `link` from now on."""

    def engine_said(self, link: EngineLink, output: StepOutput) -> None:
        """A step has ended."""

    def engine_gone(self, reason: str, retry_after: int | None) -> None:
        """The engine has failed, and the next will start in about so many seconds, or (`None`) never; clients may read why."""


class EngineLink:
    """One process of the engine, and the sockets to it.

    `send` may be called from any thread; all else belongs to the thread that made the link.

    Args:
        command: the command line that starts the process; the folder of the sockets is added to it.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, command: Sequence[str], bell: Bell) -> None:
        self._bell = bell
        self._folder = tempfile.TemporaryDirectory(prefix="perft-")  # private: mode 0700
        if len(report_address(self._folder.name)) > _MAX_ADDRESS:
            self._folder.cleanup()
            raise OSError(f"the folder for temporary files has too long a name for a socket: {tempfile.gettempdir()}")
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._reports = self._context.socket(zmq.PULL)
        self._poller = zmq.Poller()
        self._lock = threading.Lock()
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)  # no limit: the engine waits for `Delivered`, commands are bounded by the open requests
        try:
            # The end that sends connects: a message for which nobody is there yet is kept
            self._commands.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
            self._commands.connect(command_address(self._folder.name))
            self._reports.bind(report_address(self._folder.name))
            # A session of its own: Ctrl-C in a terminal reaches the front only
            self._process = subprocess.Popen(
                [*command, self._folder.name], stdin=subprocess.PIPE, start_new_session=True
            )
        except BaseException:
            self._close_sockets()
            raise
        self._poller.register(self._reports, zmq.POLLIN)
        self._poller.register(bell.fileno(), zmq.POLLIN)
        self._exited = threading.Event()
        self._waiter = threading.Thread(target=self._wait, name="engine-exit", daemon=True)
        self._waiter.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Gives a command; when the process is gone, nothing happens.

        Raises:
            UnicodeEncodeError: the command holds a text with a lone surrogate.
        """
        data = encode(command)
        with self._lock:
            if not self._commands.closed:
                self._commands.send(data, zmq.NOBLOCK)

    def receive(self, timeout: float) -> list[Report]:
        """What the engine has said since the last call; waits for it until the time is over or the bell rings.

        Raises:
            EngineGoneError: the process has ended, and everything that it said was received.
            MessageError: it said something that makes no sense.
        """
        exited = self._exited.is_set()  # asking the system at every step would cost more than reading the report
        if exited:
            self._reports.poll(int(_LAST_WORDS_SECONDS * 1000))
        else:
            self._poller.poll(int(timeout * 1000))
            self._bell.clear()
        reports = []
        while True:
            try:
                reports.append(decode_report(self._reports.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        if exited and not reports:
            raise EngineGoneError(_epitaph(self._process.returncode))
        return reports

    def dump(self) -> None:
        """Has a process that hangs write to the log what its threads are doing."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP_SECONDS)

    def close(self, *, wait: float = 0.0) -> None:
        """Ends the process, by force unless it ends by itself in `wait` seconds, and frees everything."""
        try:
            self._process.wait(wait)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()
        self._waiter.join()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        with self._lock:
            self._commands.close(linger=0)
        self._reports.close(linger=0)
        self._context.term()
        self._folder.cleanup()

    def _wait(self) -> None:
        self._process.wait()
        self._exited.set()
        self._bell.ring()


def _epitaph(status: int) -> str:
    """What there is to say of a process that ended without a word."""
    if status >= 0:
        return f"the engine's process has ended with status {status}; its last words are in the log"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    if -status == signal.SIGKILL:
        return (
            f"the engine's process was killed ({name}); if nobody did it by hand, the machine or the container has run out of "
            "memory (the kernel's log says so): give less kv_memory, adapter_memory or host_adapter_memory"
        )
    return f"the engine's process was killed by {name}; its last words are in the log"


def _for_clients(error: Exception) -> str:
    """What clients are told of a failure. What others have said (a library's message, a path) is for the log alone."""
    match error:
        case EngineGoneError() | EngineHangsError():  # in our own words
            return str(error)
        case EngineFailedError():
            return "the engine has failed; the log says why"
        case EngineStartError() | OSError():
            return "the engine cannot be started; the log says why"
        case MessageError():
            return "the engine and the server do not understand each other; the log has the message"
    return "the engine's supervisor has failed; the log says why"


def _delay(num_failures: int) -> float:
    """Seconds to wait before the next start: none at first, then 1, 2, 4, ..."""
    return 0.0 if num_failures == 1 else min(2.0 ** (num_failures - 2), MAX_BACKOFF_SECONDS)


class Supervisor:
    """Keeps an engine running.

    Args:
        engine_config: of every engine that it starts; the restarted ones are told of adapters by the listener.
        config: how often to restart, and when an engine counts as hanging.
        listener: is told of everything.
        command: the command line of the engine's process.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        listener: Listener,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._engine_config = engine_config
        self._config = config
        self._listener = listener
        self._command = command
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._first_start: Future[None] = Future()
        self._bell = Bell()
        self._closing = threading.Event()
        # Of the supervisor's thread
        self._began = 0.0
        self._start_seconds = 0.0
        self._most_start_seconds = math.inf
        self._num_failures = 0
        # Read from other threads
        self.state: EngineState = "starting"
        self.num_restarts = 0
        self.error: str | None = None  # in words for clients
        self.pid: int | None = None

    def start(self) -> None:
        """Starts the engine, and waits until it takes requests.

        Raises:
            EngineStartError: it cannot be started.
            OSError: its process cannot.
        """
        self._thread.start()
        self._first_start.result()

    def close(self) -> None:
        """Ends the engine after its present step, and waits for that. The listener is told that it is gone."""
        self._closing.set()
        self._bell.ring()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        """The supervisor's thread."""
        while (delay := self._run_engine()) is not None:
            if self._closing.wait(delay):
                self._end("the server is stopping")
                return
            self.num_restarts += 1
            self._engine_config = replace(self._engine_config, adapters={})

    def _run_engine(self) -> float | None:
        """One engine, from its start to its end; returns after how many seconds to start another, if at all."""
        link: EngineLink | None = None
        self._began = time.monotonic()
        try:
            link = EngineLink(self._command, self._bell)
            self.pid = link.pid
            link.send(Start(config=self._engine_config, log_format=self._config.log_format))
            self._follow(link)
        except Exception as error:  # whatever it is, the listener must know, and another engine may do better
            if not isinstance(error, _KNOWN_ERRORS):
                logger.error("the supervisor has failed", exc_info=error)
            if not self._first_start.done():
                self._fail_start(error)
                delay = None
            else:
                delay = self._fail(error)
            if link is not None:
                if isinstance(error, EngineHangsError):
                    link.dump()
                link.close()
            return delay
        is_up = self.state == "ready"
        self._end("the server is stopping")
        if is_up:
            link.send(Stop())
        link.close(wait=_STOP_SECONDS if is_up else 0.0)
        return None

    def _follow(self, link: EngineLink) -> None:
        """Hears what an engine says until the server stops.

        Raises:
            EngineStartError, EngineFailedError, EngineGoneError, EngineHangsError, MessageError: it is of no more use.
        """
        silence, has_spoken = 0.0, False
        while not self._closing.is_set():
            reports = link.receive(_SLICE_SECONDS)
            silence = 0.0 if reports else silence + _SLICE_SECONDS
            has_spoken = has_spoken or bool(reports)
            for report in reports:
                self._take(link, report)
            is_up = self.state == "ready"
            patience = self._config.engine_heartbeat_timeout * (1 if is_up else _START_PATIENCE)
            if has_spoken and silence > patience:
                raise EngineHangsError(f"the engine's process has said nothing for {silence:g} seconds")
            if not is_up and time.monotonic() - self._began > self._most_start_seconds:
                raise EngineHangsError(f"the engine has not started within {self._most_start_seconds:.0f} seconds")

    def _take(self, link: EngineLink, report: Report) -> None:
        match report:
            case StepOutput():
                self._listener.engine_said(link, report)
            case Heartbeat(busy_seconds=busy):
                if 0 < self._config.engine_step_timeout < busy:
                    raise EngineHangsError(
                        f"a step of the engine takes longer than {self._config.engine_step_timeout} seconds "
                        "(engine_step_timeout)"
                    )
            case Started():
                now = time.monotonic()
                self._start_seconds, self._began = now - self._began, now
                self._listener.engine_started(link, report)
                self.error = None
                self.state = "ready"
                if not self._first_start.done():
                    self._most_start_seconds = max(_MIN_START_SECONDS, _START_FACTOR * self._start_seconds)
                    self._first_start.set_result(None)
                else:
                    logger.info("the engine is back, after %.1f seconds", self._start_seconds)
            case StartFailed(reason=reason):
                raise EngineStartError(reason)
            case Failed(reason=reason):
                raise EngineFailedError(f"the engine has failed: {reason}")

    def _fail_start(self, error: Exception) -> None:
        self.state = "dead"
        self.error = _for_clients(error)
        if not isinstance(error, (EngineStartError, OSError)):
            error = EngineStartError(str(error))
        self._first_start.set_exception(error)

    def _fail(self, error: Exception) -> float | None:
        """The engine has failed: tells everybody; returns after how many seconds to start another, if at all."""
        reason = _for_clients(error)
        ran_well = self.state == "ready" and time.monotonic() - self._began > RUNS_WELL_SECONDS
        self._num_failures = 1 if ran_well else self._num_failures + 1
        if self._num_failures > self._config.engine_restarts:
            logger.error("%s; it is given up after %d restarts", error, self._num_failures - 1)
            self._end(reason)
            return None
        delay = _delay(self._num_failures)
        logger.error("%s; restart %d of %d", error, self._num_failures, self._config.engine_restarts)
        self.error = reason
        self.state = "restarting"
        self._listener.engine_gone(reason, max(1, math.ceil(delay + self._start_seconds)))
        return delay

    def _end(self, reason: str) -> None:
        """There will be no other engine."""
        self.error = reason
        self.state = "dead"
        self._listener.engine_gone(reason, None)
