"""One HTTP request and what came of it: what the access log and the traces say.

In: what `app.Surroundings` sees of it, and the recorders of its engine requests, if it came so far. Out: facts. No prompts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from perft_serve.server.metrics import RequestRecorder
from perft_serve.server.protocol import RequestMetrics

logger = logging.getLogger("perft_serve.access")

# Asked every few seconds by machines: their success is no news.
_PROBES = frozenset(("/health", "/ready", "/metrics"))


class Exchange:
    """One HTTP request.

    Attributes:
        request_id: its id.
        began, began_ns: when it came, by `time.monotonic()` and in nanoseconds since the epoch.
        model: the name that it gave.
        recorders: of its engine requests; empty if there are none, or none yet.
    """

    __slots__ = ("began", "began_ns", "model", "recorders", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.began = time.monotonic()
        self.began_ns = time.time_ns()
        self.model: str | None = None
        self.recorders: Sequence[RequestRecorder] = ()

    def follow(self, model: str, recorders: Sequence[RequestRecorder]) -> None:
        """Its requests go to the engine."""
        self.model = model
        self.recorders = recorders

    @property
    def adapter(self) -> str | None:
        """The adapter that it runs on; `None`: the base, or nothing."""
        ref = self.recorders[0].request.adapter if self.recorders else None
        return None if ref is None else ref.name

    @property
    def num_prompt_tokens(self) -> int:
        """Of all its prompts."""
        return sum(len(each.request.prompt_ids) for each in self.recorders if each.request.choice == 0)

    @property
    def num_tokens(self) -> int:
        """Generated, of all its completions."""
        return sum(each.num_tokens for each in self.recorders)

    @property
    def first_token(self) -> float | None:
        """When the first token of all came (`time.monotonic()`)."""
        return min((each.first_token for each in self.recorders if each.num_tokens), default=None)

    @property
    def metrics(self) -> RequestMetrics | None:
        """Its times, if it is one completion of one prompt: those of several are nobody's."""
        if len(self.recorders) != 1:
            return None
        (recorder,) = self.recorders
        queue, prefill, num_tokens = recorder.queue_seconds, recorder.prefill_seconds, recorder.num_tokens
        decode = recorder.decode_seconds if num_tokens else None
        busy = None if prefill is None or decode is None else prefill + decode
        return RequestMetrics(
            time_to_first_token_ms=_milliseconds(prefill if num_tokens else None),
            generation_time_ms=_milliseconds(decode),
            queue_time_ms=_milliseconds(queue),
            mean_itl_ms=_milliseconds(decode / (num_tokens - 1) if decode is not None and num_tokens > 1 else None),
            tokens_per_second=round(num_tokens / busy, 3) if busy else None,
        )

    def log(self, scope: Any, status: int, seconds: float) -> None:
        """Writes its line of the access log; `status` 0: it was never answered."""
        path = scope["path"]
        level = logging.DEBUG if path in _PROBES and status < 400 else logging.INFO
        if not logger.isEnabledFor(level):
            return
        raw = scope.get("raw_path")  # without what a decoded path could smuggle into a line
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": raw.decode("latin-1") if raw else path.encode("unicode_escape").decode(),
            "status": status,
            "seconds": round(seconds, 6),
        }
        if self.recorders:
            first = self.first_token
            fields |= {
                "model": self.model,
                "adapter": self.adapter,
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_tokens,
                "first_token_seconds": None if first is None else round(first - self.began, 6),
                "finish_reasons": ",".join(sorted({str(each.finish_reason) for each in self.recorders})),
            }
        logger.log(level, "answered", extra=fields)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def exchange_of(request: Request) -> Exchange:
    """The exchange that a request is part of."""
    exchange: Exchange = request.state.exchange
    return exchange
