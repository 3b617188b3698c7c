"""Servers for the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer, running_server

from perft_serve.engine.config import EngineConfig
from perft_serve.server.config import ServerConfig


@pytest.fixture(scope="session")
def engine_config(tiny_base: Path, tiny_adapters: Mapping[str, str]) -> EngineConfig:
    return EngineConfig(
        model=str(tiny_base), adapters=dict(tiny_adapters), dtype="float32", device="cpu", kv_memory=1 << 22
    )


@pytest.fixture
def start_server(engine_config: EngineConfig) -> Iterator[Callable[..., RunningServer]]:
    """Starts a server of the test's own: settings of `EngineConfig` by name, `config` for the HTTP side."""
    with ExitStack() as stack:

        def start(config: ServerConfig | None = None, **settings: Any) -> RunningServer:
            return stack.enter_context(running_server(replace(engine_config, **settings), config or ServerConfig()))

        yield start


@pytest.fixture(scope="session")
def shared_server(engine_config: EngineConfig) -> Iterator[RunningServer]:
    with running_server(engine_config, ServerConfig(max_body_size=64 << 10, max_open_requests=64)) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The server that most tests share; each must leave it idle and healthy."""
    yield shared_server
    shared_server.knobs.reset()
    shared_server.wait_until_idle()
    assert shared_server.http.get("/health").status_code == 200
