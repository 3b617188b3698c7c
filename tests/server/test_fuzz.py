"""Bodies that nobody has thought of, from the server's own description of itself: each is answered, none with a 5xx.

`bench/conformance` does the same with schemathesis and ten thousand cases; this is what runs each time, without the tool.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import BASE, RunningServer

from perft_serve.server.protocol import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorReply,
    LoadLoraRequest,
    TokenizeRequest,
    UnloadLoraRequest,
)

KINDS: dict[str, type[Any]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/adapters": AdapterRequest,
    "/v1/load_lora_adapter": LoadLoraRequest,
    "/v1/unload_lora_adapter": UnloadLoraRequest,
}
GENERATING = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
NUMBERS = st.one_of(
    st.integers(-5, 300), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
TEXTS = st.one_of(st.sampled_from([BASE, "", "hello", "fox", "user", "text", "json_object"]), st.text(max_size=20))
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "include_usage", "5"]), inner, max_size=4
        ),
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
    min_size=1,
    max_size=3,
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([BASE, "routed", "dense"]),
    "prompt": st.one_of(TEXTS, st.lists(st.integers(0, 200), max_size=8), st.lists(TEXTS, max_size=3)),
    "messages": MESSAGES,
    "max_tokens": st.integers(1, 8),
    "max_completion_tokens": st.integers(0, 8),
    "tokens": st.lists(st.integers(0, 400), max_size=8),
    "temperature": st.floats(0, 2),
    "n": st.integers(1, 3),
    "name": st.sampled_from(["new", BASE, "a name"]),
    "lora_name": st.sampled_from(["new", BASE, "a name"]),
    "source": st.sampled_from(["org/name", "s3://bucket/key", ""]),
    "lora_path": st.sampled_from(["org/name", "s3://bucket/key", ""]),
    "stream": st.booleans(),
}


def bodies(kind: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly good fields where they must be, and any values in a few of the others."""

    def field(name: str) -> st.SearchStrategy[Any]:
        good = GOOD.get(name)
        return st.one_of(st.none(), VALUES) if good is None else st.one_of(*[good] * 7, VALUES)

    fields = kind.model_fields
    needed = {name for name, each in fields.items() if each.is_required()} | ({"max_tokens", "prompt"} & set(fields))
    others = [(name, field(name)) for name in fields if name not in needed]
    some = st.lists(st.sampled_from(others), max_size=3, unique_by=lambda item: item[0]) if others else st.just([])
    return st.one_of(
        st.fixed_dictionaries({name: GOOD.get(name, VALUES) for name in sorted(needed)}),
        some.flatmap(
            lambda chosen: st.fixed_dictionaries({**{name: field(name) for name in sorted(needed)}, **dict(chosen)})
        ),
    )


@pytest.mark.parametrize("path", KINDS)
def test_no_body_is_too_much(server: RunningServer, path: str) -> None:
    statuses: set[int] = set()

    @settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies(KINDS[path]))
    def send(body: dict[str, Any]) -> None:
        reply = server.http.post(path, json=body)
        statuses.add(reply.status_code)
        assert reply.status_code < 500, (body, reply.text)
        assert reply.headers["x-request-id"]
        if reply.status_code >= 400:
            ErrorReply.model_validate(reply.json(), strict=True)

    send()
    assert len(statuses) > 1, f"all of them were {statuses}: nothing was tried"
    assert 200 in statuses or path not in GENERATING
