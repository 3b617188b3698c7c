"""The messages between the two processes: each goes there and back unchanged, and nothing else is taken for one."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import fields
from typing import Any, get_args

import msgspec
import pytest

from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import AdapterMemory, AdapterStatus
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.counts import EngineCounts, Gain, RouterBalance
from perft_serve.engine.events import EngineRequest, EngineStats, Routing, Timing, TokenEvent, TokenLogprobs
from perft_serve.engine.limits import Limits
from perft_serve.engine.messages import (
    Abort,
    Command,
    Delivered,
    Failed,
    Heartbeat,
    MessageError,
    Refusal,
    Reply,
    Report,
    Retire,
    Start,
    Started,
    StartFailed,
    StepOutput,
    Stop,
    Submit,
    Warm,
    decode_command,
    decode_report,
    encode,
)
from perft_serve.engine.params import SamplingParams, StructuredOutputsParams

REF = AdapterRef(name="größe/v1", source="s3://bucket/x@é", version=3)
PARAMS = SamplingParams(
    n=2,
    max_tokens=7,
    temperature=0.5,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    seed=-(1 << 63),
    stop=("a", "🙂"),
    stop_token_ids=(1, 2),
    ignore_eos=True,
    min_tokens=3,
    logit_bias={5: -100, 1 << 31: 0.5},
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.5,
    allowed_token_ids=(5, 6),
    bad_words=("ü",),
    include_stop_str_in_output=True,
    structured_outputs=StructuredOutputsParams(choice=("é", "b"), whitespace_pattern=" ?", param="guided_choice"),
    logprobs=3,
    prompt_logprobs=0,
    prompt_logprobs_start=1,
    skip_special_tokens=False,
    truncate_prompt_tokens=-1,
    truncation_side="right",
    return_routing=True,
)
REQUEST = EngineRequest(
    request_id="r-0",
    prompt_ids=(0, 1, 1 << 31),
    params=PARAMS,
    adapter=REF,
    choice=1,
    arrival=0.1,
    bad_words=((5,), (6, 7)),
    cache_scope="scope",
    priority=-3,
    tenant="tenant",
)
STATUS = AdapterStatus(
    name="a",
    version=2,
    state="failed",
    error="it is broken",
    pinned=True,
    num_in_flight=3,
    last_used=1e9,
    variant="R",
    unit="lora",
    num_experts=4,
    top_k=2,
    r=8,
    targets=("q_proj",),
    num_parameters=1 << 40,
    num_bytes=1 << 41,
    digest="0123",
)
LOGPROBS = TokenLogprobs(token_id=5, logprob=-math.inf, top=((5, -0.5), (6, -1.5)), rank=3)
EVENT = TokenEvent(
    request_id="r-0",
    token_id=5,
    logprobs=LOGPROBS,
    prompt_logprobs=(None, LOGPROBS),
    finish_reason="stop",
    stop_reason=5,
    timing=Timing(queued=0.1, scheduled=0.2, first_token=0.3),
    num_cached_tokens=16,
    adapter_digest="0123",
    routing=Routing(start=3, layers=(0, 5), width=2, ids=bytes(16), weights=b"\xff" * 16),
)
STATS = EngineStats(num_running=1, kv_usage=0.5, num_steps=1 << 40, adapters=AdapterMemory(load_seconds=0.25))
LIMITS = Limits(max_model_len=256, vocab_size=300)

COMMANDS: list[Command] = [
    Start(config=EngineConfig(model="m", adapters={"a": "/x"}, adapter_dir=None, max_model_len=5, kv_memory=1 << 40)),
    Submit(requests=[REQUEST, EngineRequest(request_id="s", prompt_ids=(), params=SamplingParams())]),
    Abort(request_ids=["a", "b"]),
    Warm(number=1, ref=REF, pin=True),
    Retire(number=2, name="a", up_to_version=3, force=True),
    Delivered(num_outputs=1 << 50),
    Stop(),
]
REPORTS: list[Report] = [
    Started(limits=LIMITS, base_digest="0123", stats=STATS, adapters=[STATUS, AdapterStatus(name="b", version=1)]),
    StartFailed(reason="there is no model at /x"),
    StepOutput(
        stats=STATS,
        events=[EVENT, TokenEvent(request_id="s", token_id=None, finish_reason="error", error="why")],
        refused=[
            Refusal(request_id="t", reason="why", param="prompt"),
            Refusal(request_id="u", reason="", internal=True),
        ],
        replies=[Reply(number=1), Reply(number=2, error="why")],
        adapters=[STATUS],
        counts=EngineCounts(
            gains={"page_idle": Gain(((3, 1 << 40), (21, 1)), 0.5)},
            num_corrupted=1,
            balances=(RouterBalance(adapter="a", entropy=0.5),),
        ),
    ),
    StepOutput(stats=EngineStats()),
    Heartbeat(busy_seconds=0.5),
    Failed(reason="why"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: type(each).__name__)
def test_a_command_goes_there_and_back(command: Command) -> None:
    assert decode_command(encode(command)) == command


@pytest.mark.parametrize("report", REPORTS, ids=lambda each: type(each).__name__)
def test_a_report_goes_there_and_back(report: Report) -> None:
    assert decode_report(encode(report)) == report


def test_every_message_is_tested() -> None:
    assert {type(each) for each in COMMANDS} == set(get_args(Command))
    assert {type(each) for each in REPORTS} == set(get_args(Report))


@pytest.mark.parametrize("value", [PARAMS, REQUEST, STATUS, REF], ids=lambda each: type(each).__name__)
def test_no_field_is_tested_by_its_default_only(value: Any) -> None:
    for each in fields(value):
        assert getattr(value, each.name) != each.default, each.name


def test_what_comes_back_is_as_immutable_as_what_went() -> None:
    (request, _) = decode_command(encode(COMMANDS[1])).requests  # type: ignore[union-attr]
    assert isinstance(request.prompt_ids, tuple)
    assert hash(request.adapter) == hash(REF)
    with pytest.raises(AttributeError):
        request.adapter.name = "other"  # type: ignore[misc, union-attr]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"a malformed command \(not MessagePack, 0 bytes\)"),
        (b"\xc1", "not MessagePack"),
        (b"hello", "not MessagePack"),
        (encode(Stop())[:-1], "not MessagePack"),
        (encode(Stop()) + b"x", "not MessagePack"),
        (msgspec.msgpack.encode([1, 2]), "no type"),
        (msgspec.msgpack.encode({"a": 1}), "no type"),
        (msgspec.msgpack.encode({"type": "Reboot"}), r"\(Reboot, .*Invalid value 'Reboot'"),
        (msgspec.msgpack.encode({"type": "Warm", "number": 1}), r"\(Warm, .*missing required field `ref`"),
        (msgspec.msgpack.encode({"type": "Abort", "request_ids": "a"}), r"\(Abort, .*Expected `array`, got `str`"),
        (
            msgspec.msgpack.encode({"type": "Delivered", "num_outputs": "3"}),
            r"\(Delivered, .*Expected `int`, got `str` - at `\$.num_outputs`",
        ),
        (encode(Heartbeat(busy_seconds=1.0)), "Heartbeat"),
    ],
)
def test_what_is_no_command_is_named(data: bytes, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        decode_command(data)


def test_meaningless_values_are_refused_too() -> None:
    data = encode(COMMANDS[1])
    hot = data.replace(b"\xabtemperature\xcb?\xe0", b"\xabtemperature\xcb@\xe0")
    assert hot != data
    with pytest.raises(MessageError, match="temperature must be in"):
        decode_command(hot)


def test_broken_bytes_give_a_message_or_the_error_and_nothing_else() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        data = bytearray(encode(chance.choice(REPORTS)))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with suppress(MessageError):
            decode_report(bytes(data[: chance.randint(0, 2 * len(data))]))
