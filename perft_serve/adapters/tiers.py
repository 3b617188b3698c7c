"""Two tiers of memory for adapters by what they compute: host memory, and the arena on the device.

In: staged adapters, who waits for them, who runs on them, which are pinned. Out: which of them are in which tier. It knows
digests, no names. Time per call is O(log n), or O(n) where rows lie in pieces, or a pin waits for them.

- Arena: a content that is held or pinned stays. Of the others the least recently used is evicted, when room is needed.
- A pin waits for room that others hold. Where what is pinned already leaves none, or only pieces too small, it is refused.
- Host memory: what somebody waits for stays until it is in the arena. Of the rest the least recently used goes. An adapter
  that is larger than the whole tier passes through it.
- Copying and wiping are done piece by piece, `COPY_BYTES_PER_STEP` between two calls of `step`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from perft.errors import AdapterError
from perft_serve.adapters.arena import AdapterArena, Placement, StagedAdapter, StagedLora
from perft_serve.adapters.status import Hold

COPY_BYTES_PER_STEP = 32 << 20


class Content:
    """What an adapter computes: in host memory (`staged`), in the arena (`slot`), in both, or let go.

    Attributes:
        digest, num_rows, num_bytes, width, is_lora: of the adapter.
        num_waiting: who would like it in the arena: requests in flight, running ones too. Settled by `Tiers.add_waiting`.
        num_held, num_pins: leases and pins on it.
    """

    __slots__ = (
        "digest",
        "granted_at",
        "is_kept",
        "is_lora",
        "is_running",
        "num_bytes",
        "num_held",
        "num_pins",
        "num_rows",
        "num_waiting",
        "placement",
        "slot",
        "staged",
        "width",
    )

    def __init__(self, staged: StagedAdapter) -> None:
        self.digest = staged.digest
        self.granted_at = 0.0  # when room was last set aside for it (`time.monotonic()`)
        self.num_rows = staged.num_rows
        self.num_bytes = staged.num_bytes
        self.width = staged.width
        self.is_lora = isinstance(staged, StagedLora)
        self.staged: StagedAdapter | None = None
        self.placement: Placement | None = None  # while it is being copied
        self.slot = -1
        self.num_waiting = 0
        self.num_held = 0
        self.num_pins = 0
        self.is_kept = False  # counted in _kept_bytes
        self.is_running = False  # counted in _running_rows

    @property
    def is_resident(self) -> bool:
        """It is in the arena, all of it."""
        return self.slot >= 0

    @property
    def is_anywhere(self) -> bool:
        """It is in one of the tiers."""
        return self.is_resident or self.staged is not None


class Tiers:
    """Contents in host memory and in one arena.

    Args:
        arena: the device memory; nobody else loads into it.
        host_bytes: size of the host tier.
        on_refused_pin: called with a content whose pins must be taken back, and why: there can be no room for it.
        on_move: called when a content has come to, or gone from, the arena, or is not on its way any more, or is in no tier
            any more.
        on_copied: called with the seconds from when room was set aside for a content to when it was in the arena.

    Attributes:
        num_resident: contents in the arena.
        num_evictions: how many lost their place in it to another.
        host_used_bytes: what contents take of host memory.
    """

    def __init__(
        self,
        arena: AdapterArena,
        host_bytes: int,
        on_move: Callable[[Content], None],
        on_refused_pin: Callable[[Content, str], None],
        on_copied: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._arena = arena
        self._host_bytes = host_bytes
        self._on_move = on_move
        self._on_refused_pin = on_refused_pin
        self._on_copied = on_copied
        self._contents: dict[str, Content] = {}
        # host tier
        self._spare: OrderedDict[str, Content] = OrderedDict()  # may be dropped, least recently used first
        self._kept_bytes = 0  # of what is in host memory and may not be dropped
        self.host_used_bytes = 0
        # arena
        self._idle: OrderedDict[str, Content] = OrderedDict()  # may be evicted, least recently used first
        self._idle_rows = 0
        self._pinned_rows = 0  # of what is pinned, resident or on its way
        self._running_rows = 0  # of what is held and not pinned
        self._incoming: dict[str, Content] = {}  # were granted room, first come first
        self._granted_rows = 0  # of those, the rows that are not placed yet
        self._pins_waiting: dict[str, Content] = {}  # pinned, and not granted room yet
        self._pins_may_fit = False  # what those may have has changed since they were last tried
        self._budget = COPY_BYTES_PER_STEP
        self.num_resident = 0
        self.num_evictions = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would copy or wipe, or try to."""
        return bool(self._incoming or self._arena.num_wiping_rows or (self._pins_waiting and self._pins_may_fit))

    @property
    def has_host_room(self) -> bool:
        """Whether host memory holds anything but what somebody waits for."""
        return self._kept_bytes < self._host_bytes or not self._kept_bytes

    def add(self, staged: StagedAdapter) -> Content:
        """Take an adapter into host memory. If the arena has its like already, they are one from now on."""
        content = self._contents.setdefault(staged.digest, Content(staged))
        if content.staged is None:
            content.staged = staged
            self.host_used_bytes += content.num_bytes
        self._settle(content)
        self.touch(content)
        return content

    def drop(self, content: Content) -> None:
        """Out of the arena and out of host memory; nobody may hold it."""
        assert not content.num_held
        self._pins_waiting.pop(content.digest, None)
        if content.digest in self._incoming:
            self._take_grant_back(content)
        if content.is_resident:
            self._leave_arena(content)
        if content.staged is not None:
            self._leave_host(content)

    def touch(self, content: Content) -> None:
        """It is the most recently used one."""
        for recent in (self._spare, self._idle):
            if content.digest in recent:
                recent.move_to_end(content.digest)

    def add_waiting(self, content: Content, count: int) -> None:
        """So many more requests (or fewer, if negative) are in flight on it."""
        content.num_waiting += count
        assert content.num_waiting >= 0
        self._settle(content)

    def hold(self, content: Content) -> None:
        """Somebody runs on it, so it stays in the arena."""
        assert content.is_resident
        content.num_held += 1
        self._settle(content)

    def let_go(self, content: Content) -> None:
        """That is over."""
        assert content.num_held
        content.num_held -= 1
        self._settle(content)
        self._grant_pins()

    def pin(self, content: Content) -> None:
        """It stays in the arena; into which it is brought as soon as there is room.

        Raises:
            AdapterError: it does not fit beside what is pinned already.
        """
        if not content.num_pins and self._pinned_rows + content.num_rows > self._arena.num_rows:
            raise AdapterError(f"it cannot be pinned: {self._numbers(content)} are pinned already")
        is_there = content.is_resident or content.digest in self._incoming
        if not is_there and not self._would_fit(content, beside_pinned=True):
            raise AdapterError(self._pin_refusal(content))
        content.num_pins += 1
        if content.num_pins == 1:
            self._pinned_rows += content.num_rows
            if not is_there:
                self._pins_waiting[content.digest] = content
            self._pins_may_fit = True  # or one that waits does not fit any more
        self._settle(content)
        self._grant_pins()

    def unpin(self, content: Content) -> None:
        """Take one pin back."""
        assert content.num_pins
        content.num_pins -= 1
        if not content.num_pins:
            self._pinned_rows -= content.num_rows
            self._pins_waiting.pop(content.digest, None)
        self._settle(content)

    def bring(self, content: Content) -> Hold | None:
        """See to it that a content becomes resident, at once if this step's share allows; `None` if it is.

        Raises:
            AdapterError: there can be no room for it beside what is pinned.
        """
        self.touch(content)
        if content.is_resident:
            return None
        pinned_rows = self._pinned_rows - (content.num_rows if content.num_pins else 0)
        if pinned_rows + content.num_rows > self._arena.num_rows:
            raise AdapterError(f"there is no room for it: {self._numbers(content)} are pinned")
        is_asked_first = content.digest not in self._incoming
        if self._grant(content):
            self._advance(content if is_asked_first else None)
        if content.is_resident:
            return None
        if content.digest in self._incoming:
            return Hold.LOADING
        if self._running_rows or self._incoming:
            return Hold.NO_ROOM
        raise AdapterError(
            f"there is no room for it: {self._numbers(content)} are pinned, and the rest lies in pieces that are too small"
        )

    def bring_if_free(self, content: Content) -> None:
        """Let a content into the arena if nobody has to leave it for that."""
        if not content.is_resident and content.num_rows <= self._available_rows():
            self._grant(content)

    def is_incoming(self, content: Content) -> bool:
        """Whether it is on its way into the arena."""
        return content.digest in self._incoming

    def step(self) -> None:
        """The next share of copying and wiping."""
        self._budget = COPY_BYTES_PER_STEP
        self._grant_pins()
        self._advance()

    def trim_host(self) -> None:
        """Let go of what host memory has too much of."""
        while self.host_used_bytes > self._host_bytes and self._spare:
            self._leave_host(next(iter(self._spare.values())))

    def _pin_refusal(self, content: Content) -> str:
        return (
            f"it cannot be pinned: {self._numbers(content)} are pinned already, and the rest lies in pieces that are too "
            "small"
        )

    def _numbers(self, content: Content) -> str:
        pinned_bytes = (self._pinned_rows - (content.num_rows if content.num_pins else 0)) * self._arena.row_bytes
        return (
            f"it needs {content.num_bytes:,} bytes, and of the {self._arena.num_bytes:,} bytes of adapter memory "
            f"{pinned_bytes:,}"
        )

    def _settle(self, content: Content) -> None:
        """Bring the lists and sums that a content is part of up to what it is now."""
        digest, in_host = content.digest, content.staged is not None
        awaited = bool(content.num_waiting or content.num_pins or digest in self._incoming)
        kept = in_host and awaited and not content.is_resident
        if kept != content.is_kept:
            content.is_kept = kept
            self._kept_bytes += content.num_bytes if kept else -content.num_bytes
        if in_host and not kept:
            self._spare.setdefault(digest, content)
        else:
            self._spare.pop(digest, None)
        idle = content.is_resident and not content.num_held and not content.num_pins
        if idle != (digest in self._idle):
            self._idle_rows += content.num_rows if idle else -content.num_rows
            if idle:
                self._idle[digest] = content
                self._pins_may_fit = True
            else:
                del self._idle[digest]
        running = bool(content.num_held) and not content.num_pins
        if running != content.is_running:
            content.is_running = running
            self._running_rows += content.num_rows if running else -content.num_rows

    def _leave_host(self, content: Content) -> None:
        content.staged = None
        self.host_used_bytes -= content.num_bytes
        self._settle(content)
        if not content.is_anywhere:
            self._moved(content)

    def _leave_arena(self, content: Content) -> None:
        self._arena.evict(content.slot)
        content.slot = -1
        self.num_resident -= 1
        self._settle(content)
        self._moved(content)

    def _moved(self, content: Content) -> None:
        if not content.is_anywhere:
            del self._contents[content.digest]
        self._on_move(content)

    def _available_rows(self) -> int:
        """Rows that are free, or will be when they are wiped, and that nobody was granted."""
        return self._arena.num_free_rows + self._arena.num_wiping_rows - self._granted_rows

    def _grant(self, content: Content) -> bool:
        """Set rows of the arena aside for a content, for which idle ones are evicted if need be."""
        if content.digest in self._incoming:
            return True
        if content.num_rows > self._available_rows() + self._idle_rows:
            return False
        while content.num_rows > self._available_rows():
            self._evict_one()
        self._pins_waiting.pop(content.digest, None)
        self._incoming[content.digest] = content
        content.granted_at = time.monotonic()
        self._granted_rows += content.num_rows
        self._settle(content)
        return True

    def _grant_pins(self) -> None:
        """Grant room to pins that would get it, for which others must not be evicted in vain; refuse those that never will."""
        if not self._pins_may_fit:
            return
        self._pins_may_fit = False
        for content in list(self._pins_waiting.values()):
            if not self._would_fit(content, beside_pinned=True):
                self._on_refused_pin(content, self._pin_refusal(content))
            elif self._would_fit(content):
                self._grant(content)

    def _would_fit(self, content: Content, *, beside_pinned: bool = False) -> bool:
        """Whether a content could be placed if all left the arena that are idle; or all that are not pinned."""
        assert content.staged is not None
        kept = [
            self._arena.runs_of(other.slot) if other.placement is None else other.placement.runs
            for other in self._contents.values()
            if (other.is_resident and (other.num_pins or (other.num_held and not beside_pinned)))
            or (other.placement is not None and (other.num_pins or not beside_pinned))
        ]
        return self._arena.would_fit(content.staged, kept)

    def _take_grant_back(self, content: Content) -> None:
        del self._incoming[content.digest]
        if content.placement is None:
            self._granted_rows -= content.num_rows
        else:
            self._arena.abandon(content.placement)
            content.placement = None
        self._pins_may_fit = True
        self._settle(content)

    def _evict_one(self) -> None:
        self.num_evictions += 1
        self._leave_arena(next(iter(self._idle.values())))

    def _advance(self, asker: Content | None = None) -> None:
        """Wipe and copy for as long as this step's share lasts.

        Args:
            asker: who has been granted room just now. Whether it keeps it is the answer to its own asking, and nobody else
                has been told that it is on its way.
        """
        self._wipe()
        for content in list(self._incoming.values()):
            if self._budget <= 0:
                break
            if self._place(content):
                self._copy(content)
            elif content.digest not in self._incoming and content is not asker:
                # who waits for its arrival, or for the room that it was granted, would wait for ever
                self._on_move(content)
        self.trim_host()

    def _wipe(self) -> None:
        if self._arena.num_wiping_rows and self._budget > 0:
            self._budget -= self._arena.wipe(self._budget)

    def _place(self, content: Content) -> bool:
        """Give a content with a grant its rows, if enough are wiped; takes the grant back if they lie too scattered, and
        would also if nothing was left that can be evicted.
        """
        assert content.staged is not None
        may_evict: bool | None = None
        while content.placement is None:
            content.placement = self._arena.place(content.staged)
            if content.placement is not None:
                self._granted_rows -= content.num_rows
            elif self._arena.num_wiping_rows:
                if self._budget <= 0:
                    return False
                self._wipe()
            else:
                if may_evict is None:
                    may_evict = bool(self._idle) and self._would_fit(content)
                if not may_evict:
                    self._take_grant_back(content)
                    if content.num_pins:
                        self._pins_waiting[content.digest] = content
                    return False
                self._evict_one()
        return True

    def _copy(self, content: Content) -> None:
        assert content.staged is not None
        assert content.placement is not None
        if self._budget > 0:
            self._budget -= self._arena.copy(content.staged, content.placement, self._budget)
        if self._arena.is_copied(content.staged, content.placement):
            content.slot = self._arena.publish(content.staged, content.placement)
            content.placement = None
            del self._incoming[content.digest]
            self.num_resident += 1
            self._on_copied(time.monotonic() - content.granted_at)
            self._settle(content)
            self._moved(content)
