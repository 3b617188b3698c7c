"""One client's connection: uvicorn's HTTP/1.1 with its own replies in our envelope, and an end to requests that never end.

In: bytes. Out: requests for the application. What is no HTTP, or has a head that is too long, is answered here, for no
application will see it; a request that does not come whole in time loses its connection. It knows no routes.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from perft_serve.server.config import ServerConfig
from perft_serve.server.errors import ApiError
from perft_serve.server.service import new_request_id

# The application answers a body that does not come in time; so long after that, what is left of the connection is closed.
_LINGER_SECONDS = 5.0
_TOO_LONG = ApiError(431, "the request line and headers are longer than this server's limit")
_END_OF_HEAD = re.compile(rb"\n\r?\n")


def uvicorn_config(app: Any, config: ServerConfig, refused: Callable[[int], None]) -> uvicorn.Config:
    """How uvicorn is to serve an application.

    Args:
        refused: told the status of each reply that is given without the application.
    """
    return uvicorn.Config(
        app,
        http=partial(Connection, receive_timeout=config.receive_timeout, refused=refused),  # type: ignore[arg-type]
        ws="none",
        h11_max_incomplete_event_size=config.max_header_size,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.shutdown_timeout,
    )


class Connection(H11Protocol):
    """A connection.

    Args:
        receive_timeout: seconds that the head of a request may take, and then its body.
        refused: see `uvicorn_config`.
    """

    def __init__(self, *args: Any, receive_timeout: float, refused: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._refused = refused
        self._awaited: object = None  # the state of a client who has not sent all of its request
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and self._is_too_long(data):
            self._refuse(_TOO_LONG)
            return
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's reply to what is no HTTP; it calls this while it handles h11's error."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(_TOO_LONG if status == 431 else ApiError(status, f"this is not HTTP/1.1: {error or msg}"))

    def _is_too_long(self, data: bytes) -> bool:
        """Whether a head is, of which `data` is a part. (h11 looks only at those that are not whole yet.)"""
        limit = self.config.h11_max_incomplete_event_size
        begun = self.conn.trailing_data[0]
        if limit is None or len(begun) + len(data) <= limit:
            return False
        return _END_OF_HEAD.search((begun + data)[: limit + 4]) is None

    def _watch(self) -> None:
        """Sees to it that a request which has not come whole is waited for, but not for ever."""
        state = self.conn.their_state
        if state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._stop_timer()
        elif state is not self._awaited:
            self._stop_timer()
            self._awaited = state
            seconds = self._receive_timeout + (_LINGER_SECONDS if state is h11.SEND_BODY else 0.0)
            self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop_timer(self) -> None:
        self._awaited = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(ApiError(408, f"the request has not come whole within {self._receive_timeout:g} seconds"))
        else:  # nothing was asked, or the application has had its say
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Replies without the application, and closes the connection."""
        if self.cycle is not None:  # it may be waiting for a body that is no HTTP
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reply = error.response()
            headers = [*reply.raw_headers, (b"x-request-id", new_request_id().encode()), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=bytes(reply.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self._refused(error.status)
        self.transport.close()
