"""A real server in this process: uvicorn on a free port, in a thread, with a real engine on the tiny base."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from prometheus_client import CollectorRegistry

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineStats, TokenEvent
from perft_serve.server.app import build_app
from perft_serve.server.client import EngineClient
from perft_serve.server.config import ServerConfig
from perft_serve.server.metrics import Metrics
from perft_serve.text import load_tokenizer

BASE = "tiny-mixtral"


class PacedEngine(Engine):
    """The engine, whose steps can be made slow, or fail."""

    pace = 0.0
    failure: Exception | None = None

    def step(self) -> list[TokenEvent]:
        time.sleep(self.pace)
        if self.failure is not None:
            raise self.failure
        return super().step()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningServer:
    """A server that answers."""

    url: str
    client: EngineClient
    engine: PacedEngine
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
        """Waits until nothing runs and no page is in use."""
        self.wait_until(lambda stats: (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0))


@contextmanager
def running_server(engine_config: EngineConfig, config: ServerConfig) -> Iterator[RunningServer]:
    """Runs a server as long as the block."""
    engines: list[PacedEngine] = []

    def build() -> Engine:
        engines.append(PacedEngine(engine_config))
        return engines[0]

    metrics = Metrics(CollectorRegistry(), max_adapter_labels=config.max_adapter_labels)
    client = EngineClient(build, metrics=metrics, max_open_requests=config.max_open_requests)
    client.start()
    metrics.watch_engine(client.stats)
    tokenizer = load_tokenizer(engine_config.model)
    app = build_app(client, tokenizer, metrics, config, base_name=BASE, version="0.0.0")
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2, lifespan="off")
    )
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{host}:{port}"
        with httpx.Client(base_url=url, timeout=30) as http:
            yield RunningServer(url=url, client=client, engine=engines[0], http=http)
    finally:
        server.should_exit = True
        thread.join()
        client.close()
