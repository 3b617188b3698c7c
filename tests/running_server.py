"""A real server in this process: uvicorn on a free port, in a thread, and a real engine on the tiny base in a process."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from knobs import Knobs
from prometheus_client import CollectorRegistry
from spare_engines import engine_command

from perft_serve.adapters.sources import SourcePolicy
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.events import EngineStats
from perft_serve.server.app import build_app
from perft_serve.server.client import EngineClient
from perft_serve.server.config import ServerConfig
from perft_serve.server.connection import uvicorn_config
from perft_serve.server.metrics import UNKNOWN, Metrics
from perft_serve.server.tracing import Tracing
from perft_serve.text import load_tokenizer

BASE = "tiny-mixtral"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningServer:
    """A server that answers; `knobs` change how its engine behaves."""

    url: str
    client: EngineClient
    knobs: Knobs
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self.http.post(path, json={"model": BASE, **body})

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion of a short prompt, greedy unless told otherwise."""
        reply = self.post("/v1/completions", {"prompt": "hello world", "temperature": 0, "ignore_eos": True, **body})
        assert reply.status_code == 200, reply.text
        completion: dict[str, Any] = reply.json()
        return completion

    def wait_until(self, condition: Callable[[EngineStats], bool]) -> EngineStats:
        """Waits until the engine's state fulfils a condition, for a few seconds at most."""
        end = time.monotonic() + 10
        while not condition(stats := self.client.stats()):
            assert time.monotonic() < end, stats
            time.sleep(0.005)
        return stats

    def wait_until_idle(self) -> None:
        """Waits until nothing runs and no page is held."""
        self.wait_until(lambda stats: (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0))

    def wait_until_ready(self) -> None:
        """Waits until the engine is up (again); building one takes some seconds."""
        end = time.monotonic() + 120
        while (reply := self.http.get("/ready")).status_code != 200:
            assert time.monotonic() < end, reply.text
            time.sleep(0.05)


@contextmanager
def running_server(
    engine_config: EngineConfig, config: ServerConfig, tracing: Tracing | None = None
) -> Iterator[RunningServer]:
    """Runs a server as long as the block."""
    with tempfile.TemporaryDirectory() as folder:
        knobs = Knobs(Path(folder) / "knobs.json")
        metrics = Metrics(CollectorRegistry(), max_adapter_labels=config.max_adapter_labels)
        client = EngineClient(engine_config, config, metrics, command=engine_command(knobs))
        try:
            client.start()
            tokenizer = load_tokenizer(engine_config.model)
            sources = SourcePolicy(allowed=config.allow_adapter_sources, adapter_dir=engine_config.adapter_dir)
            app = build_app(
                client,
                tokenizer,
                metrics,
                config,
                base_name=BASE,
                sources=sources,
                version="0.0.0",
                tracing=tracing,
            )
            wire = uvicorn_config(app, config, lambda status: metrics.count_http(UNKNOWN, UNKNOWN, status))
            with _serving(wire) as url, httpx.Client(base_url=url, timeout=30) as http:
                yield RunningServer(url=url, client=client, knobs=knobs, http=http)
        finally:
            client.close()


@contextmanager
def _serving(config: uvicorn.Config) -> Iterator[str]:
    """Runs uvicorn as long as the block; gives the URL."""
    config.port, config.timeout_graceful_shutdown = 0, 2
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
