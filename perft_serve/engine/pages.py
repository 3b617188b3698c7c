"""Who holds which page of the KV cache. Plain Python; the memory itself is the runner's."""

from __future__ import annotations


class PagePool:
    """Pages 1 .. `num_pages`; page 0 is nobody's and stands for "none" in page tables.

    Args:
        num_pages: how many there are to give.
        page_size: tokens in a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, 0, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pages that is held, in [0, 1]."""
        return 1 - len(self._free) / self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or `None`, and then nothing is taken."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def give(self, pages: list[int]) -> None:
        """Take pages back."""
        self._free.extend(pages)
