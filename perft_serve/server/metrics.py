"""Prometheus metrics: names, definitions and buckets as vLLM has them, with the prefix `perft_` and an `adapter` label.

In: the events of requests as they reach the front end, and the engine's state when somebody asks. Out: the text that
Prometheus reads. Latencies that a client sees (first token, between tokens, end to end) are taken by the front end's clock,
queue and prefill times by the engine's: `time.monotonic()`, which is one clock for all processes of a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from perft_serve.engine.events import EngineRequest, EngineStats, FinishReason, TokenEvent

CONTENT_TYPE = CONTENT_TYPE_LATEST

# No adapter can have these names: `<` is not allowed in them.
BASE_LABEL = "<base>"
OTHER_LABEL = "<other>"

_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# vLLM's start at 10 ms, which is more than a decode step of a small model on a fast GPU takes.
_INTER_TOKEN_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_COUNT_BUCKETS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReading:
    """The engine at one moment.

    Args:
        stats: its own; what counts must never go back.
        is_up: it takes requests.
        num_restarts: of its process.
        num_adapters: how many it could be asked for.
    """

    stats: EngineStats
    is_up: bool
    num_restarts: int
    num_adapters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _AdapterMetrics:
    """The metrics of one value of the `adapter` label."""

    time_to_first_token: Histogram
    inter_token_latency: Histogram
    e2e_request_latency: Histogram
    request_queue_time: Histogram
    request_prefill_time: Histogram
    request_decode_time: Histogram
    request_prompt_tokens: Histogram
    request_generation_tokens: Histogram
    prompt_tokens: Counter
    prompt_tokens_cached: Counter
    generation_tokens: Counter
    request_success: dict[FinishReason, Counter]


class Metrics:
    """All metrics of one server.

    Args:
        registry: where they are registered and read from.
        max_adapter_labels: so many adapters, the first that are used, have metrics of their own; the others share the
            label `<other>`. The base is `<base>`.
    """

    def __init__(self, registry: CollectorRegistry, *, max_adapter_labels: int = 100) -> None:
        self._registry = registry
        self._max_adapter_labels = max_adapter_labels
        self._by_label: dict[str, _AdapterMetrics] = {}
        self._adapter_labels: set[str] = set()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"perft_{name}", text, ["adapter"], buckets=buckets, registry=registry)

        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "Between two tokens of a request; one observation per gap.",
            _INTER_TOKEN_BUCKETS,
        )
        self._e2e_request_latency = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_BUCKETS
        )
        self._request_queue_time = histogram(
            "request_queue_time_seconds", "From a request's arrival to its first step in the engine.", _REQUEST_BUCKETS
        )
        self._request_prefill_time = histogram(
            "request_prefill_time_seconds", "From a request's first step to its first token.", _REQUEST_BUCKETS
        )
        self._request_decode_time = histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_BUCKETS
        )
        self._request_prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_COUNT_BUCKETS
        )
        self._request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a request.", _TOKEN_COUNT_BUCKETS
        )
        self._prompt_tokens = Counter("perft_prompt_tokens", "Prompt tokens processed.", ["adapter"], registry=registry)
        self._prompt_tokens_cached = Counter(
            "perft_prompt_tokens_cached",
            "Prompt tokens that were found in the prefix cache; part of those processed.",
            ["adapter"],
            registry=registry,
        )
        self._generation_tokens = Counter(
            "perft_generation_tokens", "Tokens generated.", ["adapter"], registry=registry
        )
        self._request_success = Counter(
            "perft_request_success", "Requests by how they ended.", ["adapter", "finished_reason"], registry=registry
        )
        self._http_requests = Counter(
            "perft_http_requests", "HTTP requests by route and status.", ["handler", "status"], registry=registry
        )

    def adapter_label(self, adapter: str | None) -> str:
        """The value of the `adapter` label for an adapter's name; `None` is the base."""
        if adapter is None:
            return BASE_LABEL
        if adapter not in self._adapter_labels:
            if len(self._adapter_labels) >= self._max_adapter_labels:
                return OTHER_LABEL
            self._adapter_labels.add(adapter)
        return adapter

    def track(self, request: EngineRequest) -> RequestRecorder:
        """A recorder for a request that goes to the engine now."""
        label = self.adapter_label(None if request.adapter is None else request.adapter.name)
        if label not in self._by_label:
            self._by_label[label] = self._labelled(label)
        return RequestRecorder(
            self._by_label[label], num_prompt_tokens=len(request.prompt_ids), arrival=request.arrival
        )

    def count_http(self, handler: str, status: int) -> None:
        """One HTTP request has been answered; `handler` is its route's template."""
        self._http_requests.labels(handler, str(status)).inc()

    def watch_engine(self, read: Callable[[], EngineReading]) -> None:
        """Has the engine's state read whenever the metrics are."""
        self._registry.register(_EngineCollector(read))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _labelled(self, label: str) -> _AdapterMetrics:
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        return _AdapterMetrics(
            time_to_first_token=self._time_to_first_token.labels(label),
            inter_token_latency=self._inter_token_latency.labels(label),
            e2e_request_latency=self._e2e_request_latency.labels(label),
            request_queue_time=self._request_queue_time.labels(label),
            request_prefill_time=self._request_prefill_time.labels(label),
            request_decode_time=self._request_decode_time.labels(label),
            request_prompt_tokens=self._request_prompt_tokens.labels(label),
            request_generation_tokens=self._request_generation_tokens.labels(label),
            prompt_tokens=self._prompt_tokens.labels(label),
            prompt_tokens_cached=self._prompt_tokens_cached.labels(label),
            generation_tokens=self._generation_tokens.labels(label),
            request_success={reason: self._request_success.labels(label, reason) for reason in reasons},
        )


class RequestRecorder:
    """Records one engine request: `record` each of its events, or `finish` it early."""

    __slots__ = ("_arrival", "_first_token", "_last_token", "_metrics", "_num_prompt_tokens", "_num_tokens")

    def __init__(self, metrics: _AdapterMetrics, *, num_prompt_tokens: int, arrival: float) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._arrival = arrival
        self._first_token: float | None = None
        self._last_token = arrival

    def record(self, event: TokenEvent, now: float) -> None:
        """An event has reached the front end at `now` (`time.monotonic()`)."""
        metrics = self._metrics
        if event.timing is not None:
            metrics.request_queue_time.observe(event.timing.scheduled - event.timing.arrival)
            metrics.request_prefill_time.observe(event.timing.first_token - event.timing.scheduled)
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
        if event.num_cached_tokens:
            metrics.prompt_tokens_cached.inc(event.num_cached_tokens)
        if event.token_id is not None:
            if self._first_token is None:
                self._first_token = now
                metrics.time_to_first_token.observe(now - self._arrival)
            else:
                metrics.inter_token_latency.observe(now - self._last_token)
            self._last_token = now
            self._num_tokens += 1
            metrics.generation_tokens.inc()
        if event.finish_reason is not None:
            self.finish(event.finish_reason, now)

    def finish(self, reason: FinishReason, now: float) -> None:
        """The request has ended at `now`."""
        metrics = self._metrics
        metrics.e2e_request_latency.observe(now - self._arrival)
        metrics.request_prompt_tokens.observe(self._num_prompt_tokens)
        metrics.request_generation_tokens.observe(self._num_tokens)
        metrics.request_success[reason].inc()
        if self._first_token is not None:
            metrics.request_decode_time.observe(self._last_token - self._first_token)


class _EngineCollector(Collector):
    """The engine's state as metrics, read at the moment of asking: so many series, however many adapters there are."""

    def __init__(self, read: Callable[[], EngineReading]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        reading = self._read()
        stats, memory = reading.stats, reading.stats.adapters
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
        for name, text, count in (
            ("engine_restarts", "Times the engine's process has been started again.", reading.num_restarts),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("num_preemptions", "Times a running request had to give up its pages.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("adapter_loads", "Adapters read from their source.", memory.num_loads),
            ("adapter_load_failures", "Adapters that could not be read.", memory.num_load_failures),
            ("adapter_load_seconds", "Seconds that reading adapters took, all added up.", memory.load_seconds),
            ("adapter_evictions", "Adapters that lost their place in the arena to another.", memory.num_evictions),
        ):
            yield CounterMetricFamily(f"perft_{name}", text, count)
