"""What an engine's process does: commands in, one report a step out.

In: something to build an engine with, and the folder of the sockets to the front. Out: an exit status. It sleeps when there is
nothing to do, also while all that waits, waits for an adapter; it never runs more than `WINDOW` steps ahead of what the front
has delivered. A second thread takes commands in as they come, also in the middle of a step, so that the engine may prepare for
them; a third tells the front once a second that it lives, and ends the process when the front is gone.

When to stop is the front's decision alone: signals that go to a whole group of processes (Ctrl-C, a service manager's SIGTERM)
are ignored here. SIGUSR1 writes what every thread is doing to stderr. Knows no torch.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import zmq

from perft.errors import PerftError
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import EngineCounts
from perft_serve.engine.events import EngineRequest, EngineStats, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.logs import log_to_stderr
from perft_serve.engine.messages import (
    Abort,
    Command,
    Delivered,
    Failed,
    Heartbeat,
    Refusal,
    Reply,
    Report,
    Retire,
    Start,
    Started,
    StartFailed,
    StepOutput,
    Stop,
    Submit,
    Warm,
    decode_command,
    encode,
)
from perft_serve.engine.params import RequestError

logger = logging.getLogger(__name__)

# Steps that the front may be behind before the engine waits for it.
WINDOW = 64
HEARTBEAT_SECONDS = 1.0
# What the engine counts for metrics is told this often while it is busy, and before it sleeps.
COUNTS_SECONDS = 1.0
# How long the last report may take to get away.
_LINGER_MS = 2000
ORPHANED_STATUS = 70


class SteppedEngine(Protocol):
    """What of `Engine` the loop uses."""

    @property
    def limits(self) -> Limits: ...
    @property
    def base_digest(self) -> str: ...
    def foresee(self, request: EngineRequest) -> None: ...
    def submit(self, request: EngineRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def stats(self) -> EngineStats: ...
    def take_counts(self) -> EngineCounts | None: ...
    def warm(self, ref: AdapterRef, pin: bool | None = None) -> None: ...
    def retire(self, name: str, up_to_version: int, force: bool = False, only: bool = False) -> None: ...
    def adapter_updates(self) -> list[AdapterStatus]: ...
    def close(self) -> None: ...


Build = Callable[[EngineConfig, Callable[[], None]], SteppedEngine]
"""Makes an engine; it calls the second argument, from any thread, when there is work for `step` that no command brings."""


def command_address(folder: str) -> str:
    """Where the front sends commands."""
    return f"ipc://{folder}/commands"


def report_address(folder: str) -> str:
    """Where the front hears reports."""
    return f"ipc://{folder}/reports"


def run_process(arguments: Sequence[str], build: Build) -> int:
    """The whole life of an engine's process; returns its exit status.

    Standard input is the front's life line: it stays open, and silent, as long as the front lives.

    Args:
        arguments: of the command line: the folder where the sockets are, or will be.
        build: makes the engine that the first command asks for.
    """
    (folder,) = arguments
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    log_to_stderr()
    context = zmq.Context()
    commands = context.socket(zmq.PULL)
    reports = context.socket(zmq.PUSH)
    commands.bind(command_address(folder))
    reports.connect(report_address(folder))
    pulse = Pulse(folder, life_line=sys.stdin.fileno())
    try:
        return _serve(commands, reports, pulse, build)
    finally:
        pulse.stop()
        commands.close(linger=0)
        reports.close(linger=_LINGER_MS)
        context.term()


def _serve(commands: zmq.Socket[bytes], reports: zmq.Socket[bytes], pulse: Pulse, build: Build) -> int:
    start = decode_command(commands.recv())
    assert isinstance(start, Start), f"the first command is {start}"
    log_to_stderr(start.log_format)
    bell = Bell()
    try:
        engine = build(start.config, bell.ring)
    except Exception as error:  # the front tells the user, and decides what to do
        reports.send(encode(StartFailed(reason=_start_failure(error))))
        return 1
    inbox = Inbox(commands, bell, engine.foresee)
    try:
        EngineLoop(engine, inbox, reports, bell, pulse).run()
        return 0
    except Exception as error:  # the front tells the clients, and starts another process
        logger.exception("the engine has failed")
        reports.send(encode(Failed(reason=f"{type(error).__name__}: {error}")))
        return 1
    finally:
        inbox.stop()
        engine.close()


def _start_failure(error: Exception) -> str:
    """What to tell the user; what is not the user's to mend is logged with its traceback."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    logger.error("the engine cannot be built", exc_info=error)
    reason = f"the engine cannot be built: {type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return f"{reason}; give it less kv_memory, adapter_memory or host_adapter_memory"
    return f"{reason} (the traceback is in the log)"


class EngineLoop:
    """Obeys commands, steps, reports.

    Args:
        engine: belongs to the thread that runs this loop.
        bell: rung by the engine's other threads when a step would find something to do, and by the inbox.
        pulse: is told when the engine is busy.
    """

    def __init__(
        self, engine: SteppedEngine, inbox: Inbox, reports: zmq.Socket[bytes], bell: Bell, pulse: Pulse
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._reports = reports
        self._bell = bell
        self._pulse = pulse
        self._backlog: list[Command] = []
        self._num_sent = 0
        self._num_delivered = 0
        self._stats = engine.stats()
        self._counted = time.monotonic()

    def run(self) -> None:
        """Runs until a `Stop` comes.

        Raises:
            Exception: whatever the engine's step has raised; `MessageError`: a command makes no sense.
        """
        self._send(
            Started(
                limits=self._engine.limits,
                base_digest=self._engine.base_digest,
                stats=self._stats,
                adapters=self._engine.adapter_updates(),
            )
        )
        while self._listen():
            if self._has_credit:
                with self._pulse:
                    self._turn()

    @property
    def _has_credit(self) -> bool:
        return self._num_sent - self._num_delivered < WINDOW

    def _listen(self) -> bool:
        """Takes what has come, and waits for something if there is nothing to do; false: it is time to stop."""
        is_due = self._has_credit and (bool(self._backlog) or self._engine.has_work())
        if not is_due and not self._inbox:
            self._bell.wait()
        while self._inbox:
            command = self._inbox.take()
            if isinstance(command, Stop):
                return False
            if isinstance(command, Delivered):
                self._num_delivered = command.num_outputs
            else:
                self._backlog.append(command)
        return True

    def _turn(self) -> None:
        """Obeys, steps and reports."""
        backlog, self._backlog = self._backlog, []
        refused: list[Refusal] = []
        replies: list[Reply] = []
        for command in backlog:
            self._obey(command, refused, replies)
        events = self._engine.step()
        before, self._stats = self._stats, self._engine.stats()
        updates = self._engine.adapter_updates()
        counts = self._take_counts()
        if events or refused or replies or updates or counts or self._stats != before:
            self._num_sent += 1
            self._send(
                StepOutput(
                    stats=self._stats,
                    events=events,
                    refused=refused,
                    replies=replies,
                    adapters=updates,
                    counts=counts,
                )
            )

    def _take_counts(self) -> EngineCounts | None:
        now = time.monotonic()
        if now - self._counted < COUNTS_SECONDS and self._engine.has_work():
            return None
        self._counted = now
        return self._engine.take_counts()

    def _obey(self, command: Command, refused: list[Refusal], replies: list[Reply]) -> None:
        match command:
            case Submit(requests=requests):
                refused += self._submit(requests)
            case Abort(request_ids=request_ids):
                for request_id in request_ids:
                    self._engine.abort(request_id)
            case Warm() | Retire():
                replies.append(self._manage(command))
            case _:
                raise AssertionError(f"not a command for a running engine: {command}")

    def _submit(self, requests: Sequence[EngineRequest]) -> list[Refusal]:
        refused = []
        for request in requests:
            try:
                self._engine.submit(request)
            except PerftError as error:
                param = error.param if isinstance(error, RequestError) else "model"
                refused.append(Refusal(request_id=request.request_id, reason=str(error), param=param))
            except Exception:  # it becomes the reply to this one request
                logger.exception("a request cannot be submitted", extra={"request_id": request.request_id})
                refused.append(Refusal(request_id=request.request_id, reason="internal error", internal=True))
        return refused

    def _manage(self, command: Warm | Retire) -> Reply:
        try:
            if isinstance(command, Warm):
                self._engine.warm(command.ref, pin=command.pin)
            else:
                self._engine.retire(command.name, command.up_to_version, force=command.force, only=command.only)
        except PerftError as error:
            return Reply(number=command.number, error=str(error))
        return Reply(number=command.number)

    def _send(self, report: Report) -> None:
        self._reports.send(encode(report))


class Inbox:
    """A thread that takes commands off their socket as they come, and rings.

    Args:
        commands: the socket; belongs to the thread until that has stopped.
        bell: rung for every command.
        foresee: told at once of requests to be submitted, in the inbox's thread.
    """

    def __init__(self, commands: zmq.Socket[bytes], bell: Bell, foresee: Callable[[EngineRequest], None]) -> None:
        self._socket = commands
        self._bell = bell
        self._foresee = foresee
        self._commands: deque[Command | Exception] = deque()
        self._stopped = Bell()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    def __bool__(self) -> bool:
        return bool(self._commands)

    def take(self) -> Command:
        """The command that came first.

        Raises:
            MessageError: what came makes no sense.
            Exception: the thread has failed.
        """
        command = self._commands.popleft()
        if isinstance(command, Exception):
            raise command
        return command

    def stop(self) -> None:
        """Ends the thread; the socket is the caller's again."""
        self._stopped.ring()
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stopped.fileno(), zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._stopped.fileno() in ready:
                    return
                self._put(decode_command(self._socket.recv()))
        except Exception as error:  # it ends the engine, whose thread raises it
            self._commands.append(error)
            self._bell.ring()

    def _put(self, command: Command) -> None:
        self._commands.append(command)
        self._bell.ring()
        if isinstance(command, Submit):
            for request in command.requests:
                self._foresee(request)


class Bell:
    """Wakes a thread that polls a file descriptor; may be rung from any thread, any number of times."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """The descriptor that is readable once the bell was rung."""
        return self._reader

    def ring(self) -> None:
        """Makes the descriptor readable."""
        with suppress(BlockingIOError):  # it was rung 65536 times already
            os.write(self._writer, b"\0")

    def wait(self) -> None:
        """Returns once it was rung since the last time, and forgets that."""
        select.select([self._reader], [], [])
        self.clear()

    def clear(self) -> None:
        """Forgets that it was rung."""
        with suppress(BlockingIOError):
            while os.read(self._reader, 65536):
                pass


class Pulse:
    """A thread that says once a second that the process lives, and for how long the engine has been busy with one step.

    It ends the process when the front is gone, whatever the engine is doing: there is nobody left to do it for.
    As a context it marks the time that the engine is busy.
    """

    def __init__(self, folder: str, *, life_line: int) -> None:
        self._folder = folder
        self._life_line = life_line
        self._busy_since: float | None = None
        self._stopped = Bell()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._busy_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._busy_since = None

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.ring()
        self._thread.join()

    def _run(self) -> None:
        context = zmq.Context()
        reports = context.socket(zmq.PUSH)
        reports.connect(report_address(self._folder))
        while True:
            ready, _, _ = select.select([self._life_line, self._stopped.fileno()], [], [], HEARTBEAT_SECONDS)
            if self._stopped.fileno() in ready:
                break
            if ready and not os.read(self._life_line, 1):
                self._clean_up()
                os._exit(ORPHANED_STATUS)
            busy_since = self._busy_since
            reports.send(encode(Heartbeat(busy_seconds=0.0 if busy_since is None else time.monotonic() - busy_since)))
        reports.close(linger=0)
        context.term()

    def _clean_up(self) -> None:
        """Removes what the front would have: the sockets, and their folder if nothing else is in it."""
        with suppress(OSError):
            for address in (command_address(self._folder), report_address(self._folder)):
                os.unlink(address.removeprefix("ipc://"))
            os.rmdir(self._folder)
