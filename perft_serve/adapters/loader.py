"""Adapters read, checked and staged off the engine's loop, each load in a thread of its own.

In: a ref to an adapter. Out: a `StagedAdapter`, or why there is none, as data. A thread fetches (which may hang on a network
and then holds up nothing but itself), reads (`perft.adapter`: safetensors only, whole or not at all, fitting the base) and
stages. Only the queue of results is shared with the engine's thread. What a ref's name and version mean it does not know.

Whoever hears of a request before the engine's thread does may have its adapter read ahead: the load that the engine's thread
starts later is then that one, begun earlier.

A thread cannot be stopped. A load that takes too long is given up: it has failed, what it brings later finds no taker, and
another may start in its place.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perft.adapter import Adapter
from perft.attention import AttentionBlock
from perft.errors import AdapterError, printable
from perft.lora import LoraAdapter, read_served_adapter
from perft.moe import MoeBlock
from perft_serve.adapters.arena import StagedAdapter
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.sources import check_sizes, fetched, is_remote

# Loads under way at once, of local folders, and as many of remote sources: a network that hangs holds up no folder.
MAX_LOADS = 8
# After that long a load is given up: it hangs, or is of no use to who waits for it.
LOAD_DEADLINE_SECONDS = 600.0
# For so long what was read ahead may be claimed: its request is a step behind it, not more.
AHEAD_SECONDS = 1.0
# Of these, a few may compute at once, since cores are the engine's. On a disk that hangs nobody waits for long, though.
_MAX_READING = max(1, min(MAX_LOADS, (os.cpu_count() or 1) // 4))
_READING_PATIENCE_SECONDS = 2.0
_CLOSING_PATIENCE_SECONDS = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """How a load ended.

    Args:
        number: what `Loader.start` was given.
        staged: the adapter; `None` if it failed.
        error: the reason then; names no source and no path.
        seconds: from the start of fetching to the end.
    """

    number: int
    staged: StagedAdapter | None
    error: str | None
    seconds: float


class _Task:
    """What a loader's thread does, and for which load. It may begin before that load is asked for."""

    def __init__(self, ref: AdapterRef, number: int | None) -> None:
        self.ref = ref
        self.number = number  # of the load; `None`: nobody has asked for it yet
        self.started = time.monotonic()
        self.ended: Loaded | None = None
        self.ready = threading.Event()
        self.thread: threading.Thread  # set before it starts


class Loader:
    """Loads, each in a thread of its own.

    Args:
        blocks: MoE blocks of the base that adapters must fit.
        stage: makes of a checked adapter what the arena copies.
        wake: called whenever a load has ended, mostly from a thread of the loader's.
        max_bytes: of an adapter's weights as a file; larger ones are not read.
        attention: the base's attention that LoRAs must fit.
    """

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        stage: Callable[[Adapter | LoraAdapter], StagedAdapter],
        wake: Callable[[], None],
        max_bytes: int | None = None,
        attention: Sequence[AttentionBlock] = (),
    ) -> None:
        self._blocks = tuple(blocks)
        self._attention = tuple(attention)
        self._stage = stage
        self._wake = wake
        self._max_bytes = max_bytes
        self._results: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._reading = threading.Semaphore(_MAX_READING)
        self._loads: dict[int, _Task] = {}  # those that are not taken yet, in the order in which they were started
        self._given_up: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()  # of `_ahead`, the tasks' numbers and ends, and torch's number of threads
        self._ahead: _Task | None = None  # what was read ahead last
        self._closed = threading.Event()
        self._watching = threading.Lock()
        self._watcher: threading.Thread | None = None  # while there are loads

    @property
    def num_loads(self) -> int:
        """Loads that were started and not yet taken."""
        return len(self._loads)

    def has_slot(self, remote: bool) -> bool:
        """Whether another load of a remote source, or of a local folder, may be started."""
        return sum(is_remote(load.ref.source) == remote for load in self._loads.values()) < MAX_LOADS

    @property
    def has_results(self) -> bool:
        """Whether `take_results` would give something."""
        return not self._results.empty() or self._is_overdue()

    def start(self, number: int, ref: AdapterRef) -> None:
        """Start a load, or take over the one that was begun ahead; there must be a slot for its kind of source."""
        assert self.has_slot(is_remote(ref.source))
        with self._lock:
            task = self._ahead
            if task is not None and task.ref == ref and not self._is_stale(task):
                self._ahead = None
                task.number = number
                self._loads[number] = task
                if task.ended is not None:
                    self._deliver(task)
            elif not self._begin(_Task(ref, number)):
                error = "the server has no thread left to read it with; try again later"
                self._results.put(Loaded(number=number, staged=None, error=error, seconds=0.0))
                self._wake()
        self._watch()

    def read_ahead(self, ref: AdapterRef) -> None:
        """From any thread: begin what `start` will soon be called for, if nothing else is being loaded. One at a time: those
        who wait in a queue are not overtaken, and what nobody claims is one adapter's memory at the most.
        """
        with self._lock:
            is_busy = self._ahead is not None and self._ahead.ended is None
            if not self._loads and not is_busy and not is_remote(ref.source):
                task = _Task(ref, None)
                self._ahead = task if self._begin(task) else None

    def take_results(self) -> list[Loaded]:
        """Loads that have ended, or were given up, since the last call."""
        with self._lock:
            if self._ahead is not None and self._is_stale(self._ahead):
                self._ahead = None  # its request was refused, or is over
        results = []
        while not self._results.empty():
            loaded = self._results.get()
            if self._given_up.pop(loaded.number, None) is None:
                del self._loads[loaded.number]
                results.append(loaded)
        while self._is_overdue():
            number = next(iter(self._loads))
            load = self._loads.pop(number)
            self._given_up[number] = load.thread
            seconds = time.monotonic() - load.started
            error = f"reading it from its source was given up after {seconds:.0f} seconds"
            _logger.warning("cannot load the adapter at %r: %s", load.ref.source, error)
            results.append(Loaded(number=number, staged=None, error=error, seconds=seconds))
        if not self._loads and not self._given_up and self._ahead is None:
            atexit.unregister(self.close)
        return results

    def load_as_data(self, number: int, source: str) -> Loaded:
        """Load in the caller's thread; whatever goes wrong is in the result."""
        start = time.monotonic()
        staged, reason = None, None
        try:
            staged = self._load(source)
        except AdapterError as error:
            reason = printable(str(error))  # it goes to other processes as UTF-8, whatever names of files it quotes
            _logger.warning("cannot load the adapter at %r: %s", source, reason)
        except Exception as error:  # a thread's end: what a source's own library raises must not leave requests waiting
            reason = f"it cannot be read from its source ({type(error).__name__})"
            _logger.warning("cannot load the adapter at %r", source, exc_info=True)
        return Loaded(number=number, staged=staged, error=reason, seconds=time.monotonic() - start)

    def close(self) -> None:
        """Wait for loads under way, but not for long; one that hangs ends with the process."""
        atexit.unregister(self.close)
        self._closed.set()
        deadline = time.monotonic() + _CLOSING_PATIENCE_SECONDS
        with self._lock:
            ahead = [] if self._ahead is None else [self._ahead.thread]
        for thread in [*ahead, *(load.thread for load in self._loads.values()), *self._given_up.values()]:
            if thread.ident is not None:  # else it could not be started
                thread.join(max(deadline - time.monotonic(), 0))

    def _is_overdue(self) -> bool:
        """Whether the load that was started first is to be given up."""
        first = next(iter(self._loads.values()), None)
        return first is not None and time.monotonic() - first.started >= LOAD_DEADLINE_SECONDS

    def _watch(self) -> None:
        """See to it that somebody looks for overdue loads: an engine that waits for nothing else does not look by itself."""
        with self._watching:
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._wake_now_and_then, name="adapter-load-watch", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread left: whoever looks next finds them
                    self._watcher.start()
                if self._watcher.ident is None:
                    self._watcher = None

    def _wake_now_and_then(self) -> None:
        while not self._closed.wait(LOAD_DEADLINE_SECONDS / 20):
            with self._watching:
                if not self._loads:
                    self._watcher = None
                    return
            self._wake()

    def _begin(self, task: _Task) -> bool:
        """Start a task's thread, and count its load as under way if it has one; false: there is no thread left.

        The thread's tensor operations use one core, or they would compete with the engine's team of threads.
        `torch.set_num_threads` is the calling thread's own with OpenMP, but it is also what threads that are new to torch
        begin with; so it is set back here.
        """
        if not self._loads and not self._given_up:
            atexit.register(self.close)  # an interpreter that ends under a thread in torch aborts the process
        num_threads = torch.get_num_threads()
        task.thread = threading.Thread(target=self._run, args=(task,), name="adapter-load", daemon=True)
        if task.number is not None:
            self._loads[task.number] = task
        try:
            task.thread.start()
        except RuntimeError:
            _logger.warning("cannot load the adapter at %r", task.ref.source, exc_info=True)
            return False
        task.ready.wait()
        torch.set_num_threads(num_threads)
        return True

    def _is_stale(self, task: _Task) -> bool:
        return task.ended is not None and time.monotonic() - task.started >= AHEAD_SECONDS

    def _deliver(self, task: _Task) -> None:
        assert task.ended is not None
        assert task.number is not None
        self._results.put(replace(task.ended, number=task.number))
        self._wake()

    def _run(self, task: _Task) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes over the process's number at its first use of torch: now, while that is 1
        task.ready.set()
        loaded = self.load_as_data(-1, task.ref.source)
        with self._lock:
            task.ended = loaded
            if task.number is not None:
                self._deliver(task)

    def _load(self, source: str) -> StagedAdapter:
        with fetched(source, self._max_bytes) as folder:
            check_sizes(folder, self._max_bytes)
            in_turn = self._reading.acquire(timeout=_READING_PATIENCE_SECONDS)
            try:
                return self._stage(read_served_adapter(folder, self._blocks, self._attention))
            except AdapterError as error:
                raise AdapterError(_without_folder(str(error), folder)) from error
            finally:
                if in_turn:
                    self._reading.release()


def _without_folder(message: str, folder: Path) -> str:
    """A message of `perft.adapter` that names no path: requests' senders read it."""
    for path, instead in ((f"{folder}{os.sep}", ""), (repr(str(folder)), "its folder"), (str(folder), "its folder")):
        message = message.replace(path, instead)
    return message
