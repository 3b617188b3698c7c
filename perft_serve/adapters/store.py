"""The life of adapters: registered, read by a loader thread, in host memory, in the arena, gone.

In: refs (`catalog.AdapterRef`), as requests for them come, run and end, and `poll` between the engine's steps. Out: leases on
resident adapters, statuses, numbers. It knows no requests and no batch, and leaves to `tiers.py` what is in which memory. One
thread uses it, but for `foresee`. No call's time grows with the number of adapters that are known.

An *entry* here is one version of a name, a *content* what an adapter computes, by its digest: entries of equal content share
its memory. Loads start in the order in which they were asked for, so many at once of local folders and so many of remote
sources (`loader.py`); none starts while requests wait for all that host memory holds, so a crowd of waiting adapters cannot
push one another out. Files that change while requests run on them end those requests: no request sees two contents.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from perft.errors import AdapterError
from perft_serve.adapters.arena import AdapterArena, StagedAdapter, StagedLora, StagedPerft
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.loader import Loaded, Loader
from perft_serve.adapters.sources import is_remote, source_kind
from perft_serve.adapters.status import AdapterMemory, AdapterState, AdapterStatus, Hold, Lease, load_failure
from perft_serve.adapters.tiers import Content, Tiers

# A source that could not be read is left alone for so long, however many requests come for it: they share the reason.
RETRY_SECONDS = 1.0

# A file of weights that fills the arena has float32 at the most, and in front of them names and shapes.
_MAX_ITEM_BYTES = 4
_HEADER_BYTES = 1 << 20

_Key: TypeAlias = "tuple[str, int]"


class _Entry:
    """One version of a name."""

    __slots__ = (
        "content",
        "digest",
        "error",
        "facts",
        "is_retired",
        "is_warmed",
        "last_used",
        "load_number",
        "num_in_flight",
        "pin_error",
        "pinned",
        "ref",
        "was_run",
    )

    def __init__(self, ref: AdapterRef, *, is_retired: bool) -> None:
        self.ref = ref
        self.is_retired = is_retired
        self.content: Content | None = None  # while it is in a tier
        self.digest: str | None = None
        self.error: str | None = None  # why its last load failed
        self.pin_error: str | None = None  # why it could not be pinned
        self.facts: dict[str, Any] = {}  # fields of AdapterStatus that come from the file
        self.is_warmed = False  # to be loaded though nobody waits
        self.last_used: float | None = None
        self.load_number: int | None = None  # while it is being loaded
        self.num_in_flight = 0
        self.pinned = False
        self.was_run = False  # requests that are in flight now have run, on `digest`

    @property
    def key(self) -> _Key:
        return (self.ref.name, self.ref.version)


class AdapterStore:
    """Adapters in one arena and in the host memory behind it.

    Args:
        arena: the device memory; nobody else loads into it.
        host_bytes: size of the host tier. Loads under way come on top.
        wake: called when `poll` has something to do: by a loader thread when a load has ended, or at the end of a call here.
        observe: is told how long bringing an adapter took, in seconds: `load_folder`, `load_hub`, `load_url` from its source
            into host memory, `load_host` from there into the arena.
    """

    def __init__(
        self,
        arena: AdapterArena,
        *,
        host_bytes: int,
        wake: Callable[[], None] | None = None,
        observe: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self._arena = arena
        self._host_bytes = host_bytes
        self._wake = wake if wake is not None else lambda: None
        self._observe = observe
        self._tiers = Tiers(
            arena, host_bytes, self._on_move, self._on_refused_pin, lambda seconds: observe("load_host", seconds)
        )
        max_bytes = arena.rows_SD.numel() * _MAX_ITEM_BYTES + _HEADER_BYTES
        self._loader = Loader(arena.blocks, arena.stage, self._wake, max_bytes, arena.attention)
        self._load_numbers = itertools.count()
        self._entries: dict[str, dict[int, _Entry]] = {}  # by name and version
        self._entries_of: dict[str, dict[_Key, _Entry]] = {}  # by digest, of contents that are in a tier
        self._retired: dict[str, int] = {}  # name to the highest version that is retired
        # to be loaded, first come first: from local folders, from remote sources
        self._pending: tuple[dict[_Key, _Entry], dict[_Key, _Entry]] = ({}, {})
        self._loading: dict[int, _Entry] = {}  # by number of the load
        self._failed: dict[_Key, tuple[float, str]] = {}  # loads that failed lately: when and why, in that order
        self._changed: dict[_Key, _Entry] = {}
        self._last_words: list[AdapterStatus] = []  # of entries that are gone
        self._num_loads = 0
        self._num_load_failures = 0
        self._load_seconds = 0.0

    def enter(self, ref: AdapterRef) -> None:
        """A request for `ref` has come: it is in flight until `leave`, and the adapter is brought.

        If its last load failed, it is tried again, unless that was less than `RETRY_SECONDS` ago.
        """
        entry = self._entry(ref)
        entry.num_in_flight += 1
        entry.last_used = time.time()
        entry.error = self._recent_failure(entry.key) if entry.content is None else None
        self._note(entry)
        if entry.content is not None:
            self._tiers.add_waiting(entry.content, 1)
            self._tiers.touch(entry.content)
        elif entry.error is None:
            self._want(entry)

    def foresee(self, ref: AdapterRef) -> None:
        """From any thread: a request for `ref` is on its way, and will `enter` soon. If the adapter is to be read from its
        source then, that may begin now.
        """
        entry = self._entries.get(ref.name, {}).get(ref.version)
        if entry is None or (entry.content is None and entry.error is None and entry.load_number is None):
            self._loader.read_ahead(ref)

    def leave(self, ref: AdapterRef) -> None:
        """A request that has entered is over. If it holds a lease, that is released first."""
        entry = self._entries[ref.name][ref.version]
        assert entry.num_in_flight
        entry.num_in_flight -= 1
        entry.last_used = time.time()
        self._note(entry)
        if entry.content is not None:
            self._tiers.add_waiting(entry.content, -1)
            self._tiers.trim_host()
        if not entry.num_in_flight:
            entry.was_run = False
            if entry.is_retired:
                self._remove(entry)
            elif entry.content is None and entry.error is not None:
                self._forget(entry)
            elif not entry.is_warmed:
                self._queue(entry).pop(entry.key, None)
        self._nudge()

    def acquire(self, ref: AdapterRef) -> Lease | Hold:
        """A lease on an adapter for which a request is in flight, or why there is none yet.

        Evicts adapters that nobody uses, if that makes room, and copies at once as far as this step's share allows.

        Raises:
            AdapterError: it could not be loaded, or can never fit beside what is pinned.
        """
        entry = self._entries[ref.name][ref.version]
        assert entry.num_in_flight
        content = entry.content
        if content is None:
            if entry.error is not None:
                raise AdapterError(load_failure(ref.name, entry.error))
            self._want(entry)
            return Hold.LOADING
        try:
            hold = self._tiers.bring(content)
        except AdapterError as error:
            raise AdapterError(f"adapter {ref.name!r}: {error}") from error
        if hold is not None:
            self._nudge()
            return hold
        self._tiers.hold(content)
        entry.was_run = True
        return Lease(ref=ref, slot=content.slot, width=content.width, digest=content.digest, is_lora=content.is_lora)

    def release(self, lease: Lease) -> None:
        """The sequence that had this lease no longer runs."""
        entry = self._entries[lease.ref.name][lease.ref.version]
        assert entry.content is not None
        assert entry.content.slot == lease.slot
        self._tiers.let_go(entry.content)
        self._nudge()

    def warm(self, ref: AdapterRef, pin: bool | None = None) -> None:
        """Bring an adapter without a request: into host memory, and into the arena if there is room that nobody has.

        If its last load failed, it is tried again at once.

        Args:
            ref: which one.
            pin: bring it into the arena in any case and never evict it, until it is retired or unpinned (`False`). If that
                turns out not to be possible only when it has been read, or when it is to be placed, its status says why, and
                that it is not pinned.

        Raises:
            AdapterError: it is retired, or cannot be pinned.
        """
        if ref.version <= self._retired.get(ref.name, 0):
            raise AdapterError(f"version {ref.version} of adapter {ref.name!r} was deleted or replaced")
        entry = self._entry(ref)
        entry.error = None
        self._failed.pop(entry.key, None)
        if pin:
            entry.pin_error = None
        self._note(entry)
        if pin is False:
            self._unpin(entry)
        if entry.content is None:
            entry.is_warmed = True
            entry.pinned = entry.pinned or bool(pin)
            self._want(entry)
        else:
            if pin:
                self._pin(entry)
            self._tiers.bring_if_free(entry.content)
        self._nudge()

    def retire(self, name: str, up_to_version: int, only: bool = False) -> None:
        """No new requests come for these versions: each is dropped as soon as nothing is in flight on it.

        Every version that goes is reported as `removed`, and `up_to_version` in any case.

        Args:
            only: just that version, which no request was told of.
        """
        if not only:
            self._retired[name] = max(up_to_version, self._retired.get(name, 0))
        versions = self._entries.get(name, {})
        if up_to_version not in versions:
            self._last_words.append(AdapterStatus(name=name, version=up_to_version, state="removed"))
        lowest = up_to_version if only else 0
        for entry in [entry for version, entry in versions.items() if lowest <= version <= up_to_version]:
            entry.is_retired = True
            self._unpin(entry)
            self._note(entry)
            if not entry.num_in_flight:
                self._remove(entry)
        self._nudge()

    def poll(self) -> bool:
        """Between two steps: takes in loads that have ended, starts others, goes on copying and wiping.

        Returns:
            `has_work()` as it is then.
        """
        for loaded in self._loader.take_results():
            self._take_in(loaded)
        self._tiers.step()
        self._start_loads()
        self._nudge()
        return self.has_work()

    def has_work(self) -> bool:
        """Whether `poll` has something to do now, rather than when a load has ended or a lease is released."""
        return self._loader.has_results or self._tiers.has_work or self._can_start_a_load()

    def updates(self) -> list[AdapterStatus]:
        """Statuses that have changed since the last call; what is gone comes first."""
        statuses = self._last_words + [self._status(entry) for entry in self._changed.values()]
        self._last_words, self._changed = [], {}
        return statuses

    def memory(self) -> AdapterMemory:
        """The memory of adapters now."""
        return AdapterMemory(
            arena_bytes=self._arena.num_bytes,
            arena_used_bytes=self._arena.num_bytes - self._arena.num_free_bytes,
            host_bytes=self._host_bytes,
            host_used_bytes=self._tiers.host_used_bytes,
            num_resident=self._tiers.num_resident,
            num_loads=self._num_loads,
            num_load_failures=self._num_load_failures,
            num_evictions=self._tiers.num_evictions,
            load_seconds=self._load_seconds,
        )

    def load_now(self, ref: AdapterRef, pin: bool = False) -> AdapterStatus:
        """Load an adapter in the caller's thread, for the start: into the arena if there is room, else into host memory.

        Raises:
            AdapterError: it cannot be loaded, or not be pinned.
        """
        entry = self._entry(ref)
        assert entry.content is None
        entry.is_warmed = True
        entry.pinned = pin
        entry.load_number = next(self._load_numbers)
        self._loading[entry.load_number] = entry
        self._take_in(self._loader.load_as_data(entry.load_number, ref.source))
        reason = entry.error or entry.pin_error
        if reason is not None:
            raise AdapterError(f"adapter {ref.name!r} (from {ref.source!r}): {reason}")
        while entry.content is not None and self._tiers.is_incoming(entry.content):
            self._tiers.step()
        return self._status(entry)

    def close(self) -> None:
        """Let the loader threads end."""
        self._loader.close()

    def _entry(self, ref: AdapterRef) -> _Entry:
        versions = self._entries.setdefault(ref.name, {})
        if ref.version not in versions:
            versions[ref.version] = _Entry(ref, is_retired=ref.version <= self._retired.get(ref.name, 0))
        return versions[ref.version]

    def _note(self, entry: _Entry) -> None:
        self._changed[entry.key] = entry

    def _nudge(self) -> None:
        if self.has_work():
            self._wake()

    def _status(self, entry: _Entry) -> AdapterStatus:
        state: AdapterState
        if entry.content is not None:
            state = "resident" if entry.content.is_resident else "host"
        elif entry.load_number is not None or entry.key in self._queue(entry):
            state = "loading"
        else:
            state = "registered" if entry.error is None else "failed"
        return AdapterStatus(
            name=entry.ref.name,
            version=entry.ref.version,
            state=state,
            error=entry.error or entry.pin_error,
            pinned=entry.pinned,
            num_in_flight=entry.num_in_flight,
            last_used=entry.last_used,
            **entry.facts,
        )

    def _remove(self, entry: _Entry) -> None:
        """A retired version goes."""
        self._last_words.append(
            AdapterStatus(
                name=entry.ref.name,
                version=entry.ref.version,
                state="removed",
                last_used=entry.last_used,
                **entry.facts,
            )
        )
        self._discard(entry)

    def _forget(self, entry: _Entry) -> None:
        """A failed load that nobody waits for is reported and not kept."""
        self._last_words.append(self._status(entry))
        self._discard(entry)

    def _discard(self, entry: _Entry) -> None:
        versions = self._entries[entry.ref.name]
        del versions[entry.ref.version]
        if not versions:
            del self._entries[entry.ref.name]
        self._changed.pop(entry.key, None)
        self._queue(entry).pop(entry.key, None)
        entry.load_number = None  # what is being loaded for it will find no taker
        content = entry.content
        if content is not None:
            self._unpin(entry)
            entry.content = None
            sharers = self._entries_of[content.digest]
            del sharers[entry.key]
            if not sharers:
                self._tiers.drop(content)

    def _want(self, entry: _Entry) -> None:
        if entry.load_number is None and entry.key not in self._queue(entry):
            self._queue(entry)[entry.key] = entry
            self._note(entry)
            self._start_loads()

    def _recent_failure(self, key: _Key) -> str | None:
        """Why the last load failed, if that was lately."""
        while self._failed and next(iter(self._failed.values()))[0] <= time.monotonic() - RETRY_SECONDS:
            del self._failed[next(iter(self._failed))]
        return self._failed[key][1] if key in self._failed else None

    def _can_start_a_load(self) -> bool:
        return self._next_queue() is not None

    def _queue(self, entry: _Entry) -> dict[_Key, _Entry]:
        """Where an entry waits for its load."""
        return self._pending[is_remote(entry.ref.source)]

    def _next_queue(self) -> dict[_Key, _Entry] | None:
        """Where somebody waits whose load can be started now."""
        if not self._tiers.has_host_room:
            return None
        return next(
            (queue for i, queue in enumerate(self._pending) if queue and self._loader.has_slot(remote=i > 0)), None
        )

    def _start_loads(self) -> None:
        while (queue := self._next_queue()) is not None:
            entry = queue.pop(next(iter(queue)))
            entry.load_number = next(self._load_numbers)
            self._loading[entry.load_number] = entry
            self._loader.start(entry.load_number, entry.ref)

    def _take_in(self, loaded: Loaded) -> None:
        self._load_seconds += loaded.seconds
        if loaded.staged is None:
            self._num_load_failures += 1
        else:
            self._num_loads += 1
        entry = self._loading.pop(loaded.number)
        if loaded.staged is not None:
            self._observe(f"load_{source_kind(entry.ref.source)}", loaded.seconds)
        if entry.load_number != loaded.number:  # it was retired meanwhile
            return
        entry.load_number = None
        self._note(entry)
        reason = loaded.error if loaded.staged is None else self._objection(entry, loaded.staged)
        if loaded.staged is not None and reason is None:
            self._attach(entry, loaded.staged)
            return
        entry.error = reason
        entry.pinned = entry.is_warmed = False
        if reason is not None and not entry.was_run:  # else who comes next is to have what is there now
            self._failed.pop(entry.key, None)
            self._failed[entry.key] = (time.monotonic(), reason)
            self._recent_failure(entry.key)
        if not entry.num_in_flight:
            self._forget(entry)

    def _objection(self, entry: _Entry, staged: StagedAdapter) -> str | None:
        """Why an adapter that was read cannot be used."""
        if staged.num_rows > self._arena.num_rows:
            return (
                f"it needs {staged.num_bytes:,} bytes of adapter memory, which has {self._arena.num_bytes:,} in all; start "
                "the server with a larger --adapter-memory"
            )
        if entry.was_run and entry.digest != staged.digest:
            return (
                "its files were changed while requests ran on it, which cannot go on; to change an adapter, load it under "
                "its name again"
            )
        return None

    def _attach(self, entry: _Entry, staged: StagedAdapter) -> None:
        """An entry's content has been read."""
        entry.digest = staged.digest
        entry.facts = {
            **_kind(staged),
            "num_parameters": staged.num_parameters,
            "num_bytes": staged.num_bytes,
            "digest": staged.digest,
        }
        content = self._tiers.add(staged)
        self._entries_of.setdefault(content.digest, {})[entry.key] = entry
        entry.content = content
        self._tiers.add_waiting(content, entry.num_in_flight)
        if entry.pinned:
            try:
                self._pin(entry, anew=True)
            except AdapterError as error:
                entry.pin_error = str(error)
        elif entry.is_warmed:
            self._tiers.bring_if_free(content)
        entry.is_warmed = False
        self._tiers.trim_host()

    def _pin(self, entry: _Entry, *, anew: bool = False) -> None:
        """Pin an entry's content, once for each entry."""
        assert entry.content is not None
        if entry.pinned and not anew:
            return
        entry.pinned = False
        self._tiers.pin(entry.content)
        entry.pinned = True

    def _unpin(self, entry: _Entry) -> None:
        if entry.pinned and entry.content is not None:
            self._tiers.unpin(entry.content)
        entry.pinned = False

    def _on_refused_pin(self, content: Content, reason: str) -> None:
        """A content that waited for room cannot be pinned after all."""
        for entry in self._entries_of[content.digest].values():
            if entry.pinned:
                self._unpin(entry)
                entry.pin_error = reason
                self._note(entry)

    def _on_move(self, content: Content) -> None:
        """A content has come into the arena, or left it, or is in no tier any more."""
        for entry in self._entries_of[content.digest].values():
            self._note(entry)
            if not content.is_anywhere:
                entry.content = None
        if not content.is_anywhere:
            del self._entries_of[content.digest]


def _kind(staged: StagedAdapter) -> dict[str, Any]:
    """What `AdapterStatus` says of an adapter's kind."""
    if isinstance(staged, StagedLora):
        return {"variant": "LoRA", "unit": "lora", "r": staged.rank, "targets": staged.targets}
    assert isinstance(staged, StagedPerft)
    config = staged.config
    return {
        "variant": config.variant,
        "unit": config.unit,
        "num_experts": staged.num_experts,
        "top_k": config.top_k,
        "r": config.r,
    }
