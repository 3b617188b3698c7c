"""How both processes log: to stderr, as text or as one JSON object a line, with the id of the request that a line is about.

In: records of `logging`; what a caller gives as `extra` becomes fields. Out: lines. No prompt and no completion is ever logged.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The HTTP request that the present task answers."""

# What every record has, and uvicorn's message once more with colours; the rest is what its caller gave as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_PLAIN = re.compile(r"[^\s\"=]+")


def log_to_stderr(log_format: LogFormat = "text") -> None:
    """Sets up this process's logging, or changes its format; whoever has set it up otherwise is left alone."""
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if isinstance(handler, _Handler)]
    if not ours and not root.handlers:
        ours = [_Handler(sys.stderr)]
        root.addHandler(ours[0])
        root.setLevel(logging.INFO)
    for handler in ours:
        handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())


class TextFormatter(logging.Formatter):
    """`LEVEL: logger: message`, then the fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s: %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_as_text(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(logging.Formatter):
    """An object: `time` (ISO 8601, UTC), `level`, `logger`, `message`, the fields, and `exception` with the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, to be told from others."""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What is known besides the message."""
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD and value is not None}
    if "request_id" not in fields and (current := request_id.get()) is not None:
        fields["request_id"] = current
    return fields


def _as_text(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
