"""What clients do to a connection: no HTTP at all, endless heads, bodies that never come. Raw sockets against a real server."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

import httpx
import pytest
from replies import assert_error
from running_server import RunningServer

from perft_serve.server.config import ServerConfig

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def talk(server: RunningServer, *parts: bytes, pause: float = 0.0) -> httpx.Response | None:
    """Sends parts, and reads until the server closes the connection: its reply, if there is one."""
    with socket.create_connection(server.address, timeout=20) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except ConnectionError:
                break
            time.sleep(pause)
        received = b""
        try:
            while data := connection.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass
    if not received:
        return None
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"hello\r\n\r\n", 400, "not HTTP"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "not HTTP"),  # TLS
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400, "not HTTP"),
        (HEAD + b"content-length: -1\r\n\r\n", 400, "Content-Length"),
        (HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\n", 400, "Content-Length"),
        (HEAD + b"transfer-encoding: gzip\r\n\r\n", 501, "not HTTP"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "not HTTP"),
        (b"GET /health?" + b"x" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431, "longer than"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\ncookie: " + b"x" * 20_000, 431, "longer than"),
    ],
)
def test_what_the_application_never_sees_has_the_envelope(
    server: RunningServer, data: bytes, status: int, words: str
) -> None:
    counted = f'perft_http_requests_total{{handler="<unknown>",method="<unknown>",status="{status}"}} '

    def count() -> float:
        match = re.search(re.escape(counted) + r"(\S+)", server.http.get("/metrics").text)
        return float(match[1]) if match else 0.0

    before = count()
    reply = talk(server, data)
    assert reply is not None
    assert_error(reply, status, words)
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert "server" not in reply.headers
    assert count() == before + 1


def test_no_upgrades(server: RunningServer) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "x"}
    assert server.http.get("/health", headers=headers).status_code == 200


class TestSlowness:
    @pytest.fixture
    def impatient(self, start_server: Callable[..., RunningServer]) -> RunningServer:
        return start_server(ServerConfig(receive_timeout=1), max_num_seqs=4)

    def test_a_head_that_does_not_come(self, impatient: RunningServer) -> None:
        start = time.monotonic()
        reply = talk(impatient, *[b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 40], pause=0.1)
        assert reply is not None
        assert_error(reply, 408, "within 1 seconds")
        assert time.monotonic() - start < 6
        assert talk(impatient) is None  # nothing asked, nothing said

    def test_a_second_head_that_does_not_come(self, impatient: RunningServer) -> None:
        with socket.create_connection(impatient.address, timeout=10) as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in connection.recv(1 << 16)
            connection.sendall(b"GET /version HTTP/1.1\r\n")
            assert b"408" in connection.recv(1 << 16)

    def test_a_body_that_does_not_come(self, impatient: RunningServer) -> None:
        start = time.monotonic()
        reply = talk(impatient, HEAD + b"content-length: 100\r\n\r\n", *[b"{" for _ in range(30)], pause=0.1)
        assert reply is not None
        assert_error(reply, 408, "the body has not come whole within 1 seconds")
        assert time.monotonic() - start < 6

    def test_a_body_that_nobody_waits_for(self, impatient: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reply is given; what is left to come may not hold the connection."""
        monkeypatch.setattr("perft_serve.server.connection._LINGER_SECONDS", 0.2)
        start = time.monotonic()
        parts = [b"GET /version HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n", *[b"x"] * 50]
        reply = talk(impatient, *parts, pause=0.1)
        assert reply is not None
        assert reply.status_code == 200
        assert time.monotonic() - start < 6

    def test_generating_may_take_longer(self, impatient: RunningServer) -> None:
        impatient.knobs.set(pace=0.3)
        body = json.dumps({"model": "tiny-mixtral", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}).encode()
        reply = talk(impatient, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        assert reply is not None
        assert reply.json()["usage"]["completion_tokens"] == 8
