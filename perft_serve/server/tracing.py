"""Traces: a span for each request to generate, as OpenTelemetry's conventions for generative AI name things.

In: an `Exchange` that is over, and the `traceparent` that its client sent. Out: spans, to an OTLP collector over HTTP. The span
is made when the request is over, so that tracing costs nothing before; its phases (queue, prefill, decode) are spans below it.
Lengths that the engine's clock measured are laid before the first token as this process's clock saw it. Prompts are recorded
only if that was asked for. Without the extra `otel` this file can be imported, and `start_tracing` says what is missing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from perft_serve.server.exchange import Exchange
from perft_serve.text import TextTokenizer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# The routes that generate, and what the conventions call that.
OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
# Of a request with more completions than this, the phases of the first ones are recorded.
MAX_DETAILED = 8
PROVIDER = "perft"


def start_tracing(
    endpoint: str, *, version: str, tokenizer: TextTokenizer | None = None, with_prompts: bool = False
) -> Tracing:
    """Tracing to a collector.

    Args:
        endpoint: the whole URL that takes traces, such as `http://localhost:4318/v1/traces`.
        version: of this project.
        tokenizer: makes text of prompts, if they are recorded.
        with_prompts: record prompts.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(
            f'otlp_traces_endpoint needs OpenTelemetry: pip install "perft-serve[otel]" ({error})'
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "perft-serve", "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider, tokenizer=tokenizer if with_prompts else None)


class Tracing:
    """Makes spans.

    Args:
        provider: where they go.
        tokenizer: prompts are recorded, as the text that it makes of them; `None`: they are not.
    """

    def __init__(self, provider: TracerProvider, *, tokenizer: TextTokenizer | None = None) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("perft_serve")
        self._propagator = TraceContextTextMapPropagator()
        self._tokenizer = tokenizer

    def record(self, scope: Any, exchange: Exchange, handler: str, status: int, seconds: float) -> None:
        """A request on one of `OPERATIONS` is over.

        Args:
            handler: its route.
            status: HTTP status of the reply; 0: there was none.
            seconds: from its arrival to its end.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = self._propagator.extract(headers)
        operation = OPERATIONS[handler]
        span = self._tracer.start_span(
            operation if exchange.model is None else f"{operation} {exchange.model}",
            context,
            kind=SpanKind.SERVER,
            start_time=exchange.began_ns,
            attributes={
                "http.request.method": scope["method"],
                "http.route": handler,
                "http.response.status_code": status,
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": PROVIDER,
                "perft.request.id": exchange.request_id,
            },
        )
        failed = status == 0 or status >= 500
        if span.is_recording() and exchange.recorders:
            span.set_attributes(self._attributes(exchange, operation))
            self._record_phases(exchange, span)
            failed = failed or any(each.finish_reason == "error" for each in exchange.recorders)
        if failed:
            span.set_attribute("error.type", str(status) if status >= 500 else "engine" if status else "disconnected")
            span.set_status(Status(StatusCode.ERROR))
        elif status >= 400:
            span.set_attribute("error.type", str(status))
        span.end(exchange.began_ns + round(seconds * 1e9))

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()

    def _attributes(self, exchange: Exchange, operation: str) -> dict[str, Any]:
        first = exchange.recorders[0].request
        params, adapter = first.params, first.adapter
        first_token = exchange.first_token
        prefix = "chatcmpl" if operation == "chat" else "cmpl"
        found = {
            "gen_ai.request.model": exchange.model,
            "gen_ai.response.model": exchange.model,
            "gen_ai.response.id": f"{prefix}-{exchange.request_id}",
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.choice.count": params.n if params.n != 1 else None,
            "gen_ai.usage.input_tokens": exchange.num_prompt_tokens,
            "gen_ai.usage.output_tokens": exchange.num_tokens,
            "gen_ai.usage.cache_read.input_tokens": sum(
                each.num_cached_tokens for each in exchange.recorders if each.request.choice == 0
            ),
            "gen_ai.response.finish_reasons": [str(each.finish_reason) for each in exchange.recorders],
            "gen_ai.response.time_to_first_chunk": None if first_token is None else first_token - exchange.began,
            "perft.adapter.name": None if adapter is None else adapter.name,
            "perft.adapter.version": None if adapter is None else adapter.version,
        }
        if self._tokenizer is not None:
            texts = [
                self._tokenizer.decode(each.request.prompt_ids)
                for each in exchange.recorders
                if each.request.choice == 0
            ]
            found["gen_ai.input.messages"] = json.dumps(
                [{"role": "user", "parts": [{"type": "text", "content": text}]} for text in texts]
            )
        return {name: value for name, value in found.items() if value is not None}

    def _record_phases(self, exchange: Exchange, parent: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)

        def phase(name: str, start: float, end: float, choice: int) -> None:
            span = self._tracer.start_span(
                name, context, start_time=at(start), attributes={"perft.choice": choice} if choice else None
            )
            span.end(at(end))

        def at(moment: float) -> int:
            return exchange.began_ns + round((moment - exchange.began) * 1e9)

        for recorder in exchange.recorders[:MAX_DETAILED]:
            choice, first_token = recorder.request.choice, recorder.first_token
            if not recorder.num_tokens:
                continue
            if recorder.queue_seconds is not None and recorder.prefill_seconds is not None:
                scheduled = first_token - recorder.prefill_seconds
                phase("queue", scheduled - recorder.queue_seconds, scheduled, choice)
                phase("prefill", scheduled, first_token, choice)
            phase("decode", first_token, recorder.last_token, choice)
