"""What the HTTP side is told at its start; `perft-serve serve` has an option for each field here and in `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    max_open_requests: int = field(
        default=1024, metadata={"help": "The most completions running or waiting; more are refused with 503."}
    )
    max_adapter_labels: int = field(
        default=100, metadata={"help": "The most adapters that have metrics of their own; the rest share one label."}
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

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        for name in ("max_body_size", "max_open_requests", "engine_heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_adapter_labels", "shutdown_timeout", "engine_restarts", "engine_step_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
