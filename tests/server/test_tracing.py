"""Traces: what a span says of a request, whose child it is, and that a collector gets it."""

from __future__ import annotations

import gzip
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from running_server import BASE, RunningServer, running_server

from perft_serve.engine.config import EngineConfig
from perft_serve.server.config import ServerConfig
from perft_serve.server.tracing import Tracing, start_tracing
from perft_serve.text import load_tokenizer

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

PROMPT = "hello world nobody knows"
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """A server, and the spans that it has made."""

    def __init__(self, server: RunningServer, exporter: InMemorySpanExporter) -> None:
        self.server = server
        self._exporter = exporter

    def spans(self, number: int) -> dict[str, ReadableSpan]:
        """By name, once there are so many; then they are forgotten."""
        end = time.monotonic() + 10
        while len(spans := self._exporter.get_finished_spans()) < number:
            assert time.monotonic() < end, [span.name for span in spans]
            time.sleep(0.01)
        self._exporter.clear()
        found = {span.name: span for span in spans}
        assert len(found) == number, list(found)
        return found


@pytest.fixture(scope="module", params=[False, True], ids=["without prompts", "with prompts"])
def traced(engine_config: EngineConfig, request: pytest.FixtureRequest) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider, tokenizer=load_tokenizer(engine_config.model) if request.param else None)
    with running_server(engine_config, ServerConfig(), tracing) as server:
        yield Traced(server, exporter)


def test_a_request_and_its_phases(traced: Traced, request: pytest.FixtureRequest) -> None:
    started = time.time_ns()
    reply = traced.server.http.post(
        "/v1/completions",
        json={
            "model": "dense",
            "prompt": PROMPT,
            "max_tokens": 5,
            "temperature": 0.5,
            "seed": 3,
            "ignore_eos": True,
        },
        headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"},
    )
    spans = traced.spans(4)
    span = spans.pop("text_completion dense")
    attributes = dict(span.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0  # type: ignore[operator]
    messages = attributes.pop("gen_ai.input.messages", None)
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "perft",
        "gen_ai.request.model": "dense",
        "gen_ai.response.model": "dense",
        "gen_ai.response.id": reply.json()["id"],
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": reply.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "perft.adapter.name": "dense",
        "perft.adapter.version": 1,
        "perft.request.id": reply.headers["x-request-id"],
    }
    if "with prompts" in request.node.name:
        ((message,),) = [json.loads(str(messages))]
        assert message["role"] == "user"
        assert PROMPT in message["parts"][0]["content"]
    else:
        assert messages is None
        assert PROMPT not in span.to_json()
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == SPAN_ID
    times = [spans["queue"].start_time]
    for phase in ("queue", "prefill", "decode"):
        child = spans[phase]
        assert child.parent is not None
        assert child.parent.span_id == span.context.span_id
        assert child.start_time == times[-1]
        times.append(child.end_time)
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    assert started <= (span.start_time or 0) <= (times[-1] or 0) <= (span.end_time or 0) <= time.time_ns()


def test_a_stream_and_a_chat(traced: Traced) -> None:
    body = {
        "model": BASE,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "stream": True,
        "ignore_eos": True,
    }
    reply = traced.server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    span = traced.spans(4)[f"chat {BASE}"]
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert str(attributes["gen_ai.response.id"]).startswith("chatcmpl-")
    assert "perft.adapter.name" not in attributes
    assert span.parent is None, "nobody sent a traceparent"


def test_what_goes_wrong(traced: Traced) -> None:
    assert traced.server.post("/v1/completions", {"prompt": "a", "no such field": 1}).status_code == 400
    (span,) = traced.spans(1).values()
    assert (span.name, span.status.status_code) == ("text_completion", StatusCode.UNSET)
    assert dict(span.attributes or {})["error.type"] == "400"
    traced.server.knobs.set(spoil="it is broken")
    assert traced.server.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 500
    traced.server.knobs.reset()
    (span,) = traced.spans(1).values()
    assert (span.name, span.status.status_code) == (f"text_completion {BASE}", StatusCode.ERROR)
    assert dict(span.attributes or {})["error.type"] == "500"
    assert traced.server.http.get("/v1/models").status_code == 200
    traced.server.wait_until_idle()
    traced.spans(0)


class Collector(HTTPServer):
    """Takes traces over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[Any] = []
        self.paths: list[str] = []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.append(self.path)
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_collector_gets_them(engine_config: EngineConfig) -> None:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
            tracing = start_tracing(endpoint, version="1.2.3")
            with running_server(engine_config, ServerConfig(), tracing) as server:
                server.complete(max_tokens=2)
                server.wait_until_idle()
            tracing.close()
        finally:
            collector.shutdown()
            thread.join()
    assert set(collector.paths) == {"/v1/traces"}
    spans = [
        span.name
        for message in collector.received
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert sorted(spans) == ["decode", "prefill", "queue", f"text_completion {BASE}"]
    resource = {
        each.key: each.value.string_value for each in collector.received[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "perft-serve"
    assert resource["service.version"] == "1.2.3"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"perft-serve\[otel\]"):
        start_tracing("http://127.0.0.1:1", version="1")


@pytest.mark.parametrize(
    "settings", [{"otlp_traces_endpoint": "localhost:4317"}, {"trace_prompts": "on"}, {"trace_prompts": "yes"}]
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="trace"):
        ServerConfig(**settings)  # type: ignore[arg-type]
