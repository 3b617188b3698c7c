"""Who holds which page of the KV cache, and what the pages hold that could be of use again. Plain Python; the memory itself
is the runner's.

A full page is known by a hash over its tokens and the hash of the page before it (`page_hash`), the first one's over what
else keys and values depend on (`root_hash`). Equal hashes therefore mean equal beginnings, under one adapter and in one scope.
A page that is given back keeps its content and its hash until it is handed out anew, the least recently used one first.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Sequence

# One page in so many is watched for how long it lives and lies idle: which ones is as good as chance to those who use them.
WATCHED_OF = 8


def root_hash(*, scope: str, base_digest: str, adapter_digest: str) -> bytes:
    """Where the chain of page hashes starts; `adapter_digest` is "" for the base alone."""
    return hashlib.sha256(json.dumps([scope, base_digest, adapter_digest]).encode()).digest()


def page_hash(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full page: `before` is that of the page before it, or the root."""
    return hashlib.sha256(before + array("q", token_ids).tobytes()).digest()


class PagePool:
    """Pages 1 .. `num_pages`; page 0 is nobody's and stands for "none" in page tables.

    Args:
        num_pages: how many there are to give.
        page_size: tokens in a page.
        observe: is told the ages of some pages, in seconds: `page_lifetime`, from the moment a page is handed out to the one
            in which it is handed out anew and what it holds is lost; `page_idle`, the last part of that, in which nobody held
            it; `page_reuse_gap`, from one holder of what it holds to the next that finds it.
    """

    def __init__(self, num_pages: int, page_size: int, *, observe: Callable[[str, float], None] | None = None) -> None:
        self._observe = observe
        self._handed_out: dict[int, float] = {}  # watched pages: when they were, and
        self._last_used: dict[int, float] = {}  # when somebody last took them or let go of them
        self.num_pages = num_pages
        self.page_size = page_size
        self._num_holders = [0] * (num_pages + 1)
        self._blank = list(range(num_pages, 0, -1))  # held by nobody, of no use to anybody
        self._cached: dict[int, None] = {}  # held by nobody, known by a hash; least recently used first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages that is held, in [0, 1]."""
        return 1 - self.num_free / self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages known by `hashes`, as far as they are known from the first on; they are not held yet."""
        found: list[int] = []
        for one in hashes:
            page = self._page_of.get(one)
            if page is None:
                break
            found.append(page)
        return found

    def can_take(self, count: int, found: Sequence[int] = ()) -> bool:
        """Whether `take` would give them."""
        return count <= self.num_free - sum(page in self._cached for page in found)

    def take(self, count: int, found: Sequence[int] = ()) -> list[int] | None:
        """Hold `found` pages, shared with whoever else holds them, and `count` pages of one's own.

        Returns:
            The pages of one's own, whose hashes are forgotten; or `None`, and then nothing is held.
        """
        if not self.can_take(count, found):
            return None
        for page in found:
            self._cached.pop(page, None)
            self._num_holders[page] += 1
            if page in self._last_used:
                self._note_use(page, is_reuse=True)
        own = [self._take_one() for _ in range(count)]
        for page in own:
            self._num_holders[page] = 1
        return own

    def give(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, which stand in its order: of a chain of hashes the end is of use to the fewest."""
        for page in reversed(pages):
            self._num_holders[page] -= 1
            assert self._num_holders[page] >= 0, f"page {page} was given back twice"
            if self._num_holders[page] == 0:
                if page in self._last_used:
                    self._note_use(page)
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def publish(self, page: int, page_hash: bytes) -> None:
        """Make a held page known by its hash, unless another page is."""
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def forget(self, page: int) -> None:
        """A held page does not hold what its hash says."""
        known_by = self._hash_of.pop(page, None)
        if known_by is not None:
            del self._page_of[known_by]

    def _take_one(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page = next(iter(self._cached))
            del self._cached[page]
            self.forget(page)
            self._note_loss(page)
        if self._observe is not None and page % WATCHED_OF == 0:
            self._handed_out[page] = self._last_used[page] = time.monotonic()
        return page

    def _note_use(self, page: int, *, is_reuse: bool = False) -> None:
        """A watched page was found by another holder, or its last one has let go of it."""
        now = time.monotonic()
        if is_reuse and self._observe is not None:
            self._observe("page_reuse_gap", now - self._last_used[page])
        self._last_used[page] = now

    def _note_loss(self, page: int) -> None:
        """What a page holds gives way to something else."""
        if self._observe is not None and page in self._last_used:
            now = time.monotonic()
            self._observe("page_lifetime", now - self._handed_out[page])
            self._observe("page_idle", now - self._last_used[page])
