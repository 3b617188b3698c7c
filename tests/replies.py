"""What an HTTP reply must look like: an error in its envelope, a stream with its end."""

from __future__ import annotations

import json
from typing import Any

import httpx

from perft_serve.server.protocol import ErrorReply


def assert_error(reply: httpx.Response, status: int, *words: str, param: Any = None) -> None:
    """The reply is an error in the envelope, and says these words."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    error = ErrorReply.model_validate(reply.json()).error
    assert error.code == status
    for word in words:
        assert word in error.message, error.message
    assert error.param == param


def events_of(text: str) -> list[Any]:
    """The JSON of each event of a stream, which must end with [DONE]."""
    assert text.endswith("data: [DONE]\n\n")
    parts = text.split("\n\n")[:-1]
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
