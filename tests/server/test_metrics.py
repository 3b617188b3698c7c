"""Metrics: their names and definitions, labels that stay few, and what a real server reports."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterMemory
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import STEP_HISTOGRAMS, Counter, EngineCounts, Histogram, RouterBalance
from perft_serve.engine.events import EngineRequest, EngineStats, Timing, TokenEvent
from perft_serve.engine.params import SamplingParams
from perft_serve.server.client import EngineClient
from perft_serve.server.config import ServerConfig
from perft_serve.server.metrics import (
    BASE_LABEL,
    MAX_PARKED,
    MAX_SWAPS,
    OTHER_LABEL,
    RANK_SECONDS,
    EngineReading,
    Metrics,
    RequestRecorder,
    max_lora,
)

CONFIG = EngineConfig(model="none")
TOKEN = TokenEvent(request_id="r", token_id=7)


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """(name, adapter) to value, summed over other labels but `le`."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                key = (sample.name, sample.labels.get("adapter", ""))
                found[key] = found.get(key, 0.0) + sample.value
    return found


def request(adapter: str | None, *, arrival: float = 100.0, **settings: Any) -> EngineRequest:
    ref = None if adapter is None else AdapterRef(name=adapter, source="somewhere")
    fields = {"request_id": "r", "prompt_ids": (1, 2, 3), "params": SamplingParams(), **settings}
    return EngineRequest(adapter=ref, arrival=arrival, **fields)


def track(metrics: Metrics, adapter: str | None) -> RequestRecorder:
    return metrics.track([request(adapter)])["r"]


def run(metrics: Metrics, adapter: str | None, num_tokens: int = 1) -> None:
    """A request from its start to its end."""
    recorder = track(metrics, adapter)
    for index in range(num_tokens):
        recorder.record(TOKEN, 101.0 + index)
    recorder.finish("stop", 101.0 + num_tokens)


def reading(**fields: Any) -> EngineReading:
    whole = {"stats": EngineStats(), "config": CONFIG, "is_up": True, "num_restarts": 0, "num_adapters": 0}
    return EngineReading(**{**whole, **fields})


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_requests_life_in_numbers() -> None:
    metrics = Metrics(CollectorRegistry())
    recorder = metrics.track([request("a", params=SamplingParams(max_tokens=3))])["r"]
    timing = Timing(queued=5000.0, scheduled=5000.25, first_token=5000.75)  # another process's clock
    recorder.record(replace(TOKEN, timing=timing, num_cached_tokens=2), 101.0)
    recorder.record(TOKEN, 101.5)
    recorder.record(replace(TOKEN, finish_reason="length"), 103.0)
    samples = samples_of(metrics.render().decode())
    expected = {
        "perft_time_to_first_token_seconds": (1, 1.0),
        "perft_inter_token_latency_seconds": (2, 2.0),
        "perft_e2e_request_latency_seconds": (1, 3.0),
        "perft_request_queue_time_seconds": (1, 0.25),
        "perft_request_prefill_time_seconds": (1, 0.5),
        "perft_request_decode_time_seconds": (1, 2.0),
        "perft_request_inference_time_seconds": (1, 2.5),
        "perft_request_time_per_output_token_seconds": (1, 1.0),
        "perft_request_prompt_tokens": (1, 3.0),
        "perft_request_generation_tokens": (1, 3.0),
        "perft_request_max_num_generation_tokens": (1, 3.0),
        "perft_request_params_n": (1, 1.0),
        "perft_request_params_max_tokens": (1, 3.0),
    }
    for name, (count, total) in expected.items():
        assert samples[f"{name}_count", ""] == count, name
        assert samples[f"{name}_sum", ""] == pytest.approx(total), name
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        whole = samples[f"perft_{name}_seconds_sum", ""]
        assert samples[f"perft_adapter_{name}_seconds_sum", "a"] == whole
        assert samples[f"perft_adapter_{name}_seconds_sum", OTHER_LABEL] == 0
    for name, value in (("prompt_tokens", 3), ("prompt_tokens_cached", 2), ("generation_tokens", 3)):
        assert samples[f"perft_{name}_total", ""] == value
        assert samples[f"perft_adapter_{name}_total", "a"] == value
        assert samples[f"perft_adapter_{name}_total", BASE_LABEL] == 0
    text = metrics.render().decode()
    assert 'perft_request_success_total{finished_reason="length"} 1.0' in text
    assert 'perft_adapter_requests_total{adapter="a",finished_reason="length"} 1.0' in text


def test_requests_that_end_without_a_token() -> None:
    metrics = Metrics(CollectorRegistry())
    track(metrics, None).finish("abort", 102.0)
    track(metrics, None).record(
        TokenEvent(request_id="r", token_id=None, finish_reason="error", error="it is broken"), 103.0
    )
    samples = samples_of(metrics.render().decode())
    assert samples["perft_e2e_request_latency_seconds_sum", ""] == 5
    assert samples["perft_request_success_total", ""] == 2
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_decode_time_seconds"):
        assert samples[f"perft_{name}_count", ""] == 0
    assert samples["perft_prompt_tokens_total", ""] == samples["perft_generation_tokens_total", ""] == 0
    assert samples["perft_request_generation_tokens_sum", ""] == 0


def test_the_completions_of_one_prompt_belong_together() -> None:
    metrics = Metrics(CollectorRegistry())
    params = SamplingParams(n=2, max_tokens=None)
    two_prompts = [
        request(None, request_id=f"{prompt}-{choice}", choice=choice, params=params)
        for prompt in range(2)
        for choice in range(2)
    ]
    recorders = metrics.track(two_prompts)
    for recorder, num_tokens in zip(recorders.values(), (2, 5, 1, 1), strict=True):
        for index in range(num_tokens):
            recorder.record(TOKEN, 101.0 + index)
        recorder.finish("stop", 110.0)
    samples = samples_of(metrics.render().decode())
    assert samples["perft_request_params_n_count", ""] == 2
    assert samples["perft_request_params_n_sum", ""] == 4
    assert samples["perft_request_max_num_generation_tokens_count", ""] == 2
    assert samples["perft_request_max_num_generation_tokens_sum", ""] == 5 + 1
    assert samples["perft_request_params_max_tokens_count", ""] == 0, "nobody set it"


def test_gaps_of_a_few_milliseconds_are_told_apart() -> None:
    registry = CollectorRegistry()
    recorder = Metrics(registry).track([request(None, arrival=0.0)])["r"]
    recorder.record(TOKEN, 1.0)
    recorder.record(TOKEN, 1.0025)
    bucket = "perft_inter_token_latency_seconds_bucket"
    assert registry.get_sample_value(bucket, {"le": "0.001"}) == 0
    assert registry.get_sample_value(bucket, {"le": "0.003"}) == 1


def test_a_value_on_a_bound_is_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert (histogram.counts, histogram.count, histogram.sum) == ([2, 2, 1], 5, 7.5)


def test_the_buckets_are_those_that_others_know() -> None:
    families = {
        family.name: family for family in text_string_to_metric_families(Metrics(CollectorRegistry()).render().decode())
    }

    def bounds(name: str) -> list[str]:
        return [sample.labels["le"] for sample in families[name].samples if sample.name.endswith("_bucket")]

    assert bounds("perft_request_queue_time_seconds")[:4] == ["0.3", "0.5", "0.8", "1.0"]
    assert bounds("perft_iteration_tokens")[-2:] == ["16384.0", "+Inf"]
    assert bounds("perft_request_params_n") == ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"]


# The label of adapters


def test_the_adapter_label_takes_few_values() -> None:
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=2, adapter_labels=["always"])
    for index in range(1000):
        run(metrics, f"adapter-{index}")
    run(metrics, "always")
    run(metrics, None)
    adapters = {adapter for _, adapter in samples_of(metrics.render().decode())}
    assert adapters == {"", BASE_LABEL, OTHER_LABEL, "adapter-0", "adapter-1", "always"}
    samples = samples_of(metrics.render().decode())
    assert samples["perft_adapter_generation_tokens_total", OTHER_LABEL] == 998
    assert samples["perft_adapter_generation_tokens_total", "always"] == 1


def test_labels_go_to_those_with_the_most_traffic() -> None:
    clock = Clock()
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=2, adapter_labels=["always"], clock=clock)

    def labels() -> set[str]:
        metrics.render()
        return {name for name in ("always", "a", "b", "c", "d") if metrics.adapter_label(name) == name}

    for name, num_tokens in (("always", 1), ("a", 50), ("b", 20), ("c", 40), ("d", 21)):
        run(metrics, name, num_tokens)
    assert labels() == {"always", "a", "b"}, "first come"
    clock.now += RANK_SECONDS
    assert labels() == {"always", "a", "c"}
    run(metrics, "d", 15)  # more than `c` by less than the lead
    clock.now += RANK_SECONDS
    assert labels() == {"always", "a", "c"}
    for _ in range(2):
        run(metrics, "d", 100)
        clock.now += RANK_SECONDS
        metrics.render()
    assert labels() == {"always", "a", "d"}


def test_what_was_counted_never_goes_back_whoever_has_the_labels() -> None:
    """Every series, while it is shown and from one time that it is shown to the next, and the sum over all adapters."""
    clock = Clock()
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=3, clock=clock)
    highest: dict[tuple[str, str], float] = {}
    seen: set[str] = set()
    total = 0
    recorders: list[RequestRecorder] = []
    for turn in range(60):
        for index in range(12):
            name = f"adapter-{index}"
            num_tokens = 200 if index // 3 == turn // 5 % 4 else 1
            recorder = track(metrics, name)  # most end in a later turn, under another label perhaps
            for token in range(num_tokens):
                recorder.record(TOKEN, 101.0 + token)
            recorders.append(recorder)
            total += num_tokens
        for recorder in recorders[:-5]:
            recorder.finish("stop", 400.0)
        recorders = recorders[-5:]
        clock.now += RANK_SECONDS
        samples = samples_of(metrics.render().decode())
        for key, value in samples.items():
            if key[0].endswith(("_total", "_count", "_sum")):
                assert value >= highest.get(key, 0.0), key
                highest[key] = value
        adapters = {adapter for _, adapter in samples} - {"", BASE_LABEL, OTHER_LABEL}
        assert len(adapters) <= 3
        seen |= adapters
        assert samples["perft_generation_tokens_total", ""] == total
    assert len(seen) > 8, "labels do not move"
    assert metrics._parked
    for recorder in recorders:
        recorder.finish("stop", 400.0)
    hidden = sum(series.generation_tokens for series in metrics._parked.values())
    samples = samples_of(metrics.render().decode())
    shown = sum(value for (name, _), value in samples.items() if name == "perft_adapter_generation_tokens_total")
    assert shown + hidden == samples["perft_generation_tokens_total", ""] == total
    assert samples["perft_request_success_total", ""] == 60 * 12


def test_what_is_kept_of_adapters_that_are_gone_is_bounded() -> None:
    clock = Clock()
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=MAX_SWAPS, clock=clock)
    num_turns = 2 + MAX_PARKED // MAX_SWAPS
    for turn in range(num_turns):
        for index in range(MAX_SWAPS):
            run(metrics, f"adapter-{turn}-{index}", 10)
        clock.now += RANK_SECONDS
        metrics.render()
    assert len(metrics._parked) == MAX_PARKED
    assert metrics._retired.generation_tokens > 0
    samples = samples_of(metrics.render().decode())
    assert samples["perft_generation_tokens_total", ""] == MAX_SWAPS * 10 * num_turns
    for _ in range(20):
        clock.now += RANK_SECONDS
        metrics.render()
    assert len(metrics._traffic) == 0, "nobody asks for these any more"


@pytest.mark.parametrize(
    ("name", "theirs", "fine"),
    [
        (
            "time_to_first_token",
            (
                *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
                *(10, 20, 40, 80, 160, 640, 2560),
            ),
            (0.01, 10),
        ),
        (
            "inter_token_latency",
            (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
            (0.001, 1),
        ),
        (
            "e2e_request_latency",
            (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
            (0.1, 90),
        ),
    ],
)
def test_latencies_have_the_buckets_of_vllm_and_finer_ones_between(
    name: str, theirs: tuple[float, ...], fine: tuple[float, float]
) -> None:
    metrics = Metrics(CollectorRegistry())
    text = metrics.render().decode()
    found = re.findall(rf'^perft_{name}_seconds_bucket{{le="([^"]+)"}}', text, re.MULTILINE)
    bounds = [float(bound) for bound in found]
    assert set(theirs) <= set(bounds)
    between = [bound for bound in bounds if fine[0] <= bound <= fine[1]]
    assert (between[0], between[-1]) == fine
    assert all(upper / lower < 1.21 for lower, upper in pairwise(between))


def test_a_scrape_stays_small_with_thousands_of_adapters(tmp_path: Path) -> None:
    num_adapters = 5_000
    for index in range(num_adapters):
        (tmp_path / f"adapter-{index}").mkdir()
        (tmp_path / f"adapter-{index}" / "adapter_config.json").touch()
    metrics = Metrics(CollectorRegistry())
    config = EngineConfig(model="none", adapter_dir=str(tmp_path))
    client = EngineClient(config, ServerConfig(), metrics)  # not started
    metrics.watch_processes(lambda: client.engine_pid)
    for index in range(num_adapters):
        run(metrics, f"adapter-{index}", 2)
    counts = EngineCounts(
        balances=tuple(RouterBalance(adapter=f"adapter-{index}", entropy=0.5) for index in range(num_adapters))
    )
    metrics.count_engine(counts)
    text = metrics.render().decode()
    assert samples_of(text)["perft_adapters_registered", ""] == num_adapters
    assert samples_of(text)["perft_generation_tokens_total", ""] == 2 * num_adapters
    assert len(text) < 1_000_000
    assert len(text.splitlines()) < 5_000


# The engine's state and counts


def test_the_engines_state_is_read_when_asked_for() -> None:
    metrics = Metrics(CollectorRegistry())
    memory = AdapterMemory(
        arena_bytes=100,
        arena_used_bytes=50,
        host_bytes=1000,
        host_used_bytes=70,
        num_resident=2,
        num_loads=9,
        num_load_failures=1,
        num_evictions=7,
    )
    stats = EngineStats(
        num_pages=11,
        num_running=1,
        num_waiting=2,
        kv_usage=0.5,
        num_preemptions=3,
        num_steps=4,
        prefix_queries=80,
        prefix_hits=64,
        adapters=memory,
    )
    first = reading(stats=stats, num_restarts=1, num_adapters=10_000)
    readings = [first, replace(first, stats=replace(stats, num_running=7), is_up=False)]
    metrics.watch_engine(lambda: readings.pop())
    expected = {
        "engine_up": 0,
        "engine_restarts_total": 1,
        "engine_steps_total": 4,
        "num_requests_running": 7,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.5,
        "cache_config_info": 1,
        "num_preemptions_total": 3,
        "prefix_cache_queries_total": 80,
        "prefix_cache_hits_total": 64,
        "adapters_registered": 10_000,
        "adapters_resident": 2,
        "adapter_arena_bytes": 100,
        "adapter_arena_used_bytes": 50,
        "adapter_host_bytes": 1000,
        "adapter_host_used_bytes": 70,
        "adapter_loads_total": 9,
        "adapter_load_failures_total": 1,
        "adapter_evictions_total": 7,
    }
    text = metrics.render().decode()
    samples = samples_of(text)
    assert {name: samples[f"perft_{name}", ""] for name in expected} == expected
    assert 'perft_cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="11"} 1.0' in text
    samples = samples_of(metrics.render().decode())
    assert samples["perft_engine_up", ""] == 1
    assert samples["perft_num_requests_running", ""] == 1


def test_what_the_engine_counts_adds_up_over_engines() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for _ in range(2):  # an engine, and the one that was started in its place
        counter = Counter()
        assert counter.take() is None
        for name in STEP_HISTOGRAMS:
            counter.observe(name, 0.002)
        counter.observe("load_hub", 100.0)
        counter.observe("iteration_tokens", 10**6)
        counter.count_corrupted(1)
        counts = counter.take()
        assert counts is not None
        assert counter.take() is None, "it was told"
        metrics.count_engine(counts)
    for phase in ("adapters", "schedule", "run", "sample", "commit"):
        assert registry.get_sample_value("perft_engine_step_seconds_count", {"phase": phase}) == 2
        below = registry.get_sample_value("perft_engine_step_seconds_bucket", {"phase": phase, "le": "0.001"})
        within = registry.get_sample_value("perft_engine_step_seconds_bucket", {"phase": phase, "le": "0.0025"})
        assert (below, within) == (0, 2)
    assert registry.get_sample_value("perft_adapter_load_seconds_sum", {"source": "hub"}) == 200
    assert registry.get_sample_value("perft_iteration_tokens_bucket", {"le": "16384.0"}) == 0
    assert registry.get_sample_value("perft_iteration_tokens_count") == 2
    assert registry.get_sample_value("perft_corrupted_requests_total") == 2


def test_the_entropy_of_an_adapter_is_shown_while_it_has_a_label() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, max_adapter_labels=1)
    run(metrics, "a")
    run(metrics, "b")
    metrics.count_engine(
        EngineCounts(balances=(RouterBalance(adapter="a", entropy=0.25), RouterBalance(adapter="b", entropy=0.5)))
    )
    name = "perft_adapter_router_entropy_ratio"
    assert registry.get_sample_value(name, {"adapter": "a"}) == 0.25
    assert registry.get_sample_value(name, {"adapter": "b"}) is None
    assert registry.get_sample_value(name, {"adapter": OTHER_LABEL}) is None


# What a router of Kubernetes' inference gateway reads


def lora_info(metrics: Metrics, name: str = "perft_lora_requests_info") -> dict[str, str]:
    families = [family for family in text_string_to_metric_families(metrics.render().decode()) if family.name == name]
    (family,) = families
    (sample,) = family.samples
    assert family.type == "gauge"
    assert time.time() - 5 < sample.value <= time.time()
    return dict(sample.labels)


def test_which_adapters_run_and_wait() -> None:
    metrics = Metrics(CollectorRegistry(), lora_info="vllm:lora_requests_info", max_adapter_labels=0)
    metrics.watch_engine(reading)

    def info() -> tuple[str, str]:
        labels = lora_info(metrics, "vllm:lora_requests_info")
        assert labels["max_lora"] == str(CONFIG.max_num_seqs)
        return labels["running_lora_adapters"], labels["waiting_lora_adapters"]

    assert info() == ("", "")
    base, a, again, b, failed = (track(metrics, name) for name in (None, "a", "a", "b", "c"))
    base.record(TOKEN, 101.0)
    assert info() == ("", "a,b,c")
    a.record(TOKEN, 101.0)
    b.record(TOKEN, 101.0)
    assert info() == ("a,b", "c")
    failed.finish("error", 102.0)
    a.finish("stop", 102.0)
    assert info() == ("b", "a")
    again.record(replace(TOKEN, finish_reason="length"), 102.0)
    b.finish("abort", 102.0)
    assert info() == ("", "")


@pytest.mark.parametrize(
    ("num_resident", "used", "expected"),
    [(0, 0, 64), (1, 100, 10), (4, 400, 10), (3, 1000, 3), (1, 1, 64), (1, 1000, 1)],
)
def test_how_many_adapters_can_run(num_resident: int, used: int, expected: int) -> None:
    memory = AdapterMemory(arena_bytes=1000, arena_used_bytes=used, num_resident=num_resident)
    assert max_lora(reading(stats=EngineStats(adapters=memory))) == expected


def test_a_name_that_no_metric_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_info_metric"):
        ServerConfig(lora_info_metric="lora-info")


# A real server


def scrape(server: RunningServer) -> dict[tuple[str, str], float]:
    reply = server.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return samples_of(reply.text)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_real_server(server: RunningServer, tiny_adapters: Mapping[str, str]) -> None:
    before = scrape(server)
    server.complete(model="dense", max_tokens=7, n=2)
    server.complete(max_tokens=5)
    server.wait_until_idle()
    after = scrape(server)

    def grown(name: str, adapter: str = "") -> float:
        return after[name, adapter] - before.get((name, adapter), 0.0)

    assert grown("perft_adapter_generation_tokens_total", "dense") == 14
    assert grown("perft_adapter_generation_tokens_total", BASE_LABEL) == 5
    assert grown("perft_generation_tokens_total") == 19
    assert grown("perft_adapter_inter_token_latency_seconds_count", "dense") == 12
    assert grown("perft_adapter_time_to_first_token_seconds_count", "dense") == 2
    assert grown("perft_request_queue_time_seconds_count") == 3
    assert grown("perft_request_inference_time_seconds_count") == 3
    assert grown("perft_adapter_requests_total", "dense") == 2
    assert grown("perft_request_params_n_sum") == 3
    assert after["perft_num_requests_running", ""] == 0
    assert {adapter for _, adapter in after} <= {"", BASE_LABEL, OTHER_LABEL, *tiny_adapters}
    text = server.http.get("/metrics").text
    assert 'perft_http_requests_total{handler="/v1/completions",method="POST",status="200"}' in text
    assert 'perft_http_request_duration_seconds_count{handler="/v1/completions",method="POST"}' in text


def test_what_a_real_engine_counts(start_server: Callable[..., RunningServer]) -> None:
    """Pages are few, so that prompts push one another out; adapters share an arena, so that they are brought."""
    server = start_server(kv_memory=1 << 17, page_size=4, max_model_len=64)

    def counted() -> bool:
        samples = scrape(server)
        return samples["perft_engine_step_seconds_count", ""] == 5 * samples["perft_engine_steps_total", ""] > 0

    for turn in range(40):
        prompt = [turn + index for index in range(40)]
        for _ in range(2):
            server.complete(prompt=prompt, max_tokens=4, model="routed")
    until(counted)
    samples = scrape(server)
    steps = samples["perft_engine_steps_total", ""]
    assert samples["perft_iteration_tokens_count", ""] == steps
    computed = samples["perft_prompt_tokens_total", ""] - samples["perft_prompt_tokens_cached_total", ""]
    # the last token of a request is never computed
    assert (
        samples["perft_iteration_tokens_sum", ""] == computed + samples["perft_inter_token_latency_seconds_count", ""]
    )
    assert samples["perft_engine_step_seconds_sum", ""] > 0
    assert samples["perft_adapter_load_seconds_count", ""] >= samples["perft_adapter_loads_total", ""] > 0
    for name in ("kv_block_lifetime_seconds", "kv_block_idle_before_evict_seconds", "kv_block_reuse_gap_seconds"):
        assert samples[f"perft_{name}_count", ""] > 0, name
        assert 0 <= samples[f"perft_{name}_sum", ""] < 60 * samples[f"perft_{name}_count", ""]
    assert 0 < samples["perft_adapter_router_entropy_ratio", "routed"] <= 1


def test_requests_that_do_not_get_in_are_counted(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server(ServerConfig(max_open_requests=2))

    def rejections() -> dict[str, float]:
        text = server.http.get("/metrics").text
        pairs = re.findall(r'perft_admission_rejections_total\{reason="(\w+)"\} (\S+)', text)
        return {reason: float(count) for reason, count in pairs}

    assert rejections() == {"busy": 0, "tenant_busy": 0, "too_many": 0, "engine_down": 0, "refused": 0, "internal": 0}
    assert server.post("/v1/completions", {"prompt": "a", "n": 3, "max_tokens": 1}).status_code == 400
    assert rejections()["too_many"] == 1
    server.knobs.set(refuse=(1, 2))
    assert server.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 1}).status_code == 500
    assert rejections()["internal"] == 1
    server.knobs.reset()
    server.knobs.set(pace=0.05)
    with server.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "tiny-mixtral", "prompt": "a", "n": 2, "max_tokens": 50, "stream": True, "ignore_eos": True},
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 503
    assert rejections()["busy"] == 1
    server.knobs.reset()
    server.wait_until_idle()
    server.knobs.set(failure="a bug", start_failure="it cannot be built")
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    until(lambda: server.http.get("/ready").status_code == 503)
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 503
    assert rejections()["engine_down"] == 1


def test_the_processes_are_watched(server: RunningServer) -> None:
    registry = CollectorRegistry()
    Metrics(registry).watch_processes(lambda: server.client.engine_pid)
    ours = registry.get_sample_value("process_resident_memory_bytes")
    if ours is None:
        pytest.skip("what a process uses, only Linux says in /proc")
    theirs = registry.get_sample_value("perft_engine_process_resident_memory_bytes")
    assert theirs
    assert theirs != ours
    assert registry.get_sample_value("perft_engine_process_cpu_seconds_total")
