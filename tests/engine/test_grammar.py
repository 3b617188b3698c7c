"""Sequences that follow a grammar: what they give, when they end, and that nobody waits for or depends on them."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from driving import Output, request, run, step
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerFast

from perft_serve.engine import grammar
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import TokenEvent
from perft_serve.engine.params import RequestError, SamplingParams, StructuredOutputsParams

EOS = 0


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["town", "hill"]
    height: int = Field(ge=0, le=9999)


class Report(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=8)
    sure: bool
    places: list[Place] = Field(max_length=2)
    note: str | None = Field(max_length=4)


GBNF = 'root ::= "<" word ">" ("," "<" word ">")?\nword ::= [a-c] [a-c]?'

# name: what is asked for, and whether a text is that
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "schema": (
        {"json": Report.model_json_schema(), "disable_any_whitespace": True},
        lambda text: bool(Report.model_validate_json(text, strict=True)),
    ),
    "schema-as-text": (
        {"json": json.dumps({"type": "array", "items": {"enum": [1, None, "x"]}, "minItems": 3, "maxItems": 3})},
        lambda text: len(found := json.loads(text)) == 3 and set(found) <= {1, None, "x"},
    ),
    "regex": (
        {"regex": r"[a-f0-9]{4}(-[a-f0-9]{4}){2}"},
        lambda text: bool(re.fullmatch(r"[a-f0-9]{4}(-[a-f0-9]{4}){2}", text)),
    ),
    "unicode-regex": ({"regex": "(Köln|你好|🙂){2}!"}, lambda text: bool(re.fullmatch("(Köln|你好|🙂){2}!", text))),
    "choice": (
        {"choice": ["yes", "no, never", 'quo"te', "né"]},
        lambda text: text in ("yes", "no, never", 'quo"te', "né"),
    ),
    "lark": ({"grammar": 'start: "a" b\nb: "1" | "2" b'}, lambda text: bool(re.fullmatch("a2*1", text))),
    "gbnf": ({"grammar": GBNF}, lambda text: bool(re.fullmatch("<[a-c]{1,2}>(,<[a-c]{1,2}>)?", text))),
}


@pytest.fixture(scope="module")
def make_engine(tiny_base: Path, tiny_adapters: Mapping[str, str]) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(**settings: Any) -> Engine:
        config = {"dtype": "float32", "kv_memory": 1 << 22, "adapters": dict(tiny_adapters), **settings}
        engines.append(Engine(EngineConfig(model=str(tiny_base), **config)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def text_of(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[Output], str]:
    def decode(output: Output) -> str:
        return str(tiny_tokenizer.decode(output.token_ids, skip_special_tokens=True))

    return decode


def outputs_of(**kind: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**kind)


def followers(**settings: Any) -> list[Any]:
    """Requests for every grammar, greedy and sampled, on the base and on adapters."""
    found = []
    for i, (name, (kind, _)) in enumerate(GRAMMARS.items()):
        for temperature in (0.0, 1.0, 2.0):
            adapter = (None, "routed", "single")[(i + int(temperature)) % 3]
            params = {"max_tokens": 150, "temperature": temperature, "seed": i, **settings}
            found.append(
                request(
                    f"{name}/{temperature:g}", [7, 8, i + 9], adapter, structured_outputs=outputs_of(**kind), **params
                )
            )
    return found


def plain() -> list[Any]:
    return [
        request("plain", [5, 6, 7]),
        request("plain-adapter", [5, 6, 7], "dense"),
        request("plain-sampled", [5, 6, 7], "routed", temperature=1.0, seed=5, top_p=0.9),
    ]


def test_every_text_is_what_was_asked_for_and_neighbours_notice_nothing(
    engine: Engine, text_of: Callable[[Output], str]
) -> None:
    alone = run(engine, plain())
    outputs = run(engine, [*plain(), *followers()])
    for name, output in outputs.items():
        if name in alone:
            assert output.token_ids == alone[name].token_ids, name
            continue
        assert output.finish_reason == "stop", (name, text_of(output))
        assert GRAMMARS[name.split("/")[0]][1](text_of(output)), (name, text_of(output))
    again = run(engine, followers(), max_steps=5000)
    assert {name: output.token_ids for name, output in again.items()} == {
        name: output.token_ids for name, output in outputs.items() if name not in alone
    }


@pytest.mark.parametrize("name", ["schema/1", "regex/2"])
def test_alone_is_as_among_others(engine: Engine, name: str) -> None:
    (one,) = [each for each in followers() if each.request_id == name]
    assert run(engine, [one])[name].token_ids == run(engine, followers())[name].token_ids


def test_preempted_sequences_go_on_where_they_were(engine: Engine, make_engine: Callable[..., Engine]) -> None:
    small = make_engine(kv_memory=3 << 14, page_size=4, prefix_caching="on")
    before = run(engine, followers())
    outputs = run(small, followers())
    assert small.stats().num_preemptions > 0
    assert {name: output.token_ids for name, output in outputs.items()} == {
        name: output.token_ids for name, output in before.items()
    }


def test_steps_ahead_wait_for_who_follows_a_grammar(engine: Engine, make_engine: Callable[..., Engine]) -> None:
    """The mask of a step depends on the token before it, which is not known on the host yet."""
    before = run(engine, [*plain(), *followers()])
    outputs = run(make_engine(async_scheduling="on"), [*plain(), *followers()])
    assert {name: output.token_ids for name, output in outputs.items()} == {
        name: output.token_ids for name, output in before.items()
    }


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    prompt = [5, 6, 7]
    forced = run(engine, [request("x", prompt, logprobs=2, structured_outputs=outputs_of(regex="[0-9]{3}x"))])["x"]
    whole = [*prompt, *forced.token_ids]
    scored = run(engine, [request("y", whole, max_tokens=0, prompt_logprobs=0)])["y"].prompt_logprobs
    assert scored is not None
    own = [entry.logprob for entry in scored[len(prompt) :] if entry is not None]
    assert forced.logprobs == pytest.approx(own, abs=1e-4)


def test_the_text_ends_only_where_its_grammar_lets_it(engine: Engine, text_of: Callable[[Output], str]) -> None:
    """Though the model would like to end at once."""
    wants_to_end: dict[str, Any] = {"logit_bias": {EOS: 100.0}, "max_tokens": 50}
    outputs = run(
        engine,
        [
            request("exact", [5], structured_outputs=outputs_of(regex="[a-z]{5}"), **wants_to_end),
            request("open", [5], structured_outputs=outputs_of(regex="[a-z]{3,9}"), **wants_to_end),
            request("longer", [5], structured_outputs=outputs_of(regex="[a-z]{3,}"), min_tokens=8, **wants_to_end),
            request("no-eos", [5], structured_outputs=outputs_of(regex="[a-z]{3,9}"), ignore_eos=True, **wants_to_end),
            request("cut", [5], structured_outputs=outputs_of(regex="[a-z]{50}"), max_tokens=2),
        ],
    )
    texts = {name: text_of(output) for name, output in outputs.items()}
    assert len(texts["exact"]) == 5
    assert outputs["exact"].token_ids[-1] != EOS
    assert 3 <= len(texts["open"]) <= 5  # a token is a few letters
    assert outputs["open"].token_ids[-1] == EOS
    assert len(outputs["longer"].token_ids) == 9
    assert len(texts["no-eos"]) == 9
    assert {name: output.finish_reason for name, output in outputs.items()} == {
        **dict.fromkeys(outputs, "stop"),
        "cut": "length",
    }


def test_a_stop_token_without_text_ends_it_as_the_end_of_sequence_does(engine: Engine) -> None:
    end = 2  # <|im_end|>
    wants: dict[str, Any] = {"logit_bias": {end: 100.0}, "stop_token_ids": (end,), "max_tokens": 30}
    outputs = run(
        engine,
        [
            request("stops", [5], structured_outputs=outputs_of(regex="[a-z]{3,9}"), **wants),
            request("plain", [5], **wants),
        ],
    )
    assert outputs["stops"].token_ids[-1] == end
    assert len(outputs["stops"].token_ids) > 1
    assert outputs["plain"].token_ids == [end]


def test_what_leaves_no_token_is_the_requests_own_fault(engine: Engine) -> None:
    digits = outputs_of(regex="[0-9]+")
    outputs = run(engine, [request("x", [5], structured_outputs=digits, allowed_token_ids=[EOS]), *plain()])
    assert outputs["x"].finish_reason == "error"
    assert "no token is left" in (outputs["x"].error or "")
    assert outputs["plain"].finish_reason == "length"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"regex": "(a"}, "regular expression cannot be used: .*unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"json": {"type": "nope"}}, "JSON schema cannot be used: Invalid type: nope"),
        ({"json": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json": {"$ref": "http://127.0.0.1/x"}}, "not fetch"),
        ({"json": {"type": "string", "pattern": "(a"}}, "unclosed group"),
        ({"grammar": "start: nowhere"}, "unknown name"),
        ({"grammar": "nonsense"}, "cannot be used"),
    ],
)
def test_a_grammar_that_is_none(engine: Engine, kind: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        engine.check_grammar(outputs_of(**kind, param="response_format"))
    assert caught.value.param == "response_format"
    engine.submit(request("bad", [5], structured_outputs=outputs_of(**kind)))
    events: list[TokenEvent] = []
    while not events:
        assert engine.has_work() or engine.wait(30)
        events = engine.step()
    assert [(event.request_id, event.finish_reason, event.error_kind) for event in events] == [
        ("bad", "error", "request")
    ]
    assert re.search(message, events[0].error or "")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "exactly one .*, not regex and choice"),
        ({"json_object": False}, "not none"),
        ({"json": "{"}, "is not JSON"),
        ({"json": "[1]"}, "must be an object"),
        ({"json": '{}}, {"lark_grammar": "start: x"'}, "is not JSON"),
        ({"json": {"maximum": math.nan}}, "is not JSON"),
        ({"json": '{"a":' * 20_000 + "1" + "}" * 20_000}, "nested too deeply|characters"),
        ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "nested too deeply"),
        ({"choice": []}, "one at least"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": ["a", 1]}, "list of strings"),
        ({"choice": ["x"] * 1025}, "at most 1024 choices"),
        ({"regex": "a" * 70_000}, "70000 characters"),
        ({"regex": "\ud800"}, "not valid Unicode"),
        ({"grammar": 5}, "must be a string"),
        ({"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "}, "leave one out"),
    ],
)
def test_what_is_refused_before_it_is_compiled(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        StructuredOutputsParams(**kind)
    assert caught.value.param == "structured_outputs"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


BOMBS: dict[str, dict[str, Any]] = {
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "a giant repeat": {"regex": "a{1,1000000000}"},
    "an exponential automaton": {"regex": "(.*a.{40}|.*b.{40}|.*c.{40})x"},
    "many alternatives": {"regex": "|".join(f"{i}.*{i * 7}" for i in range(5000))},
    "unicode classes": {"regex": r"(\p{L}{1,5000}\p{N}{1,5000}){1,50}"},
    "a deep schema": {"json": nested(100)},
    "long arrays": {"json": {"type": "array", "items": {"type": "array", "minItems": 100_000}, "minItems": 100_000}},
    "a long string": {"json": {"type": "string", "minLength": 10_000_000}},
    "many fields": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}},
    "a long enum": {"json": {"enum": [f"v{i}" for i in range(6000)]}},
    "patterns that meet": {
        "json": {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(10, 22)]}
    },
    "definitions that double": {
        "json": {
            "$defs": {
                **{
                    f"d{i}": {
                        "properties": {"l": {"$ref": f"#/$defs/d{i + 1}"}, "r": {"$ref": f"#/$defs/d{i + 1}"}},
                        "required": ["l", "r"],
                        "type": "object",
                    }
                    for i in range(40)
                },
                "d40": {"type": "string"},
            },
            "$ref": "#/$defs/d0",
        }
    },
    "a schema that is itself": {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}},
    "multiples": {"json": {"type": "integer", "multipleOf": 999_999_937, "minimum": 1, "maximum": 10**18}},
    "ambiguity": {"grammar": 'start: a\na: a a | a a a | "x" | '},
    "GBNF parentheses": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "GBNF alternatives": {"grammar": "root ::= " + " | ".join(['"a"'] * 10_000)},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little_and_hits_nobody_else(engine: Engine, name: str) -> None:
    """It is refused, or runs, or ends with an error of its own; either way soon."""
    bomb = request("bomb", [5], max_tokens=40, temperature=2.0, seed=1, structured_outputs=outputs_of(**BOMBS[name]))
    start = time.monotonic()
    outputs = run(engine, [bomb, *plain()])
    assert time.monotonic() - start < 10  # seconds, on any machine; they take a tenth of it
    assert outputs["plain"].finish_reason == "length"
    assert outputs["bomb"].finish_reason in ("stop", "length", "error")


def test_a_grammar_that_gets_too_large_ends_its_own_sequence_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_MAX_LEXER_STATES", 200)
    outputs = run(
        engine,
        [
            request(
                "large",
                [5],
                max_tokens=200,
                structured_outputs=outputs_of(regex="(.*a.{41}|.*b.{41})x"),
                temperature=2.0,
            ),
            request("small", [5], max_tokens=20, structured_outputs=outputs_of(regex="[a-z]{12}")),
        ],
    )
    assert (outputs["large"].finish_reason, outputs["small"].finish_reason) == ("error", "stop")
    assert "too many states" in (outputs["large"].error or "")


def test_a_limit_that_neighbours_have_reached_is_not_ones_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences share what is known of their grammar, and that is bounded; each must come as far as it would alone."""
    kind = {"regex": "(.*a.{9}|.*b.{9}|.*c.{9})x"}
    requests = [
        request(str(i), [5, i], max_tokens=12, temperature=2.0, seed=i, structured_outputs=outputs_of(**kind))
        for i in range(12)
    ]
    expected = run(engine, requests)
    engine._grammars._cache.clear()
    monkeypatch.setattr(grammar, "_MAX_LEXER_STATES", 200)
    alone: dict[str, Output] = {}
    for one in requests:
        engine._grammars._cache.clear()
        alone |= run(engine, [one])
    assert {output.finish_reason for output in alone.values()} == {"length"}
    moved: list[grammar.Grammar] = []
    stand_alone = grammar.Grammar.stand_alone

    def noted(self: grammar.Grammar) -> bool:
        moved.append(self)
        return stand_alone(self)

    monkeypatch.setattr(grammar.Grammar, "stand_alone", noted)
    engine._grammars._cache.clear()
    together = run(engine, requests)
    assert moved
    assert {name: output.token_ids for name, output in together.items()} == {
        name: output.token_ids for name, output in expected.items()
    }


def test_nobody_else_waits_for_a_grammar(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    compile_now = grammar._compile

    def compile_late(*args: Any) -> Any:
        assert go_on.wait(30)
        return compile_now(*args)

    monkeypatch.setattr(grammar, "_compile", compile_late)
    late = outputs_of(regex="[0-9]{4}slow")
    engine.submit(request("late", [5], structured_outputs=late))
    engine.submit(request("dropped", [5], "routed", structured_outputs=late))
    others = {each.request_id: Output() for each in plain()}
    for each in plain():
        engine.submit(each)
    while not all(output.finish_reason for output in others.values()):
        assert engine.has_work()
        step(engine, others)
    assert not engine.has_work()  # nothing spins while the grammar is compiled
    assert engine.stats().num_waiting == 2
    engine.abort("dropped")
    engine.submit(request("dropped", [5], max_tokens=1))  # its id is free
    go_on.set()
    rest = {"late": Output(), "dropped": Output()}
    while not all(output.finish_reason for output in rest.values()):
        step(engine, rest)
    assert (rest["late"].finish_reason, rest["dropped"].finish_reason) == ("stop", "length")
    assert engine.stats().num_waiting == 0


def test_a_deleted_adapter_ends_what_waits_for_its_grammar(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    go_on = threading.Event()
    monkeypatch.setattr(grammar, "_compile", lambda *_: go_on.wait(30) and grammar.GrammarError("late"))
    engine.submit(request("x", [5], "routed", structured_outputs=outputs_of(regex="a")))
    engine.retire("routed", 1, force=True)
    events = engine.step()
    assert [(event.request_id, event.error_kind) for event in events] == [("x", "deleted")]
    go_on.set()
    assert engine.wait(30)
    assert engine.step() == []
    assert not engine.has_work()


def test_a_bug_of_the_library_is_one_requests_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: Any) -> Any:
        raise BaseException("the library has panicked")

    monkeypatch.setattr(grammar, "_compile", panic)
    outputs = run(engine, [request("x", [5], structured_outputs=outputs_of(regex="panic")), *plain()])
    assert "internal error" in (outputs["x"].error or "")
    assert outputs["plain"].finish_reason == "length"


def test_a_base_without_a_tokenizer_has_no_grammars(tiny_base_without_tokenizer: Path) -> None:
    engine = Engine(EngineConfig(model=str(tiny_base_without_tokenizer), dtype="float32", kv_memory=1 << 22))
    try:
        outputs = run(engine, [request("x", [5], structured_outputs=outputs_of(regex="a"))])
        assert "no tokenizer" in (outputs["x"].error or "")
    finally:
        engine.close()


def test_the_cache_is_bounded_and_grammars_are_renewed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_now = grammar._compile

    def noted(*args: Any) -> Any:
        compiled.append(args[0].regex)
        return compile_now(*args)

    monkeypatch.setattr(grammar, "_compile", noted)
    monkeypatch.setattr(grammar, "_MAX_CACHED", 2)
    monkeypatch.setattr(grammar, "_MAX_USES", 3)
    engine._grammars._cache.clear()
    for regex in ("r1", "r1", "r1", "r1", "r2", "r3", "r1", "r2"):
        engine.check_grammar(outputs_of(regex=regex))
    assert compiled == ["r1", "r1", "r2", "r3", "r1", "r2"]
    engine._grammars._cache.clear()


def test_what_params_take() -> None:
    with pytest.raises(RequestError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
