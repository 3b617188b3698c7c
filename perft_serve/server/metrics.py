"""Prometheus metrics: names, definitions and buckets as vLLM has them with the prefix `perft_`, and those of adapters.

In: the events of requests as they reach the front end, what the engine counts, HTTP replies; and the engine's state when
somebody asks. Out: the text that Prometheus reads. Times of one process are never subtracted from another's: what a client
sees (first token, between tokens, end to end, decode) is by this process's clock, queue and prefill by the engine's, and
inference is the sum of prefill by the one and decode by the other.

Nothing here is `prometheus_client`'s but the format: each token costs one `bisect` and two additions, and samples are made of
that when Prometheus asks.

Adapters may be thousands, values of a label may not. So many adapters as `max_adapter_labels` have series of their own, the
rest share `<other>`: first come first, later those with the most traffic. What is counted goes to the series that its adapter
has at that moment, so each of them, and the sum over all, only grows. An adapter that loses its label keeps its series, unseen,
and goes on with it should it come back: to Prometheus that is a pause, neither a reset nor a jump of the others.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import BOUNDS, LOAD_SOURCES, STEP_PHASES, EngineCounts, Histogram, RouterBalance
from perft_serve.engine.events import EngineRequest, EngineStats, FinishReason, TokenEvent

CONTENT_TYPE = CONTENT_TYPE_LATEST

# No adapter can have these names: `<` is not allowed in them.
BASE_LABEL = "<base>"
OTHER_LABEL = "<other>"
UNKNOWN = "<unknown>"

Rejection = Literal["busy", "tenant_busy", "too_many", "engine_down", "refused", "internal"]
"""Why a request did not get into the engine: too many were open, or too many of its tenant's; it asks for more completions than
may ever be open; there was no engine; the engine found something wrong with it; a bug.
"""

# vLLM's bounds, so that its dashboards and alerts hold; and between them others, where most observations fall a fifth apart at
# most: what Prometheus interpolates is off by no more, and a median of values in one bucket by half of it. (vLLM's first for
# gaps between tokens is 10 ms, which is more than a decode step of a small model takes on a fast GPU; for requests, 300 ms.)
_STEPS = (1, 1.2, 1.4, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 7.5, 8, 9)


def _finer(bounds: Collection[float], first_power: int, last_power: int) -> tuple[float, ...]:
    """`bounds`, and the steps of each power of ten from the first to before the last."""
    steps = {float(f"{step}e{power}") for power in range(first_power, last_power) for step in _STEPS}
    return tuple(sorted(steps.union(bounds)))


FIRST_TOKEN_BUCKETS = _finer(
    (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
    ),
    -2,
    1,
)
INTER_TOKEN_BUCKETS = _finer(
    (
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    ),
    -3,
    0,
)
# Of the phases of a request; from its arrival to its end it is finer
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
END_TO_END_BUCKETS = _finer(REQUEST_BUCKETS, -1, 2)
_TOKEN_COUNT_BUCKETS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
_HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Of each adapter fewer are shown: every one is a series for each of them.
_ADAPTER_FIRST_TOKEN_BUCKETS = (0.01, 0.04, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0)
_ADAPTER_INTER_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_ADAPTER_REQUEST_BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0)

# How often who has a label is decided anew; how many may lose it then; how much more traffic it takes to push another out.
RANK_SECONDS = 60.0
MAX_SWAPS = 8
LEAD = 1.5
# Series of adapters that have lost their label: so many are kept; what is older begins anew, should it come back.
MAX_PARKED = 256
# A scrape may take a wild client's word for a method no more than for a path.
_METHODS = frozenset(("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"))

_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

_REQUEST_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    (
        "request_queue_time_seconds",
        "From a request's arrival in the engine to its first step; by the engine's clock.",
        REQUEST_BUCKETS,
    ),
    (
        "request_prefill_time_seconds",
        "From a request's first step to its first token; by the engine's clock.",
        REQUEST_BUCKETS,
    ),
    (
        "request_decode_time_seconds",
        "From a request's first token to its last; by the front end's clock.",
        REQUEST_BUCKETS,
    ),
    (
        "request_inference_time_seconds",
        "Prefill and decode: from a request's first step to its last token.",
        REQUEST_BUCKETS,
    ),
    (
        "request_time_per_output_token_seconds",
        "Mean gap between two tokens of a request; one observation per request of two tokens or more.",
        INTER_TOKEN_BUCKETS,
    ),
    ("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_COUNT_BUCKETS),
    ("request_generation_tokens", "Generated tokens of a request.", _TOKEN_COUNT_BUCKETS),
    (
        "request_max_num_generation_tokens",
        "Generated tokens of the longest of a prompt's n completions; one observation per prompt.",
        _TOKEN_COUNT_BUCKETS,
    ),
    ("request_params_n", "Completions asked for per prompt.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    ("request_params_max_tokens", "max_tokens of the requests that set it.", _TOKEN_COUNT_BUCKETS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReading:
    """The engine at one moment.

    Args:
        stats: its own; what counts must never go back.
        config: its settings.
        is_up: it takes requests.
        num_restarts: of its process.
        num_adapters: how many it could be asked for.
    """

    stats: EngineStats
    config: EngineConfig
    is_up: bool
    num_restarts: int
    num_adapters: int


class _Series:
    """What is counted under one value of the `adapter` label."""

    __slots__ = ("e2e", "finished", "first_token", "inter_token", "prompt_tokens", "prompt_tokens_cached")

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self.inter_token = Histogram(INTER_TOKEN_BUCKETS)
        self.e2e = Histogram(END_TO_END_BUCKETS)
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.finished: dict[FinishReason, int] = dict.fromkeys(_REASONS, 0)

    @property
    def generation_tokens(self) -> int:
        """Each token is the first of its request, or ends a gap."""
        return self.first_token.count + self.inter_token.count

    def merge(self, other: _Series) -> None:
        """Add another's."""
        self.first_token.merge(other.first_token)
        self.inter_token.merge(other.inter_token)
        self.e2e.merge(other.e2e)
        self.prompt_tokens += other.prompt_tokens
        self.prompt_tokens_cached += other.prompt_tokens_cached
        for reason, count in other.finished.items():
            self.finished[reason] += count


class _Traffic:
    """An adapter (or the base) that is asked for, and the series that it counts in now."""

    __slots__ = ("name", "num_running", "num_waiting", "recent", "score", "series")

    def __init__(self, name: str | None, series: _Series) -> None:
        self.name = name
        self.series = series
        self.num_waiting = 0  # requests without a token yet
        self.num_running = 0
        self.recent = 0  # tokens of its requests that ended since the last ranking
        self.score = 0.0  # tokens, those of an hour ago next to nothing


class _Prompt:
    """The completions of one prompt."""

    __slots__ = ("most_tokens", "num_open")

    def __init__(self, num_open: int) -> None:
        self.num_open = num_open
        self.most_tokens = 0


class Metrics:
    """All metrics of one server.

    Args:
        registry: where they are registered and read from.
        max_adapter_labels: so many adapters have series of their own, those with the most traffic; the others share the label
            `<other>`. The base is `<base>`.
        adapter_labels: adapters that have series of their own in any case, beside those.
        lora_info: name of the gauge that routers of Kubernetes' inference gateway look for adapters in.
        version: of this project, if it is to be told.
        clock: seconds, for the ranking of adapters.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_adapter_labels: int = 50,
        adapter_labels: Collection[str] = (),
        lora_info: str = "perft_lora_requests_info",
        version: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._max_adapter_labels = max_adapter_labels
        self._always_labelled = frozenset(adapter_labels)
        self._lora_info = lora_info
        self._version = version
        self._clock = clock
        self._next_ranking = clock() + RANK_SECONDS
        # Every series is in exactly one of these
        self._base = _Series()
        self._other = _Series()
        self._labelled: dict[str, _Series] = {}
        self._parked: OrderedDict[str, _Series] = OrderedDict()
        self._retired = _Series()
        self._traffic: dict[str | None, _Traffic] = {}
        self._histograms = {name: Histogram(bounds) for name, _, bounds in _REQUEST_HISTOGRAMS}
        self._rejections: dict[Rejection, int] = dict.fromkeys(get_args(Rejection), 0)
        self._http: dict[tuple[str, str, int], int] = {}
        self._http_seconds: dict[tuple[str, str], Histogram] = {}
        self._engine_histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self._num_corrupted = 0
        self._balances: OrderedDict[str, float] = OrderedDict()
        self._read_engine: Callable[[], EngineReading] | None = None
        registry.register(_Collector(self))

    def adapter_label(self, adapter: str | None) -> str:
        """The value of the `adapter` label that an adapter's name has now; `None` is the base."""
        if adapter is None:
            return BASE_LABEL
        return adapter if adapter in self._labelled else OTHER_LABEL

    def track(self, requests: Sequence[EngineRequest]) -> dict[str, RequestRecorder]:
        """Recorders for requests that go to the engine now, by their ids; the `n` of one prompt stand together."""
        recorders = {}
        prompt = _Prompt(0)
        for request in requests:
            if request.choice == 0:
                prompt = _Prompt(0)
                self._observe("request_params_n", request.params.n)
                if request.params.max_tokens is not None:
                    self._observe("request_params_max_tokens", request.params.max_tokens)
            prompt.num_open += 1
            traffic = self._traffic_of(None if request.adapter is None else request.adapter.name)
            recorders[request.request_id] = RequestRecorder(self, traffic, prompt, request)
        return recorders

    def count_rejection(self, reason: Rejection) -> None:
        """A request did not get into the engine."""
        self._rejections[reason] += 1

    def count_http(self, handler: str, method: str, status: int, seconds: float | None = None) -> None:
        """One HTTP request has been answered; `handler` is its route's template. `seconds`: it took, if it came so far."""
        method = method if method in _METHODS else UNKNOWN
        key = (handler, method, status)
        self._http[key] = self._http.get(key, 0) + 1
        if seconds is not None:
            histogram = self._http_seconds.get((handler, method))
            if histogram is None:
                histogram = self._http_seconds[handler, method] = Histogram(_HTTP_BUCKETS)
            histogram.observe(seconds)

    def count_engine(self, counts: EngineCounts) -> None:
        """What the engine has counted since it last said so."""
        for name, gain in counts.gains.items():
            self._engine_histograms[name].add(gain)
        self._num_corrupted += counts.num_corrupted
        self._note_balances(counts.balances)

    def watch_engine(self, read: Callable[[], EngineReading]) -> None:
        """Has the engine's state read whenever the metrics are."""
        self._read_engine = read

    def watch_processes(self, engine_pid: Callable[[], int | None]) -> None:
        """Has the resources read that the server's process and the engine's use, and facts about this Python."""
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        ProcessCollector(namespace="perft_engine", pid=lambda: engine_pid() or 0, registry=self._registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics; who has a label is decided before."""
        self._rank()
        if self._version is not None:
            yield _info("build_info", "The server's version.", {"version": self._version})
        if self._read_engine is not None:
            reading = self._read_engine()
            yield from _engine_state(reading)
            yield self._lora_requests_info(reading)
        yield from self._request_metrics()
        yield from self._adapter_metrics()
        yield from self._engine_metrics()
        yield from self._http_metrics()

    # Who has a label

    def _traffic_of(self, name: str | None) -> _Traffic:
        traffic = self._traffic.get(name)
        if traffic is None:
            series = self._base
            if name is not None:
                series = self._other
                if name in self._always_labelled or self._num_free_labels:
                    series = self._give_label(name)
            traffic = self._traffic[name] = _Traffic(name, series)
        return traffic

    @property
    def _num_free_labels(self) -> int:
        return self._max_adapter_labels - sum(name not in self._always_labelled for name in self._labelled)

    def _give_label(self, name: str) -> _Series:
        if name not in self._labelled:
            self._labelled[name] = self._parked.pop(name) if name in self._parked else _Series()
        return self._labelled[name]

    def _take_label(self, name: str) -> None:
        self._parked[name] = self._labelled.pop(name)
        while len(self._parked) > MAX_PARKED:
            self._retired.merge(self._parked.popitem(last=False)[1])

    def _rank(self) -> None:
        """Now and then: adapters with more traffic take the labels of those with less."""
        now = self._clock()
        if now < self._next_ranking:
            return
        self._next_ranking = now + RANK_SECONDS
        for traffic in self._traffic.values():
            traffic.score, traffic.recent = traffic.score / 2 + traffic.recent, 0
        adapters = {name: traffic for name, traffic in self._traffic.items() if name is not None}
        scores = {name: adapters[name].score if name in adapters else 0.0 for name in self._labelled}
        holders = sorted((name for name in self._labelled if name not in self._always_labelled), key=scores.__getitem__)
        others = [traffic for name, traffic in adapters.items() if name not in self._labelled]
        others.sort(key=lambda traffic: traffic.score, reverse=True)
        for holder, other in zip(holders[:MAX_SWAPS], others, strict=False):
            if other.score <= max(1.0, LEAD * scores[holder]):
                break
            self._take_label(holder)
            if holder in adapters:
                adapters[holder].series = self._other
            assert other.name is not None
            other.series = self._give_label(other.name)
        for name, traffic in adapters.items():
            if traffic.score < 1 and not (traffic.num_running or traffic.num_waiting):
                del self._traffic[name]

    def _note_balances(self, balances: Iterable[RouterBalance]) -> None:
        for balance in balances:
            self._balances.pop(balance.adapter, None)
            self._balances[balance.adapter] = balance.entropy
            if len(self._balances) > self._max_adapter_labels + MAX_PARKED:
                self._balances.popitem(last=False)

    # Samples

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _request_metrics(self) -> Iterator[Metric]:
        total = _Series()
        for series in (self._base, self._other, self._retired, *self._labelled.values(), *self._parked.values()):
            total.merge(series)
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", total.first_token),
            (
                "inter_token_latency_seconds",
                "Between two tokens of a request; one observation per gap.",
                total.inter_token,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", total.e2e),
            *((name, text, self._histograms[name]) for name, text, _ in _REQUEST_HISTOGRAMS),
        ):
            yield _histograms(name, text, (), [((), histogram)])
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens processed.", total.prompt_tokens),
            (
                "prompt_tokens_cached",
                "Prompt tokens that were found in the prefix cache; part of those processed.",
                total.prompt_tokens_cached,
            ),
            ("generation_tokens", "Tokens generated.", total.generation_tokens),
            ("corrupted_requests", "Requests that ended because their logits were not numbers.", self._num_corrupted),
        ):
            yield CounterMetricFamily(f"perft_{name}", text, count)
        yield _counters("request_success", "Requests by how they ended.", ("finished_reason",), _by_one(total.finished))
        yield _counters(
            "admission_rejections",
            "Requests that did not get into the engine, by why.",
            ("reason",),
            _by_one(self._rejections),
        )

    def _adapter_metrics(self) -> Iterator[Metric]:
        shown = {BASE_LABEL: self._base, OTHER_LABEL: self._other, **self._labelled}
        label = ("adapter",)
        for name, text, tokens in (
            ("prompt_tokens", "Prompt tokens processed.", lambda series: series.prompt_tokens),
            (
                "prompt_tokens_cached",
                "Prompt tokens that were found in the prefix cache.",
                lambda series: series.prompt_tokens_cached,
            ),
            ("generation_tokens", "Tokens generated.", lambda series: series.generation_tokens),
        ):
            samples = [((adapter,), tokens(series)) for adapter, series in shown.items()]
            yield _counters(f"adapter_{name}", f"{text} By adapter.", label, samples)
        finished = [
            ((adapter, reason), count) for adapter, series in shown.items() for reason, count in series.finished.items()
        ]
        yield _counters(
            "adapter_requests", "Requests by adapter and how they ended.", (*label, "finished_reason"), finished
        )
        for name, text, buckets, histogram in (
            (
                "time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                _ADAPTER_FIRST_TOKEN_BUCKETS,
                lambda series: series.first_token,
            ),
            (
                "inter_token_latency_seconds",
                "Between two tokens of a request.",
                _ADAPTER_INTER_TOKEN_BUCKETS,
                lambda series: series.inter_token,
            ),
            (
                "e2e_request_latency_seconds",
                "From a request's arrival to its end.",
                _ADAPTER_REQUEST_BUCKETS,
                lambda series: series.e2e,
            ),
        ):
            found = [((adapter,), histogram(series)) for adapter, series in shown.items()]
            yield _histograms(f"adapter_{name}", f"{text} By adapter.", label, found, buckets)
        yield _gauges(
            "adapter_router_entropy_ratio",
            "How evenly an adapter's tokens spread over its adapter experts: entropy of their shares, divided by the "
            "logarithm of their number; 1 is even, 0 is one for all. Sampled; variants R and E only.",
            label,
            [((adapter,), self._balances[adapter]) for adapter in self._labelled if adapter in self._balances],
        )

    def _engine_metrics(self) -> Iterator[Metric]:
        found = self._engine_histograms
        yield _histograms(
            "engine_step_seconds",
            "Seconds of a step of the engine by phase: adapters (taken in, copied), schedule, run (the forward pass; on a GPU "
            "until it is launched), sample (until its tokens are there), commit.",
            ("phase",),
            [((phase,), found[f"step_{phase}"]) for phase in STEP_PHASES],
        )
        yield _histograms(
            "adapter_load_seconds",
            "Seconds that bringing an adapter took: from a folder, the Hub or a URL into host memory, or from there (host) "
            "into the arena.",
            ("source",),
            [((source,), found[f"load_{source}"]) for source in LOAD_SOURCES],
        )
        for name, text, histogram in (
            ("iteration_tokens", "Tokens, of prompts and generated, that a step computes.", "iteration_tokens"),
            (
                "kv_block_lifetime_seconds",
                "From a page's being handed out to what it holds giving way to something else. Sampled.",
                "page_lifetime",
            ),
            (
                "kv_block_idle_before_evict_seconds",
                "How long nobody had used what a page holds when it gave way. Sampled.",
                "page_idle",
            ),
            (
                "kv_block_reuse_gap_seconds",
                "Between two uses of what a page holds, the later by another request. Sampled.",
                "page_reuse_gap",
            ),
        ):
            yield _histograms(name, text, (), [((), found[histogram])])

    def _http_metrics(self) -> Iterator[Metric]:
        yield _counters(
            "http_requests",
            "HTTP requests by route, method and status.",
            ("handler", "method", "status"),
            [((handler, method, str(status)), count) for (handler, method, status), count in self._http.items()],
        )
        yield _histograms(
            "http_request_duration_seconds",
            "From an HTTP request's arrival to the end of its reply, by route and method.",
            ("handler", "method"),
            self._http_seconds.items(),
        )

    def _lora_requests_info(self, reading: EngineReading) -> Metric:
        """One sample, always; its value is the time, so that a reader of several knows the newest."""
        adapters = [traffic for name, traffic in self._traffic.items() if name is not None]
        running = sorted(str(traffic.name) for traffic in adapters if traffic.num_running)
        waiting = sorted(str(traffic.name) for traffic in adapters if traffic.num_waiting and not traffic.num_running)
        family = GaugeMetricFamily(
            self._lora_info,
            "Adapters of the requests that run and that wait, and how many could run at a time; the value is the time of the "
            "reading in seconds since the epoch.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        family.add_metric(
            (str(max(max_lora(reading), len(running))), ",".join(running), ",".join(waiting)), time.time()
        )
        return family


def max_lora(reading: EngineReading) -> int:
    """How many adapters can run at a time.

    The arena holds bytes, not adapters, so this is an estimate: as many as fit of the mean size of those in it now, and never
    more than there are seats in a batch; while none is in it, that many.
    """
    memory, seats = reading.stats.adapters, reading.config.max_num_seqs
    if not memory.num_resident or not memory.arena_used_bytes:
        return seats
    return max(1, min(seats, memory.arena_bytes * memory.num_resident // memory.arena_used_bytes))


class RequestRecorder:
    """Records one engine request: `record` each of its events, or `finish` it early.

    Attributes:
        request: what was asked for.
        num_tokens: generated so far.
        first_token, last_token: when they came (`time.monotonic()`).
        queue_seconds, prefill_seconds: by the engine's clock, once it has said.
        num_cached_tokens: of the prompt, found in the prefix cache.
        finish_reason: how it ended, if it has.
    """

    __slots__ = (
        "_metrics",
        "_prompt",
        "_traffic",
        "finish_reason",
        "first_token",
        "last_token",
        "num_cached_tokens",
        "num_tokens",
        "prefill_seconds",
        "queue_seconds",
        "request",
    )

    def __init__(self, metrics: Metrics, traffic: _Traffic, prompt: _Prompt, request: EngineRequest) -> None:
        self._metrics = metrics
        self._traffic = traffic
        self._prompt = prompt
        self.request = request
        self.num_tokens = 0
        self.first_token = self.last_token = request.arrival
        self.queue_seconds: float | None = None
        self.prefill_seconds: float | None = None
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        traffic.num_waiting += 1

    def record(self, event: TokenEvent, now: float) -> None:
        """An event has reached the front end at `now` (`time.monotonic()`)."""
        if self.num_tokens and event.token_id is not None:
            gap = now - self.last_token
            histogram = self._traffic.series.inter_token
            histogram.counts[bisect_left(INTER_TOKEN_BUCKETS, gap)] += 1
            histogram.sum += gap
            self.last_token = now
            self.num_tokens += 1
        else:
            self._begin(event, now)
        if event.finish_reason is not None:
            self.finish(event.finish_reason, now)

    def finish(self, reason: FinishReason, now: float) -> None:
        """The request has ended at `now`."""
        traffic, prompt, observe = self._traffic, self._prompt, self._metrics._observe
        self.finish_reason = reason
        traffic.series.e2e.observe(now - self.request.arrival)
        traffic.series.finished[reason] += 1
        traffic.recent += self.num_tokens + len(self.request.prompt_ids)
        observe("request_prompt_tokens", len(self.request.prompt_ids))
        observe("request_generation_tokens", self.num_tokens)
        if self.num_tokens:
            traffic.num_running -= 1
            decode = self.decode_seconds
            observe("request_decode_time_seconds", decode)
            if self.prefill_seconds is not None:
                observe("request_inference_time_seconds", self.prefill_seconds + decode)
            if self.num_tokens > 1:
                observe("request_time_per_output_token_seconds", decode / (self.num_tokens - 1))
        else:
            traffic.num_waiting -= 1
        prompt.most_tokens = max(prompt.most_tokens, self.num_tokens)
        prompt.num_open -= 1
        if not prompt.num_open:
            observe("request_max_num_generation_tokens", prompt.most_tokens)

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last so far."""
        return self.last_token - self.first_token

    def _begin(self, event: TokenEvent, now: float) -> None:
        """The first event, or the last one of a request that ends without a token."""
        series = self._traffic.series
        timing = event.timing
        if timing is not None:
            self.queue_seconds = timing.scheduled - timing.queued
            self.prefill_seconds = timing.first_token - timing.scheduled
            self._metrics._observe("request_queue_time_seconds", self.queue_seconds)
            self._metrics._observe("request_prefill_time_seconds", self.prefill_seconds)
            series.prompt_tokens += len(self.request.prompt_ids)
        if event.num_cached_tokens:
            self.num_cached_tokens = event.num_cached_tokens
            series.prompt_tokens_cached += event.num_cached_tokens
        if event.token_id is not None:
            series.first_token.observe(now - self.request.arrival)
            self.first_token = self.last_token = now
            self.num_tokens = 1
            self._traffic.num_waiting -= 1
            self._traffic.num_running += 1


class _Collector(Collector):
    """What the registry asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()


def _engine_state(reading: EngineReading) -> Iterator[Metric]:
    """The engine's state: so many series, however many adapters there are."""
    stats, memory, config = reading.stats, reading.stats.adapters, reading.config
    for name, text, gauge in (
        ("engine_up", "Whether the engine takes requests: 1 or 0.", int(reading.is_up)),
        ("num_requests_running", "Requests in the running batch.", stats.num_running),
        ("num_requests_waiting", "Requests that wait to run.", stats.num_waiting),
        ("kv_cache_usage_perc", "Part of the KV cache that requests hold; 1 is all.", stats.kv_usage),
        ("adapters_registered", "Adapters that requests can name.", reading.num_adapters),
        ("adapters_resident", "Adapters in the arena.", memory.num_resident),
        ("adapter_arena_bytes", "Size of the arena, the adapters' memory on the device.", memory.arena_bytes),
        ("adapter_arena_used_bytes", "Bytes of the arena that adapters take.", memory.arena_used_bytes),
        ("adapter_host_bytes", "Host memory that adapters may take.", memory.host_bytes),
        ("adapter_host_used_bytes", "Bytes of host memory that adapters take.", memory.host_used_bytes),
    ):
        yield GaugeMetricFamily(f"perft_{name}", text, gauge)
    yield _info(
        "cache_config_info",
        "Settings of the KV cache.",
        {
            "block_size": str(config.page_size),
            "num_gpu_blocks": str(stats.num_pages),
            "enable_prefix_caching": str(config.prefix_caching == "on"),
        },
    )
    for name, text, count in (
        ("engine_restarts", "Times the engine's process has been started again.", reading.num_restarts),
        ("engine_steps", "Steps of the engine.", stats.num_steps),
        ("num_preemptions", "Times a running request had to give up its pages.", stats.num_preemptions),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ("adapter_loads", "Adapters read from their source.", memory.num_loads),
        ("adapter_load_failures", "Adapters that could not be read.", memory.num_load_failures),
        ("adapter_evictions", "Adapters that lost their place in the arena to another.", memory.num_evictions),
    ):
        yield CounterMetricFamily(f"perft_{name}", text, count)


_Values = tuple[str, ...]


def _by_one(counts: dict[FinishReason, int] | dict[Rejection, int]) -> list[tuple[_Values, float]]:
    return [((str(key),), count) for key, count in counts.items()]


def _counters(name: str, text: str, labels: _Values, samples: Iterable[tuple[_Values, float]]) -> Metric:
    family = CounterMetricFamily(f"perft_{name}", text, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family


def _gauges(name: str, text: str, labels: _Values, samples: Iterable[tuple[_Values, float]]) -> Metric:
    family = GaugeMetricFamily(f"perft_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _info(name: str, text: str, labels: dict[str, str]) -> Metric:
    return _gauges(name, text, tuple(labels), [(tuple(labels.values()), 1)])


def _histograms(
    name: str,
    text: str,
    labels: _Values,
    samples: Iterable[tuple[_Values, Histogram]],
    bounds: Sequence[float] | None = None,
) -> Metric:
    """`bounds`: those to show, some of the histograms' own; all, if not given."""
    family = HistogramMetricFamily(f"perft_{name}", text, labels=labels)
    for values, histogram in samples:
        buckets = []
        count = 0
        for bound, number in zip(histogram.bounds, histogram.counts, strict=False):
            count += number
            if bounds is None or bound in bounds:
                buckets.append((floatToGoString(bound), count))
        buckets.append(("+Inf", count + histogram.counts[-1]))
        family.add_metric(values, buckets, histogram.sum)
    return family
