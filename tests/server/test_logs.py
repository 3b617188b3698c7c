"""Logs: lines that machines read, the id of the request in both processes, and no word of a prompt."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running_server import RunningServer

from perft_serve.engine import logs
from perft_serve.engine.logs import JsonFormatter, TextFormatter, log_to_stderr
from perft_serve.server.config import ServerConfig

SECRET = "hello world nobody knows"


def record(message: str, *args: object, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("perft_serve.test").makeRecord(
        "perft_serve.test", logging.WARNING, "file", 1, message, args, None, extra=extra
    )


def test_text() -> None:
    line = TextFormatter().format(record("%d things", 3, adapter="a", path="/x y", nothing=None, seconds=0.5))
    assert line == 'WARNING: perft_serve.test: 3 things adapter=a path="/x y" seconds=0.5'
    assert "\n" not in TextFormatter().format(record("it", path="/a\nERROR: forged"))
    assert TextFormatter().format(record("up", color_message="\x1b[1mup")) == "WARNING: perft_serve.test: up"


def test_json() -> None:
    entry = json.loads(JsonFormatter().format(record("%s\nthings", "é\ud800", tokens=7, request_id="r-0")))
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "WARNING",
        "logger": "perft_serve.test",
        "message": "é\ud800\nthings",
        "tokens": 7,
        "request_id": "r-0",
    }
    try:
        raise KeyError("why")
    except KeyError:
        failed = logging.LogRecord("l", logging.ERROR, "file", 1, "it failed", (), sys.exc_info())
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert "KeyError: 'why'" in json.loads(line)["exception"]


def test_the_request_of_the_present_task_is_named() -> None:
    token = logs.request_id.set("now")
    try:
        assert json.loads(JsonFormatter().format(record("a")))["request_id"] == "now"
        assert json.loads(JsonFormatter().format(record("a", request_id="other")))["request_id"] == "other"
    finally:
        logs.request_id.reset(token)
    assert "request_id" not in json.loads(JsonFormatter().format(record("a")))


@pytest.fixture
def bare_logging() -> Iterator[logging.Logger]:
    """The root, which is put back; pytest has handlers there while a test runs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_it_is_set_up_once_and_can_be_changed(bare_logging: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    bare_logging.handlers.clear()
    log_to_stderr()
    log_to_stderr("json")
    logging.getLogger("a").info("b")
    assert json.loads(capsys.readouterr().err)["message"] == "b"
    assert len(bare_logging.handlers) == 1


def test_who_has_set_it_up_otherwise_is_left_alone(bare_logging: logging.Logger) -> None:
    theirs = logging.NullHandler()
    bare_logging.handlers[:] = [theirs]
    log_to_stderr("json")
    assert bare_logging.handlers == [theirs]
    assert theirs.formatter is None


def access(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The access log's lines, as JSON has them."""
    entries = [record for record in caplog.records if record.name == "perft_serve.access"]
    return [json.loads(JsonFormatter().format(entry)) for entry in entries]


def wait_for_access(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    """The access log once it has so many lines: they are written when the client has its reply already."""
    end = time.monotonic() + 10
    while len(access(caplog)) < count:
        assert time.monotonic() < end, access(caplog)
        time.sleep(0.01)
    return access(caplog)


def test_the_access_log(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body = {"model": "dense", "prompt": SECRET, "max_tokens": 3, "n": 2, "ignore_eos": True}
    reply = server.http.post("/v1/completions", json=body)
    request_id = reply.headers["x-request-id"]
    server.http.get("/health")
    server.http.get("/v1/models/a%0Ab")
    completion, unknown = wait_for_access(caplog, 2)
    assert completion.pop("seconds") >= completion.pop("first_token_seconds") > 0
    completion.pop("time")
    assert completion == {
        "level": "INFO",
        "logger": "perft_serve.access",
        "message": "answered",
        "request_id": request_id,
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": "dense",
        "adapter": "dense",
        "prompt_tokens": reply.json()["usage"]["prompt_tokens"],
        "completion_tokens": 6,
        "finish_reasons": "length",
    }
    assert (unknown["status"], unknown["path"]) == (404, "/v1/models/a%0Ab")
    assert "model" not in unknown
    assert SECRET not in caplog.text


def test_a_stream_is_logged_when_it_has_ended(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server.knobs.set(pace=0.1)
    body = {"model": "tiny-mixtral", "prompt": SECRET, "max_tokens": 4, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        assert not access(caplog)
        reply.read()
    (entry,) = wait_for_access(caplog, 1)
    assert (entry["completion_tokens"], entry["finish_reasons"], entry["status"]) == (4, "length", 200)
    assert "adapter" not in entry


def test_it_can_be_off(start_server: Callable[..., RunningServer], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    start_server(ServerConfig(access_log="off")).complete(max_tokens=1)
    assert not access(caplog)


def test_the_engine_logs_alike(start_server: Callable[..., RunningServer], capfd: pytest.CaptureFixture[str]) -> None:
    server = start_server(ServerConfig(log_format="json"))
    server.knobs.set(refuse=(1, 2))
    reply = server.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 1})
    assert reply.status_code == 500
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (entry,) = [entry for entry in map(json.loads, lines) if "exception" in entry]
    assert entry["logger"] == "perft_serve.engine.loop"
    assert entry["request_id"].startswith(reply.headers["x-request-id"])
    assert "KeyError: 'a bug'" in entry["exception"]


@pytest.mark.parametrize("setting", [{"log_format": "xml"}, {"access_log": "yes"}])
def test_another_value_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ServerConfig(**setting)
