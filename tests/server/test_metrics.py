"""Metrics: their names and definitions, labels that stay few, and what a real server reports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterMemory
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineRequest, EngineStats, Timing, TokenEvent
from perft_serve.engine.params import SamplingParams
from perft_serve.server.client import EngineClient
from perft_serve.server.config import ServerConfig
from perft_serve.server.metrics import BASE_LABEL, OTHER_LABEL, EngineReading, Metrics


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """(name, adapter) to value, summed over other labels but `le`."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                key = (sample.name, sample.labels.get("adapter", ""))
                found[key] = found.get(key, 0.0) + sample.value
    return found


def request(adapter: str | None, *, arrival: float = 100.0) -> EngineRequest:
    ref = None if adapter is None else AdapterRef(name=adapter, source="somewhere")
    return EngineRequest(request_id="r", prompt_ids=(1, 2, 3), params=SamplingParams(), adapter=ref, arrival=arrival)


def test_the_adapter_label_takes_few_values() -> None:
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=2)
    labels = [metrics.adapter_label(name) for name in (None, "a", "b", "c", "d", "a", None)]
    assert labels == [BASE_LABEL, "a", "b", OTHER_LABEL, OTHER_LABEL, "a", BASE_LABEL]
    for index in range(1000):
        metrics.track(request(f"adapter-{index}")).finish("stop", 101.0)
    adapters = {adapter for _, adapter in samples_of(metrics.render().decode())}
    assert adapters == {OTHER_LABEL}, "both labels are taken, by adapters that were never used"


def test_a_requests_life_in_numbers() -> None:
    metrics = Metrics(CollectorRegistry())
    recorder = metrics.track(request("a"))
    timing = Timing(arrival=100.0, scheduled=100.25, first_token=100.75)
    recorder.record(TokenEvent(request_id="r", token_id=7, timing=timing, num_cached_tokens=2), 101.0)
    recorder.record(TokenEvent(request_id="r", token_id=8), 101.5)
    recorder.record(TokenEvent(request_id="r", token_id=9, finish_reason="length"), 103.0)
    samples = samples_of(metrics.render().decode())
    expected = {
        "perft_time_to_first_token_seconds": (1, 1.0),
        "perft_inter_token_latency_seconds": (2, 2.0),
        "perft_e2e_request_latency_seconds": (1, 3.0),
        "perft_request_queue_time_seconds": (1, 0.25),
        "perft_request_prefill_time_seconds": (1, 0.5),
        "perft_request_decode_time_seconds": (1, 2.0),
        "perft_request_prompt_tokens": (1, 3.0),
        "perft_request_generation_tokens": (1, 3.0),
    }
    for name, (count, total) in expected.items():
        assert samples[f"{name}_count", "a"] == count, name
        assert samples[f"{name}_sum", "a"] == pytest.approx(total), name
    assert samples["perft_prompt_tokens_total", "a"] == 3
    assert samples["perft_prompt_tokens_cached_total", "a"] == 2
    assert samples["perft_generation_tokens_total", "a"] == 3
    assert samples["perft_request_success_total", "a"] == 1


def test_inter_token_latency_has_buckets_from_a_millisecond() -> None:
    registry = CollectorRegistry()
    recorder = Metrics(registry).track(request(None))
    recorder.record(TokenEvent(request_id="r", token_id=7), 100.0)
    recorder.record(TokenEvent(request_id="r", token_id=8), 100.0015)
    labels = {"adapter": BASE_LABEL}
    bucket = "perft_inter_token_latency_seconds_bucket"
    assert registry.get_sample_value(bucket, {**labels, "le": "0.001"}) == 0
    assert registry.get_sample_value(bucket, {**labels, "le": "0.002"}) == 1


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
        load_seconds=0.5,
    )
    stats = EngineStats(
        num_running=1,
        num_waiting=2,
        kv_usage=0.5,
        num_preemptions=3,
        num_steps=4,
        prefix_queries=80,
        prefix_hits=64,
        adapters=memory,
    )
    reading = EngineReading(stats=stats, is_up=True, num_restarts=1, num_adapters=10_000)
    readings = [reading, replace(reading, stats=replace(stats, num_running=7), is_up=False)]
    metrics.watch_engine(lambda: readings.pop())
    expected = {
        "engine_up": 0,
        "engine_restarts_total": 1,
        "engine_steps_total": 4,
        "num_requests_running": 7,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.5,
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
        "adapter_load_seconds_total": 0.5,
        "adapter_evictions_total": 7,
    }
    assert samples_of(metrics.render().decode()) == {(f"perft_{name}", ""): value for name, value in expected.items()}
    samples = samples_of(metrics.render().decode())
    assert samples["perft_engine_up", ""] == 1
    assert samples["perft_num_requests_running", ""] == 1


def test_a_scrape_stays_cheap_with_ten_thousand_adapters(tmp_path: Path) -> None:
    for index in range(10_000):
        (tmp_path / f"adapter-{index}").mkdir()
        (tmp_path / f"adapter-{index}" / "adapter_config.json").touch()
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=100)
    client = EngineClient(EngineConfig(model="none", adapter_dir=str(tmp_path)), ServerConfig(), metrics)  # not started
    for index in range(10_000):
        metrics.track(request(f"adapter-{index}")).finish("stop", 101.0)
    text = metrics.render().decode()
    assert samples_of(text)["perft_adapters_registered", ""] == 10_000
    assert len(text.splitlines()) < 102 * 220, "series for each adapter"
    start = time.perf_counter()
    for _ in range(5):
        client._read()
    assert time.perf_counter() - start < 0.5


def test_a_real_server(server: RunningServer, tiny_adapters: Mapping[str, str]) -> None:
    def samples() -> dict[tuple[str, str], float]:
        reply = server.http.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        return samples_of(reply.text)

    before = samples()
    server.complete(model="dense", max_tokens=7, n=2)
    server.complete(max_tokens=5)
    after = samples()

    def grown(name: str, adapter: str) -> float:
        return after[name, adapter] - before.get((name, adapter), 0.0)

    assert grown("perft_generation_tokens_total", "dense") == 14
    assert grown("perft_generation_tokens_total", BASE_LABEL) == 5
    assert grown("perft_inter_token_latency_seconds_count", "dense") == 12
    assert grown("perft_time_to_first_token_seconds_count", "dense") == 2
    assert grown("perft_request_queue_time_seconds_count", "dense") == 2
    assert grown("perft_request_success_total", "dense") == 2
    assert after["perft_num_requests_running", ""] == 0
    assert {adapter for _, adapter in after} <= {"", BASE_LABEL, *tiny_adapters}
    assert 'perft_http_requests_total{handler="/v1/completions",status="200"}' in server.http.get("/metrics").text
