"""What the HTTP side is told at its start; `perft-serve serve` has an option for each field here and in `EngineConfig`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import get_args

from perft_serve.engine.logs import LogFormat
from perft_serve.server.keys import AdapterAccess, parse_keys

_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Settings of one server; `metadata["help"]` of each field is its help text on the command line.

    Raises:
        ValueError: a value is out of its range.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all interfaces."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 picks a free one."})
    served_model_name: str | None = field(
        default=None, metadata={"help": "The base's name in requests (default: its Hub id, or its folder's name)."}
    )
    max_body_size: int = field(
        default=16 << 20, metadata={"help": "The longest request body (bytes, or 512K, 16M, ...).", "unit": "bytes"}
    )
    max_header_size: int = field(
        default=16 << 10,
        metadata={"help": "The longest request line and headers together (bytes, or 16K, ...).", "unit": "bytes"},
    )
    receive_timeout: int = field(
        default=60, metadata={"help": "Seconds that a client may take to send a request's head, and then its body."}
    )
    max_open_requests: int = field(
        default=1024, metadata={"help": "The most completions running or waiting; more are refused with 503."}
    )
    max_tenant_requests: int = field(
        default=0,
        metadata={
            "help": "The most completions of one tenant running or waiting; more are refused with 429. 0: no bound."
        },
    )
    stream_keep_alive: int = field(
        default=15,
        metadata={
            "help": "Seconds without anything to send after which a stream sends a comment, so that nobody on the way takes it "
            "for dead; 0: never."
        },
    )
    max_routed_tokens: int = field(
        default=4096,
        metadata={
            "help": "The most tokens, prompts and completions together, that a request with return_routing may have; 0: none."
        },
    )
    tool_call_parser: str = field(
        default="auto",
        metadata={
            "help": "How the model writes tool calls: hermes (Qwen, Hermes, SmolLM), mistral (Mixtral, Mistral), or auto: as "
            "its chat template shows.",
            "choices": ("auto", "hermes", "mistral"),
        },
    )
    per_request_metrics: str = field(
        default="off",
        metadata={
            "help": "on or off: replies carry their request's times (metrics), as vLLM's do with --enable-per-request-metrics.",
            "choices": ("on", "off"),
        },
    )
    max_adapter_labels: int = field(
        default=50,
        metadata={"help": "The most adapters that have metrics of their own, by traffic; the rest share one label."},
    )
    adapter_labels: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "An adapter that has metrics of its own whatever its traffic; may be given several times.",
            "option": "adapter-label",
            "metavar": "NAME",
        },
    )
    lora_info_metric: str = field(
        default="perft_lora_requests_info",
        metadata={
            "help": "Name of the gauge from which Kubernetes' inference gateway learns which adapters run here "
            "(its own default is vllm:lora_requests_info)."
        },
    )
    shutdown_timeout: int = field(
        default=30, metadata={"help": "Seconds that requests in flight may still take after a signal to stop."}
    )

    engine_restarts: int = field(
        default=3,
        metadata={
            "help": "How often the engine is restarted when it dies or hangs; five minutes without failure count anew."
        },
    )
    engine_heartbeat_timeout: int = field(
        default=10, metadata={"help": "Seconds of silence after which the engine's process counts as hanging."}
    )
    engine_step_timeout: int = field(
        default=600,
        metadata={"help": "Seconds that one step of the engine may take before it counts as hanging; 0: any."},
    )
    allow_adapter_sources: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Clients may have adapters loaded from sources that begin with this; may be given several times. "
            "Without it, from nowhere but --adapter-dir.",
            "option": "allow-adapter-source",
            "metavar": "PREFIX",
        },
    )

    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={
            "help": "A key that requests must have: KEY, the operator's, or TENANT:KEY, which opens everything but adapters' "
            "administration and metrics; may be given several times. Also taken from PERFT_API_KEYS, separated by commas.",
            "option": "api-key",
            "metavar": "[TENANT:]KEY",
            "environ": "PERFT_API_KEYS",
        },
    )
    tenant_adapters: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Adapters that a tenant may use: TENANT=PATTERN, a name or a glob (acme=acme-*); may be given several "
            "times. TENANT= is the base only; a tenant without any may use all. Also taken from PERFT_TENANT_ADAPTERS, "
            "separated by commas.",
            "option": "tenant-adapters",
            "metavar": "TENANT=PATTERN",
            "environ": "PERFT_TENANT_ADAPTERS",
        },
    )
    allowed_origins: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "An origin (https://example.org) whose pages may call this server, or *; may be given several times.",
            "option": "allowed-origins",
            "metavar": "ORIGIN",
        },
    )
    log_format: LogFormat = field(
        default="text",
        metadata={"help": "text or json: how server and engine log, to stderr.", "choices": get_args(LogFormat)},
    )
    access_log: str = field(
        default="on",
        metadata={"help": "on or off: log a line for each request that was answered.", "choices": ("on", "off")},
    )

    otlp_traces_endpoint: str | None = field(
        default=None,
        metadata={
            "help": "URL that takes OpenTelemetry traces over HTTP, such as http://localhost:4318/v1/traces (default: no "
            "traces); needs the extra otel."
        },
    )
    trace_prompts: str = field(
        default="off", metadata={"help": "on or off: traces carry the prompts' text.", "choices": ("on", "off")}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if self.tool_call_parser not in ("auto", "hermes", "mistral"):
            raise ValueError(f"tool_call_parser must be auto, hermes or mistral, got {self.tool_call_parser!r}")
        AdapterAccess(self.tenant_adapters, set(parse_keys(self.api_keys).values()))
        at_least_1 = (
            "max_body_size",
            "max_header_size",
            "max_open_requests",
            "receive_timeout",
            "engine_heartbeat_timeout",
        )
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            *("max_routed_tokens", "max_adapter_labels", "shutdown_timeout", "engine_restarts", "engine_step_timeout"),
            *("max_tenant_requests", "stream_keep_alive"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.log_format not in get_args(LogFormat):
            raise ValueError(f"log_format must be 'text' or 'json', got {self.log_format!r}")
        for name in ("access_log", "trace_prompts", "per_request_metrics"):
            if getattr(self, name) not in ("on", "off"):
                raise ValueError(f"{name} must be 'on' or 'off', got {getattr(self, name)!r}")
        if self.trace_prompts == "on" and self.otlp_traces_endpoint is None:
            raise ValueError("trace_prompts needs otlp_traces_endpoint")
        if self.otlp_traces_endpoint is not None and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint must be an http URL, got {self.otlp_traces_endpoint!r}")
        if _METRIC_NAME.fullmatch(self.lora_info_metric) is None:
            raise ValueError(f"lora_info_metric must be the name of a metric, got {self.lora_info_metric!r}")
