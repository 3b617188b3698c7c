"""What the engine counts for metrics: histograms that are cheap to add to, and what they have gained since last told.

In: observations, by the name of a histogram. Out: `EngineCounts`, about once a second. They are gains and not totals, so that
whoever adds them up goes on doing so when the engine's process is replaced. Plain Python; knows no requests, no Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_STEP_BOUNDS = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
_PAGE_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
)
_LOAD_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0),
)

# The parts of a step, in their order; together they are all of it.
STEP_PHASES = ("adapters", "schedule", "run", "sample", "commit")
STEP_HISTOGRAMS = tuple(f"step_{phase}" for phase in STEP_PHASES)
# Where an adapter comes from; `host`: from host memory into the arena.
LOAD_SOURCES = ("folder", "hub", "url", "host")

BOUNDS: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(STEP_HISTOGRAMS, _STEP_BOUNDS),
    **{f"load_{source}": _LOAD_BOUNDS for source in LOAD_SOURCES},
    "iteration_tokens": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "page_lifetime": _PAGE_BOUNDS,
    "page_idle": _PAGE_BOUNDS,
    "page_reuse_gap": _PAGE_BOUNDS,
}
"""The engine's histograms: name to upper bounds. Times are in seconds."""


class Histogram:
    """Observations by size: `counts[i]` are those above `bounds[i - 1]` and not above `bounds[i]`; the last has the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, gain: Gain) -> None:
        """Those of a gain."""
        for bucket, count in gain.counts:
            self.counts[bucket] += count
        self.sum += gain.sum

    def merge(self, other: Histogram) -> None:
        """Those of a histogram with the same bounds."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


@dataclass(frozen=True, slots=True)
class Gain:
    """What a histogram has gained: (bucket, how many) where that is not zero, and their sum."""

    counts: tuple[tuple[int, int], ...]
    sum: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterBalance:
    """How evenly an adapter's tokens spread over its adapter experts.

    Args:
        adapter: its name.
        entropy: of the share of tokens that each adapter expert gets, divided by the logarithm of their number, as a mean
            over the layers: 1 is even, 0 is one adapter expert for all.
    """

    adapter: str
    entropy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCounts:
    """What the engine has counted since it last said so.

    Args:
        gains: by histogram.
        num_corrupted: requests that ended because their logits were not numbers.
        balances: adapters whose balance was looked at.
    """

    gains: dict[str, Gain] = field(default_factory=dict)
    num_corrupted: int = 0
    balances: tuple[RouterBalance, ...] = ()


class Counter:
    """Collects what `EngineCounts` says."""

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self._touched: set[str] = set()
        self._num_corrupted = 0
        self._balances: dict[str, RouterBalance] = {}

    def observe(self, name: str, value: float) -> None:
        """One observation of a histogram."""
        self._histograms[name].observe(value)
        self._touched.add(name)

    def count_corrupted(self, number: int) -> None:
        """So many requests had logits that were not numbers."""
        self._num_corrupted += number

    def note_balances(self, balances: Iterable[RouterBalance]) -> None:
        """Adapters' balances, as they are now."""
        self._balances.update((balance.adapter, balance) for balance in balances)

    def take(self) -> EngineCounts | None:
        """What has come since the last call, if anything has."""
        if not (self._touched or self._num_corrupted or self._balances):
            return None
        gains = {}
        for name in self._touched:
            histogram = self._histograms[name]
            found = tuple((bucket, count) for bucket, count in enumerate(histogram.counts) if count)
            gains[name] = Gain(found, histogram.sum)
            self._histograms[name] = Histogram(histogram.bounds)
        counts = EngineCounts(gains=gains, num_corrupted=self._num_corrupted, balances=tuple(self._balances.values()))
        self._touched, self._num_corrupted, self._balances = set(), 0, {}
        return counts
