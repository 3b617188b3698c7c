"""Replies that watch their client: server-sent events, and work that ends when the client hangs up.

In: engine events, and how to write them. Out: ASGI messages. Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from perft_serve.engine.events import TokenEvent
from perft_serve.server.client import EventStream
from perft_serve.server.errors import to_api_error

T = TypeVar("T")

# nginx's status for a client that hung up before it was answered; only logs and metrics see it.
CLIENT_CLOSED_REQUEST = 499


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, None]) -> T:
    """Does `work` as long as the client is there; the request's body must have been read.

    Args:
        others: when one of them ends, the client counts as gone.

    Raises:
        ClientDisconnect: the client has hung up; `work` was cancelled, and has cleaned up after itself.
    """
    task = asyncio.ensure_future(work)
    watchers = [asyncio.ensure_future(each) for each in (_disconnect(receive), *others)]
    try:
        await asyncio.wait((task, *watchers), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(task, *watchers, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Server-sent events made of engine events as they come.

    The reply starts with the first thing there is to send, so what goes wrong before that (no room, an adapter that cannot
    be loaded) still gets a status of its own; after that, an error is an event. While there is nothing, a comment now and then
    says that the server lives. When the client hangs up, what is open is aborted; when it does not take the end of the reply in
    time, that breaks off.

    Args:
        submit: opens the stream of engine events.
        write: the JSON texts to send for a list of engine events.
        close: the JSON texts to send at the end, before `[DONE]`.
        keep_alive: seconds of silence after which a comment is sent; 0: never.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        submit: Callable[[], EventStream],
        write: Callable[[EventStream, Sequence[TokenEvent]], Iterable[str]],
        close: Callable[[], Iterable[str]],
        *,
        keep_alive: float,
    ) -> None:
        # Proxies that buffer replies are asked not to
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._submit = submit
        self._write = write
        self._close = close
        self._keep_alive = keep_alive
        self._started = False
        self._last_sent = 0.0
        self._lock = asyncio.Lock()  # whoever sends holds it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._submit() as events:
            others = [events.overdue()]
            if self._keep_alive:
                others.append(self._send_comments(send))
            try:
                await until_disconnect(receive, self._send_events(events, send), *others)
            except ClientDisconnect:
                if not self._started:
                    await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)

    async def _send_events(self, events: EventStream, send: Send) -> None:
        try:
            async for batch in events:
                data = _encode(self._write(events, batch))
                if data:
                    await self._send(send, data, more=True)
            data = _encode(self._close())
        except Exception as error:  # it becomes an event; what is not a known state of the server is logged there
            if not self._started:
                raise
            data = _encode([json.dumps(to_api_error(error).envelope())])
        await self._send(send, data + b"data: [DONE]\n\n", more=False)

    async def _send_comments(self, send: Send) -> None:
        """Breaks silences, for ever."""
        self._last_sent = time.monotonic()
        while True:
            silence = time.monotonic() - self._last_sent
            if silence < self._keep_alive:
                await asyncio.sleep(self._keep_alive - silence)
            elif self._lock.locked():  # something waits to be taken: it is the client who is silent
                await asyncio.sleep(self._keep_alive)
            else:
                await self._send(send, b": keep-alive\n\n", more=True)

    async def _send(self, send: Send, data: bytes, *, more: bool) -> None:
        async with self._lock:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._last_sent = time.monotonic()


def _encode(texts: Iterable[str]) -> bytes:
    return "".join(f"data: {text}\n\n" for text in texts).encode()
