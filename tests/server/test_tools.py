"""Tools: reading calls from text however it is cut, and the whole round over HTTP with the `openai` client."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from replies import assert_error, events_of
from running_server import BASE, RunningServer, running_server
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from perft_serve.engine.config import EngineConfig
from perft_serve.server.config import ServerConfig
from perft_serve.server.tools import FORMATS, ToolCallReader, format_of

CHAT = "/v1/chat/completions"

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}\n"
    'Answer <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}{{ '\n' }}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "{% if message.role == 'tool' %}({{ message.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}{% endif %}"
)
MISTRAL = (
    "{% if tools %}[TOOLS]{{ tools | length }}{% endif %}{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if message.tool_calls %}[TOOL_CALLS]{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}{{ call.function | tojson }}"
    "{% endfor %}{% endif %}{% endfor %}"
)

SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "at": {"$ref": "#/$defs/place"}},
    "required": ["x", "at"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["a", 'b"c', "é}"]}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "go", "description": "Goes.", "parameters": SMALL, "strict": True}},
    {"type": "function", "function": {"name": "stop.now", "parameters": {
        **SMALL, "properties": {"x": {"const": 1}}, "required": ["x"]}}},
]  # fmt: skip


def read(name: str, pieces: Sequence[str], *, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """(text, name and arguments of each call)"""
    reader = ToolCallReader(FORMATS[name], parallel=parallel)
    content, calls = "", {}
    for piece in [*(reader.push(piece) for piece in pieces), reader.flush()]:
        content += piece.content
        for delta in piece.calls:
            if delta.name is not None:
                assert delta.index not in calls
                assert re.fullmatch("call_[a-zA-Z0-9]{24}|[a-zA-Z0-9]{9}", delta.id or "")
                calls[delta.index] = (delta.name, "")
            calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    return content, list(calls.values())


ONE = '{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {}]}}'
ARGUMENTS = '{"a": "}\\"{", "b": [1, {}]}'


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", "hello < there <tool", "hello < there <tool", []),
        ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [("f", ARGUMENTS)]),
        ("hermes", f"so: <tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>\n", "so: ", [("f", ARGUMENTS)] * 2),
        ("hermes", f"<tool_call>[{ONE}, {ONE}]</tool_call> end", "end", [("f", ARGUMENTS)] * 2),  # SmolLM2
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>', "", [("g", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "g", "parameters": {}, "id": {"n": "}"}}</tool_call>', "", [("g", "{}")]),
        ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
        ("hermes", '<tool_call>{"name": "g", "arguments": {"a": ', "", [("g", '{"a": ')]),  # cut by max_tokens
        ("hermes", "<tool_call>what?</tool_call>", "<tool_call>what?</tool_call>", []),
        ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("hermes", "<tool_call></tool_call>", "<tool_call></tool_call>", []),
        ("mistral", f"[TOOL_CALLS] [{ONE}, {ONE}]", "", [("f", ARGUMENTS)] * 2),
        ("mistral", f"[TOOL_CALLS][{ONE}]", "", [("f", ARGUMENTS)]),
        ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ],
)  # fmt: skip
def test_reading(kind: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(kind, [text]) == (content, calls)
    assert read(kind, list(text)) == (content, calls)
    for cut in range(len(text)):
        assert read(kind, [text[:cut], text[cut:]]) == (content, calls), cut


def test_only_the_first_call_if_not_in_parallel() -> None:
    text = f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>"
    assert read("hermes", list(text), parallel=False) == ("", [("f", ARGUMENTS)])


def test_the_format_is_seen_in_the_template() -> None:
    assert format_of(HERMES) is FORMATS["hermes"]
    assert format_of(MISTRAL) is FORMATS["mistral"]
    assert format_of("{{ messages }}") is None


def with_template(base: Path, folder: Path, template: str, special: Sequence[str] = ()) -> str:
    """The tiny base with another chat template."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def hermes(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = with_template(tiny_base, tmp_path_factory.mktemp("hermes") / "base", HERMES)
    config = EngineConfig(model=model, dtype="float32", device="cpu", kv_memory=1 << 23, max_model_len=256)
    with running_server(config, ServerConfig()) as server:
        yield server


@pytest.fixture(scope="module")
def mistral(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = with_template(tiny_base, tmp_path_factory.mktemp("mistral") / "base", MISTRAL, ["[TOOL_CALLS]"])
    config = EngineConfig(model=model, dtype="float32", device="cpu", kv_memory=1 << 23, max_model_len=256)
    with running_server(config, ServerConfig()) as server:
        yield server


@pytest.fixture
def client(hermes: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def fits(call: Any) -> None:
    """The call is one of a tool, with arguments that its schema allows."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "go":
        assert set(arguments) == {"x", "at"}
        assert arguments["x"] in range(10)
        assert arguments["at"] in SMALL["$defs"]["place"]["enum"]
    else:
        assert (call.function.name, arguments) == ("stop.now", {"x": 1})


SHORT: list[Any] = [{"type": "function", "function": {"name": "go", "parameters": SMALL}}]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_round_with_a_tool(client: openai.OpenAI, seed: int) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    settings: dict[str, Any] = {"model": BASE, "tools": SHORT, "temperature": 1.0, "seed": seed}
    first = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **settings
    ).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert first.message.tool_calls is not None
    (call,) = first.message.tool_calls
    fits(call)
    messages += [
        first.message.model_dump(exclude_unset=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    second = client.chat.completions.create(messages=messages, max_tokens=5, **settings)
    assert second.choices[0].finish_reason in ("stop", "length")
    assert second.usage is not None
    assert second.usage.prompt_tokens > len(call.function.arguments)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "stop.now"}}])
def test_a_stream_of_forced_calls_is_the_same(hermes: RunningServer, client: openai.OpenAI, choice: Any) -> None:
    settings: dict[str, Any] = {
        "model": BASE,
        "messages": [{"role": "user", "content": "x"}],
        "tools": TOOLS[1:] if isinstance(choice, dict) else SHORT,
        "tool_choice": choice,
        "temperature": 0,
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.create(**settings).choices[0]
    assert whole.message.tool_calls is not None
    names, ids, arguments, last = [], [], "", None
    for chunk in client.chat.completions.create(stream=True, **settings):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            assert delta.function is not None
            names += [delta.function.name] * bool(delta.function.name)
            ids += [delta.id] * bool(delta.id)
            arguments += delta.function.arguments or ""
        assert not chunk.choices[0].delta.content
        last = chunk.choices[0].finish_reason
    (call,) = whole.message.tool_calls
    fits(call)
    assert (names, arguments, last) == ([call.function.name], call.function.arguments, "tool_calls")
    assert len(ids) == 1


def test_a_cut_call_says_so(hermes: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": SHORT, "tool_choice": "required", "max_tokens": 4}
    assert hermes.post(CHAT, body).json()["choices"][0]["finish_reason"] == "length"


def test_calls_that_are_special_tokens(mistral: RunningServer) -> None:
    """The mark is a token without text: it is neither shown nor lost, and several calls are possible."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": SHORT, "temperature": 1.0, "max_tokens": 150}
    for seed in range(3):
        choice = mistral.post(CHAT, {**body, "tool_choice": "required", "seed": seed}).json()["choices"][0]
        assert choice["finish_reason"] in ("tool_calls", "length")
        assert choice["message"]["content"] is None
        assert re.fullmatch("[a-zA-Z0-9]{9}", choice["message"]["tool_calls"][0]["id"])
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "go"
        named = {"type": "function", "function": {"name": "go"}}
        choice = mistral.post(CHAT, {**body, "tool_choice": named, "seed": seed}).json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) == {"x", "at"}
        again = [
            {"role": "user", "content": "x"},
            choice["message"],
            {"role": "tool", "content": "5", "tool_call_id": call["id"]},
        ]
        assert mistral.post(CHAT, {"messages": again, "max_tokens": 2}).status_code == 200


def test_no_call_is_forced_without_a_choice(hermes: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    without = hermes.post(CHAT, body).json()
    assert hermes.post(CHAT, {**body, "tools": SHORT, "tool_choice": "none"}).json()["choices"] == without["choices"]
    auto = hermes.post(CHAT, {**body, "tools": SHORT}).json()
    assert len(auto["prompt_token_ids"]) > len(without["prompt_token_ids"])
    assert "tool_calls" not in auto["choices"][0]["message"]


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": SHORT * 2}, "tools", "the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": SHORT, "tool_choice": "always"}, "tool_choice", "must be none, auto"),
        ({"tools": SHORT, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not among"),
        ({"tools": SHORT, "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "leave one out"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}], "tool_choice": "required"},
         "tools", "Invalid type"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"function_call": "auto"}, "function_call", "not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs", "takes no 'chat_template'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "takes no 'messages'"),
        ({"chat_template_kwargs": {"unheard_of": 1}}, "chat_template_kwargs", "takes no 'unheard_of'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "takes no 'tokenize'"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "leave one out"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", "role tool"),
        ({"messages": [
            {"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]}]},
         "messages[0].tool_calls", "only an assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
    ],
)  # fmt: skip
def test_what_is_refused(hermes: RunningServer, body: dict[str, Any], param: str, message: str) -> None:
    assert_error(hermes.post(CHAT, {"messages": MESSAGES, **body}), 400, message, param=param)


def test_a_model_without_tools_in_its_template(server: RunningServer) -> None:
    assert_error(server.post(CHAT, {"messages": MESSAGES, "tools": SHORT}), 400, "no place for tools", param="tools")


def prompt_of(server: RunningServer, tokenizer: PreTrainedTokenizerFast, body: dict[str, Any]) -> str:
    """The prompt that the model has been given, as text."""
    reply = server.post(CHAT, {"max_tokens": 1, "return_token_ids": True, **body})
    assert reply.status_code == 200, reply.text
    return str(tokenizer.decode(reply.json()["prompt_token_ids"]))


def test_what_the_template_is_given(hermes: RunningServer, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "x", "name": "Ann"}
    half = {"role": "assistant", "content": "to be or"}
    assert (
        prompt_of(hermes, tiny_tokenizer, {"messages": [user]})
        == "<|im_start|>user Ann\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_of(
        hermes, tiny_tokenizer, {"messages": [{"role": "developer", "content": "x"}], "add_generation_prompt": False}
    ) == ("<|im_start|>system\nx<|im_end|>\n")
    assert prompt_of(hermes, tiny_tokenizer, {"messages": [user, half], "continue_final_message": True}).endswith(
        "<|im_start|>assistant\nto be or"
    )
    assert prompt_of(hermes, tiny_tokenizer, {"messages": [user], "chat_template_kwargs": {"thinking": True}}).endswith(
        "<think>"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "go", "arguments": '{"x":1}'}}
    tool = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "ok"}]}
    assert prompt_of(
        hermes, tiny_tokenizer, {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}, tool]}
    ) == (
        "<|im_start|>user Ann\nx<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "go", "arguments": {"x": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nok(c1)<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_runs_in_a_sandbox(tiny_base: Path, tmp_path: Path) -> None:
    evil = "{% for message in messages %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endfor %}"
    model = with_template(tiny_base, tmp_path / "base", evil)
    config = EngineConfig(model=model, dtype="float32", device="cpu", kv_memory=1 << 22)
    with running_server(config, ServerConfig()) as server:
        assert_error(server.post(CHAT, {"messages": MESSAGES}), 400, "unsafe", param="messages")


def test_streams_of_text_are_untouched(hermes: RunningServer) -> None:
    body = {"messages": MESSAGES, "tools": SHORT, "temperature": 1.0, "seed": 4, "max_tokens": 30}
    whole = hermes.post(CHAT, body).json()["choices"][0]["message"]["content"]
    events = events_of(hermes.post(CHAT, {**body, "stream": True}).text)
    assert "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"]) == whole
