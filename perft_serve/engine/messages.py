"""What the two processes say to each other: the front gives commands, the engine gives reports.

Each message is a small tagged struct around the engine's own plain data, as MessagePack; nothing is ever unpickled. What does
not decode to exactly one of these types is refused whole. Plain Python: knows no sockets and no torch.

A conversation: `Start`, then `Started` (or `StartFailed`, the end); then commands and `StepOutput`s as they come, with
`Heartbeat`s between them; then `Stop`, or `Failed`.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import EngineCounts
from perft_serve.engine.events import EngineRequest, EngineStats, TokenEvent
from perft_serve.engine.limits import Limits
from perft_serve.engine.logs import LogFormat


class MessageError(Exception):
    """Bytes that are no message: the two processes do not understand each other."""


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Build the engine. The first command."""

    config: EngineConfig
    log_format: LogFormat = "text"


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run these requests; they get events, or are refused one by one."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop these requests; those that are over are ignored."""

    request_ids: list[str]


class Warm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bring an adapter before anyone asks for it. `number` tells this command's `Reply` from others; `pin` `None`: as it is."""

    number: int
    ref: AdapterRef
    pin: bool | None = None


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Let go of versions of an adapter as soon as nothing runs on them; `force`: end what runs on them; `only`: of the last of
    them, one that was never asked for, and of none before it.
    """

    number: int
    name: str
    up_to_version: int
    force: bool = False
    only: bool = False


class Delivered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first `num_outputs` step outputs have reached their readers; the engine runs no more than a window ahead of them."""

    num_outputs: int


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End after the present step; what runs gets no more events."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine is built and takes requests."""

    limits: Limits
    base_digest: str
    stats: EngineStats
    adapters: list[AdapterStatus]


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot be built; `reason` is for the user."""

    reason: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the engine does not take; `param` names the field at fault. `internal`: a bug, not the request's fault."""

    request_id: str
    reason: str
    param: str | None = None
    internal: bool = False


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A `Warm` or `Retire` has been taken up, or refused with a reason; what comes of it, the adapters' statuses say."""

    number: int
    error: str | None = None


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """What a step, and the commands obeyed before it, have brought; `adapters` are the statuses that have changed, `counts`
    what was counted since they were last sent.
    """

    stats: EngineStats
    events: list[TokenEvent] = []
    refused: list[Refusal] = []
    replies: list[Reply] = []
    adapters: list[AdapterStatus] = []
    counts: EngineCounts | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The process lives; its engine has been busy with one step for so long (0: it waits for something to do)."""

    busy_seconds: float


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine has failed, and the process ends; `reason` is one line, the log has the traceback."""

    reason: str


Command = Union[Start, Submit, Abort, Warm, Retire, Delivered, Stop]  # noqa: UP007  # msgspec needs it at run time
Report = Union[Started, StartFailed, StepOutput, Heartbeat, Failed]  # noqa: UP007

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """A message as bytes.

    Raises:
        UnicodeEncodeError: it holds a text with a lone surrogate.
    """
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """The command in `data`.

    Raises:
        MessageError: there is none, or not exactly one; it says what is wrong with which message.
    """
    return _decode(_commands, data, "command")


def decode_report(data: bytes) -> Report:
    """The report in `data`.

    Raises:
        MessageError: there is none, or not exactly one; it says what is wrong with which message.
    """
    return _decode(_reports, data, "report")


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageError(f"a malformed {what} ({_kind(data)}, {len(data)} bytes): {error}") from error


def _kind(data: bytes) -> str:
    """The type that broken bytes claim to be, as far as that can be told."""
    try:
        fields = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "not MessagePack"
    return str(fields.get("type", "no type")) if isinstance(fields, dict) else "no type"
