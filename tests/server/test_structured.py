"""Structured output over HTTP: every way to ask for it, what is refused, and the `openai` client's `parse`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from replies import assert_error, events_of
from running_server import BASE, RunningServer
from transformers import PreTrainedTokenizerFast

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["add", "sub"]
    value: int = Field(ge=0, le=99)


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")
    title: str = Field(max_length=6)
    done: bool
    steps: list[Step] = Field(max_length=2)


SCHEMA = Plan.model_json_schema()
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "plan", "schema": SCHEMA, "strict": True}}


def is_plan(text: str) -> bool:
    return bool(Plan.model_validate_json(text, strict=True))


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


@pytest.fixture(scope="session")
def no_space(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """A bias against the white space between JSON's parts, of which a random model may find no end."""
    vocab = tiny_tokenizer.get_vocab()
    return {str(token_id): -100.0 for piece, token_id in vocab.items() if set(piece) <= set("ĠĊĉč")}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"response_format": JSON_SCHEMA}, is_plan),
        ({"structured_outputs": {"json": SCHEMA}}, is_plan),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "disable_any_whitespace": True}}, is_plan),
        ({"guided_json": SCHEMA, "guided_regex": None}, is_plan),
        ({"guided_json": json.dumps(SCHEMA)}, is_plan),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text)),
        ({"guided_regex": "(ab){2,4}"}, lambda text: re.fullmatch("(ab){2,4}", text)),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
        ({"guided_choice": ["red", "blue"]}, lambda text: text in ("red", "blue")),
        (
            {"structured_outputs": {"grammar": 'start: "<" /[a-z]{1,3}/ ">"'}},
            lambda text: re.fullmatch("<[a-z]{1,3}>", text),
        ),
        ({"guided_grammar": 'root ::= "x" | "yz"'}, lambda text: text in ("x", "yz")),
    ],
)
def test_every_way_to_ask(
    server: RunningServer, no_space: dict[str, float], path: str, asked: dict[str, Any], fits: Any
) -> None:
    body = {"max_tokens": 120, "logit_bias": no_space, **asked}
    body |= {"prompt": "hello"} if path == COMPLETIONS else {"messages": MESSAGES}
    for model, settings in ((BASE, {"temperature": 0}), ("routed", {"temperature": 1.0, "seed": 3, "n": 3})):
        choices = server.post(path, {**body, **settings, "model": model}).json()["choices"]
        assert len(choices) == settings.get("n", 1)
        for choice in choices:
            text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
            assert choice["finish_reason"] == "stop", text
            assert choice["stop_reason"] is None
            assert fits(text), text


def test_a_json_object(
    server: RunningServer, no_space: dict[str, float], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Any object; the model is made to like the brace that ends it."""
    (brace,) = tiny_tokenizer.encode("}", add_special_tokens=False)
    bias = {**no_space, str(brace): 60.0}
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        choice = server.complete(max_tokens=60, temperature=0, logit_bias=bias, **asked)["choices"][0]
        assert (choice["finish_reason"], is_object(choice["text"])) == ("stop", True)


def test_a_stream_is_the_same(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "guided_regex": "[a-c]{5}é(🙂|你好)", "temperature": 0, "max_tokens": 60}
    whole = server.post(CHAT, body).json()["choices"][0]
    assert re.fullmatch("[a-c]{5}é(🙂|你好)", whole["message"]["content"])
    events = events_of(server.post(CHAT, {**body, "stream": True}).text)
    deltas = [choice for event in events for choice in event["choices"]]
    assert "".join(delta["delta"].get("content") or "" for delta in deltas) == whole["message"]["content"]
    assert deltas[-1]["finish_reason"] == "stop"


def test_text_is_no_constraint(server: RunningServer) -> None:
    plain = server.complete(max_tokens=8)["choices"]
    assert server.complete(max_tokens=8, response_format={"type": "text"})["choices"] == plain


def test_stop_strings_and_limits_still_hold(server: RunningServer) -> None:
    stopped = server.complete(max_tokens=60, guided_regex="ab[0-9]{40}", stop=["ab"])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"], stopped["stop_reason"]) == ("", "stop", "ab")
    cut = server.complete(max_tokens=3, guided_regex="[0-9]{40}")["choices"][0]
    assert cut["finish_reason"] == "length"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "missing",
    ),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}},
        "response_format",
        "for the type",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "must be"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "must be"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
        "response_format",
        "Invalid type",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml", "unknown field"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "must be"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "leave one out"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": 5}, "guided_json", "must be a JSON schema"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
    ({"guided_choice": []}, "guided_choice", "one at least"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "param", "message"), BAD)
def test_what_is_refused(server: RunningServer, asked: dict[str, Any], param: str, message: str, stream: bool) -> None:
    reply = server.post(CHAT, {"messages": MESSAGES, "stream": stream, **asked})
    assert_error(reply, 400, message, param=param)


def test_parse(client: openai.OpenAI, no_space: dict[str, float]) -> None:
    completion = client.chat.completions.parse(
        model="routed",
        messages=[{"role": "user", "content": "hello"}],
        response_format=Plan,
        temperature=0,
        logit_bias=no_space,  # type: ignore[arg-type]
    )
    assert isinstance(completion.choices[0].message.parsed, Plan)
    assert completion.choices[0].message.content is not None
    assert Plan.model_validate_json(completion.choices[0].message.content) == completion.choices[0].message.parsed
