"""Who goes first: the scheduling policy. Plain Python; the scheduler does the bookkeeping and asks here.

First come, first served, within a budget of tokens a step. Decoding requests go first, one token each; what is left of the
budget goes to prefill, in chunks if need be. When pages run out, the youngest running request gives its own back. Among the
waiting, those whose adapters are resident, or who need none, go first, but nobody is passed over more than `MAX_PASSED_OVER`
times: then it asks for room before anybody else starts, and until it has its adapter nobody starts who came later and needs
one. Those on the base go on, for they take no room.

Where requests may have priorities (`LowestPriorityFirst`), a lower one starts first among those that could start; who has
started is not put aside for others. The order among those that wait for the same adapter, or for room in the arena, stays that
of arrival. One start in `PATIENCE` is that of whoever has waited longest, so that no flow of urgent requests keeps others out.

A `WaitingOrder` is where a fair order between tenants goes: it is told who waits (`EngineRequest.tenant` says whose it is),
is asked who is next, and learns how many tokens each step computes for whom.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Collection, Iterator
from typing import Protocol

from perft_serve.engine.sequence import Sequence

# How many later arrivals, on adapters or on the base, may start before a request that waits for room in the arena. Each time
# the bound is reached, the requests running on adapters are left to finish until there is room, and the batch runs half empty
# meanwhile: that must be rare beside the requests served. At the same time it is what a rare adapter waits at the most: a
# batch or two of requests.
MAX_PASSED_OVER = 64


# Of so many starts at least one goes to the request that has waited longest, whatever its priority.
PATIENCE = 16


class WaitingOrder(Protocol):
    """The requests that could start at once if there were pages, in the order in which they shall."""

    def add(self, seq: Sequence) -> None:
        """`seq` waits."""

    def remove(self, seq: Sequence) -> None:
        """`seq`, which waits, does so no longer: it starts, or has to wait for its adapter, or is gone."""

    def first(self) -> Sequence | None:
        """Who is next, without removing it; `None`: nobody waits."""

    def started(self, seq: Sequence) -> None:
        """`seq` starts, wherever it waited last."""

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        """The present step computes `num_tokens` tokens of `seq`."""


class FirstComeFirstServed:
    """The order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}
        self._numbers: list[int] = []  # a heap, in which those that are gone stay until they come to its top

    def __contains__(self, seq: Sequence) -> bool:
        return seq.number in self._waiting

    def add(self, seq: Sequence) -> None:
        """`seq` waits."""
        self._waiting[seq.number] = seq
        heapq.heappush(self._numbers, seq.number)

    def remove(self, seq: Sequence) -> None:
        """`seq` waits no longer."""
        del self._waiting[seq.number]

    def first(self) -> Sequence | None:
        """Who came first."""
        while self._numbers and self._numbers[0] not in self._waiting:
            heapq.heappop(self._numbers)
        return self._waiting[self._numbers[0]] if self._numbers else None

    def started(self, seq: Sequence) -> None:
        """Counts for nothing here."""

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        """Counts for nothing here."""


class LowestPriorityFirst(FirstComeFirstServed):
    """The lowest priority, of equal ones the first to come; after `PATIENCE` - 1 starts of later arrivals, the first of all."""

    def __init__(self) -> None:
        super().__init__()
        self._by_priority: list[tuple[int, int]] = []  # a heap, as `_numbers`
        self._num_overtaken = 0

    def add(self, seq: Sequence) -> None:
        """`seq` waits."""
        super().add(seq)
        if len(self._by_priority) > 2 * len(self._waiting) + 64:  # those that are gone may never come to its top
            self._by_priority = [(each.request.priority, number) for number, each in self._waiting.items()]
            heapq.heapify(self._by_priority)
        else:
            heapq.heappush(self._by_priority, (seq.request.priority, seq.number))

    def first(self) -> Sequence | None:
        """Who is next."""
        oldest = super().first()
        if oldest is None or self._num_overtaken >= PATIENCE - 1:
            return oldest
        while self._by_priority[0][1] not in self._waiting:
            heapq.heappop(self._by_priority)
        return self._waiting[self._by_priority[0][1]]

    def started(self, seq: Sequence) -> None:
        """Counts how often whoever has waited longest was overtaken since it was somebody's turn for that."""
        oldest = super().first()
        is_overtaken = oldest is not None and oldest.number < seq.number
        self._num_overtaken = self._num_overtaken + 1 if is_overtaken else 0


class LineForRoom:
    """Those that wait for room in the arena, in the order of arrival, and how often each has been passed over.

    Whoever starts before one of them starts before all that came earlier, too. So nobody has been passed over more often than
    those before it, and who has been passed over too often stands in front. One that joins others, who came later, counts as
    passed over as often as they were. A start costs O(log n): what is kept is by how much each is ahead of the next.

    Attributes:
        num_passed_first: how often the first in line has been passed over.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []  # of arrival, ascending
        self._waiting: dict[int, Sequence] = {}
        self._more: dict[int, int] = {}  # how much more often than the next one, by number; the last one: than never
        self.num_passed_first = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Sequence]:
        return (self._waiting[number] for number in self._numbers)

    def __getitem__(self, i: int) -> Sequence:
        return self._waiting[self._numbers[i]]

    def __contains__(self, seq: Sequence) -> bool:
        return seq.number in self._waiting

    def add(self, seq: Sequence) -> None:
        """`seq` waits; `seq.passed_over` is how often it was passed over before."""
        i = bisect_left(self._numbers, seq.number)
        more = max(seq.passed_over - self._num_passed(i), 0) if seq.passed_over else 0
        self._numbers.insert(i, seq.number)
        self._waiting[seq.number] = seq
        self._more[seq.number] = more
        while (
            more and i
        ):  # who stands before it is ahead by so much less; or has been passed over as often, at the least
            i -= 1
            ahead = self._more[self._numbers[i]]
            self._more[self._numbers[i]] = max(ahead - more, 0)
            more -= min(ahead, more)
        self.num_passed_first += more

    def remove(self, seq: Sequence) -> None:
        """`seq` waits no longer; `seq.passed_over` is settled."""
        i = bisect_left(self._numbers, seq.number)
        seq.passed_over = self._num_passed(i)
        del self._numbers[i], self._waiting[seq.number]
        more = self._more.pop(seq.number)
        if i:
            self._more[self._numbers[i - 1]] += more
        else:
            self.num_passed_first -= more

    def pass_over(self, number: int) -> None:
        """Arrival `number` starts."""
        i = bisect_left(self._numbers, number)
        if i:
            self._more[self._numbers[i - 1]] += 1
            self.num_passed_first += 1

    def _num_passed(self, i: int) -> int:
        """How often the `i`-th has been passed over."""
        if i < len(self._numbers) // 2:
            return self.num_passed_first - sum(self._more[number] for number in self._numbers[:i])
        return sum(self._more[number] for number in self._numbers[i:])


def decoding(running: Collection[Sequence]) -> list[Sequence]:
    """Those that go first: one token each, and no more."""
    return [seq for seq in running if seq.num_to_compute == 1]


def prefilling(running: Collection[Sequence]) -> list[Sequence]:
    """Those that share what is left of the budget, the one that started first first."""
    return [seq for seq in running if seq.num_to_compute > 1]


def chunk_size(seq: Sequence, budget: int) -> int:
    """How many tokens of `seq` are computed now, of a budget of at least one."""
    return min(seq.num_to_compute, budget)


def victim(running: dict[Sequence, None]) -> Sequence:
    """Who gives its pages back when they run out: the one that started last."""
    return next(reversed(running))
