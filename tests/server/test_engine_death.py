"""What clients and operators see when the engine's process dies: over real HTTP, with the real engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from replies import assert_error, events_of
from running_server import BASE, RunningServer

from perft_serve.server.config import ServerConfig

COMPLETIONS = "/v1/completions"
LONG = {"model": BASE, "prompt": "hello", "max_tokens": 200, "ignore_eos": True}


def test_a_killed_engine_is_replaced_and_nothing_registered_is_lost(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server(ServerConfig(engine_restarts=1))
    text = server.complete(model="routed")["choices"][0]["text"]
    assert server.http.post("/v1/adapters", json={"name": "routed", "pin": True}).json()["pinned"]
    server.knobs.set(pace=0.02)

    with ThreadPoolExecutor() as pool:
        whole = pool.submit(server.http.post, COMPLETIONS, json={**LONG, "model": "dense"})
        with server.http.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.wait_until(lambda stats: stats.num_running == 2)
            assert server.client.engine_pid is not None
            os.kill(server.client.engine_pid, signal.SIGKILL)
            start = time.monotonic()
            events = events_of("\n\n".join(line for line in lines if line) + "\n\n")
        refused = whole.result()
    assert time.monotonic() - start < 2
    assert events[-1]["error"]["code"] == 503
    assert "being restarted, try again" in events[-1]["error"]["message"]
    assert_error(refused, 503, "being restarted")
    assert int(refused.headers["retry-after"]) >= 1

    health, ready = server.http.get("/health"), server.http.get("/ready")
    assert health.status_code == 200
    assert set(health.json()) == {"engine", "restarts", "error"}
    assert health.json()["engine"] == ready.json()["engine"] == "restarting"
    assert "SIGKILL" in health.json()["error"]
    assert ready.status_code == 503
    assert int(ready.headers["retry-after"]) >= 1
    for body in (LONG, {**LONG, "stream": True}):
        assert_error(server.http.post(COMPLETIONS, json=body), 503, "being restarted")
    assert "perft_engine_up 0.0" in server.http.get("/metrics").text
    assert len(server.http.get("/v1/models").json()["data"]) == 5

    server.knobs.reset()
    server.wait_until_ready()
    assert server.http.get("/ready").json() == {"engine": "ready", "restarts": 1, "error": None}
    assert server.complete(model="routed")["choices"][0]["text"] == text
    card = server.http.get("/v1/adapters/routed").json()
    assert (card["state"], card["pinned"]) == ("resident", True)
    metrics = server.http.get("/metrics").text
    assert "perft_engine_up 1.0" in metrics
    assert "perft_engine_restarts_total 1.0" in metrics


def test_a_failing_engine_fails_its_requests_and_when_given_up_the_health_check(
    start_server: Callable[..., RunningServer], capfd: pytest.CaptureFixture[str]
) -> None:
    server = start_server(ServerConfig(engine_restarts=0))
    server.knobs.set(pace=0.02)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model=BASE, prompt="hello", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.knobs.set(failure="the device is gone")
        with pytest.raises(openai.APIError, match="the engine has stopped: the engine has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the engine has failed") as caught:
            client.completions.create(model=BASE, prompt="hello")
    assert caught.value.status_code == 503
    assert "retry-after" not in caught.value.response.headers
    for path in ("/health", "/ready"):
        reply = server.http.get(path)
        assert reply.status_code == 503
        assert "retry-after" not in reply.headers
        assert reply.json()["engine"] == "dead"
        assert reply.json()["error"] == "the engine has failed; the log says why"
    assert_error(server.http.post("/v1/adapters", json={"name": "routed"}), 503, "the engine has failed")
    assert server.http.get("/metrics").status_code == 200
    assert server.http.get("/v1/adapters").status_code == 200
    errors = capfd.readouterr().err
    assert "Traceback" in errors
    assert "RuntimeError: the device is gone" in errors
