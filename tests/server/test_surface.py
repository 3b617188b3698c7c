"""The routes beside generation: tokens, methods, other origins, the description; and who may use what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from replies import assert_error
from running_server import BASE, RunningServer, running_server

from perft_serve.engine.messages import Submit
from perft_serve.server.config import ServerConfig
from perft_serve.server.keys import OPERATOR, AdapterAccess, parse_keys
from perft_serve.server.protocol import Text, Tokens

MESSAGES = [{"role": "user", "content": "hi"}]


class TestTokens:
    def test_a_prompt(self, server: RunningServer) -> None:
        body = server.http.post("/tokenize", json={"prompt": "hello wörld", "return_token_strs": True}).json()
        Tokens.model_validate(body, strict=True)
        used = server.complete(prompt="hello wörld", max_tokens=1, return_token_ids=True)
        assert body["tokens"] == used["choices"][0]["prompt_token_ids"]
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["max_model_len"] == 256
        assert "Ġ" in "".join(body["token_strs"])  # as they stand in the vocabulary
        back = server.http.post("/detokenize", json={"tokens": body["tokens"], "model": "routed"}).json()
        assert Text.model_validate(back, strict=True).prompt == "hello wörld"
        assert server.http.post("/tokenize", json={"prompt": "x"}).json()["token_strs"] is None

    def test_a_conversation(self, server: RunningServer) -> None:
        body = {"messages": MESSAGES, "add_generation_prompt": True}
        tokens = server.http.post("/tokenize", json={"model": BASE, **body}).json()["tokens"]
        used = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True})
        assert tokens == used.json()["prompt_token_ids"]

    def test_nothing_and_much(self, server: RunningServer) -> None:
        assert server.http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
        assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
        # More than the context holds can be counted
        assert server.http.post("/tokenize", json={"prompt": "x " * 400}).json()["count"] > 256
        longest = server.http.post("/tokenize", json={"prompt": "x " * 3000})
        assert_error(longest, 400, "6000 characters", param="prompt")

    @pytest.mark.parametrize(
        ("path", "body", "status", "param"),
        [
            ("/tokenize", {}, 400, "prompt"),
            ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "prompt"),
            ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
            ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
            ("/tokenize", {"prompt": "x", "colour": "red"}, 400, "colour"),
            ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
            ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
            ("/detokenize", {"tokens": [1, -1]}, 400, "tokens"),
            ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
            ("/detokenize", {"tokens": [1] * 257}, 400, "tokens"),
            ("/detokenize", {"tokens": ["x"]}, 400, "tokens[0]"),
            ("/detokenize", {}, 400, "tokens"),
            ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
        ],
    )
    def test_bad_input(
        self, server: RunningServer, path: str, body: dict[str, Any], status: int, param: str | None
    ) -> None:
        assert_error(server.http.post(path, json=body), status, param=param)

    def test_what_the_tokenizer_is(self, server: RunningServer) -> None:
        info = server.http.get("/tokenizer_info").json()
        assert info["tokenizer_class"]
        assert "<|im_start|>" in info["chat_template"]
        assert info["eos_token"] == "<|endoftext|>"
        assert "/tmp" not in json.dumps(info), "a path of the server"

    def test_a_base_without_tokenizer(
        self, start_server: Callable[..., RunningServer], tiny_base_without_tokenizer: Path
    ) -> None:
        server = start_server(model=str(tiny_base_without_tokenizer))
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            assert_error(server.http.post(path, json=body), 400, "no tokenizer")
        assert_error(server.http.get("/tokenizer_info"), 400, "no tokenizer")


class TestMethods:
    @pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{BASE}", "/health", "/ping", "/version", "/metrics"])
    def test_head_is_get_without_the_body(self, server: RunningServer, path: str) -> None:
        head, get = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":  # it grows
            assert head.headers["content-length"] == str(len(get.content))

    def test_options_says_what_there_is(self, server: RunningServer) -> None:
        for path, methods in (("/v1/adapters", "GET, HEAD, OPTIONS, POST"), ("/v1/completions", "OPTIONS, POST")):
            reply = server.http.options(path)
            assert (reply.status_code, reply.content) == (204, b"")
            assert reply.headers["allow"] == methods
        assert_error(server.http.options("/v1/nothing"), 404)

    def test_an_unknown_query_is_refused(self, server: RunningServer) -> None:
        for path in ("/v1/models", "/v1/adapters"):
            assert_error(server.http.get(path, params={"colour": "red"}), 400, "unknown field", param="colour")

    def test_an_encoded_body_is_refused(self, server: RunningServer) -> None:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        reply = server.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
        assert_error(reply, 415, "'gzip'")


class TestOrigins:
    def test_others_are_not_let_in_unless_allowed(self, server: RunningServer) -> None:
        reply = server.http.get("/v1/models", headers={"origin": "https://a.example"})
        assert not [name for name in reply.headers if name.startswith("access-control")]

    def test_an_allowed_one(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(allowed_origins=("https://a.example",), api_keys=("operator-key",)))
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization"
        asked = server.http.options("/v1/completions", headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        assert asked.headers["access-control-allow-headers"] == "authorization"
        assert "access-control-allow-credentials" not in asked.headers
        # Errors can be read too
        refused = server.post("/v1/completions", {"prompt": "hello"})
        assert "access-control-allow-origin" not in refused.headers
        refused = server.http.get("/v1/models", headers={"origin": "https://a.example"})
        assert_error(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = server.http.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


class TestDescription:
    def test_every_body_has_examples_that_are_valid(self, server: RunningServer) -> None:
        document = server.http.get("/openapi.json").json()
        num_examples = 0
        for path, operations in document["paths"].items():
            for operation in operations.values():
                for media in operation.get("requestBody", {}).get("content", {}).values():
                    assert media["examples"], path
                    for example in media["examples"].values():
                        num_examples += 1
                        reply = server.http.post(path, json=example["value"])
                        # Its adapter and sources are made up, its fields are not
                        assert reply.status_code in (200, 403, 404), reply.text
                        assert "field" not in reply.text
        assert num_examples > 8
        assert "securitySchemes" not in document["components"]

    def test_the_page_needs_no_other_server(self, server: RunningServer) -> None:
        reply = server.http.get("/docs")
        assert reply.headers["content-type"].startswith("text/html")
        for words in ("POST /v1/chat/completions", "max_completion_tokens", BASE, "curl"):
            assert words in reply.text
        assert "http://" not in reply.text
        assert "https://" not in reply.text
        assert "<script" not in reply.text


OPERATORS, ACMES = "operators-key-1", "acmes-key-1"
TENANTS_ONLY = [("GET", "/v1/models"), ("GET", f"/v1/models/{BASE}"), ("GET", "/tokenizer_info")]
OPERATORS_ONLY = [
    ("GET", "/metrics"),
    ("HEAD", "/metrics"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/routed"),
    ("DELETE", "/v1/adapters/routed"),
    ("POST", "/v1/adapters"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.fixture(scope="class")
def guarded(request: pytest.FixtureRequest) -> Any:
    keys = (
        OPERATORS,
        f"acme:{ACMES}",
        "beta:betas-key-1",
        "acme:acmes-key-2",
        "gamma:gammas-key-1",
        "delta:deltas-key-1",
    )
    adapters = ("gamma=rout*", "gamma=single", "gamma=new/*", "delta=")
    config = ServerConfig(api_keys=keys, tenant_adapters=adapters)
    with running_server(request.getfixturevalue("engine_config"), config) as server:
        yield server


class TestKeys:
    @staticmethod
    def bearer(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    def test_without_a_key(self, guarded: RunningServer) -> None:
        for path in ("/health", "/ready", "/ping", "/version", "/openapi.json", "/docs"):
            assert guarded.http.get(path).status_code == 200, path
        for method, path in (*TENANTS_ONLY, *OPERATORS_ONLY, ("POST", "/v1/completions"), ("POST", "/tokenize")):
            reply = guarded.http.request(method, path)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert_error(reply, 401, "Authorization: Bearer KEY")

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "Bearer",
            "Bearer nobodys-key",
            f"Basic {ACMES}",
            ACMES,
            f"Bearer {ACMES}x",
            f"Bearer acme:{ACMES}",
        ],
    )
    def test_a_bad_key(self, guarded: RunningServer, value: str) -> None:
        reply = guarded.http.get("/v1/models", headers={"authorization": value})
        assert_error(reply, 401)
        assert "nobody" not in reply.text

    def test_bytes_that_are_no_text(self, guarded: RunningServer) -> None:
        headers = [(b"authorization", b"Bearer \xff\xfe")]
        assert_error(guarded.http.get("/v1/models", headers=headers), 401)

    def test_a_tenants_key(self, guarded: RunningServer) -> None:
        for key in (ACMES, "acmes-key-2", "betas-key-1"):
            for method, path in TENANTS_ONLY:
                assert guarded.http.request(method, path, headers=self.bearer(key)).status_code == 200
            for method, path in OPERATORS_ONLY:
                assert guarded.http.request(method, path, headers=self.bearer(key)).status_code == 403
            body = {"model": "routed", "prompt": "hello", "max_tokens": 1}
            assert guarded.http.post("/v1/completions", json=body, headers=self.bearer(key)).status_code == 200
        lower = {"authorization": f"bearer  {ACMES}"}
        assert guarded.http.get("/v1/models", headers=lower).status_code == 200

    def test_the_operators_key(self, guarded: RunningServer) -> None:
        for method, path in (*TENANTS_ONLY, *OPERATORS_ONLY[:4]):
            assert guarded.http.request(method, path, headers=self.bearer(OPERATORS)).status_code == 200

    @pytest.mark.parametrize("key", ["gammas-key-1", "deltas-key-1"])
    def test_an_adapter_of_others_is_as_if_it_were_not_there(self, guarded: RunningServer, key: str) -> None:
        def ask(model: str) -> list[httpx.Response]:
            post, headers = guarded.http.post, self.bearer(key)
            return [
                post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 1}, headers=headers),
                post(
                    "/v1/completions",
                    json={"model": model, "prompt": "hi", "max_tokens": 1, "stream": True},
                    headers=headers,
                ),
                post("/v1/chat/completions", json={"model": model, "messages": MESSAGES}, headers=headers),
                post("/tokenize", json={"model": model, "prompt": "hi"}, headers=headers),
                post("/detokenize", json={"model": model, "tokens": [5]}, headers=headers),
                guarded.http.get(f"/v1/models/{model}", headers=headers),
            ]

        for theirs, nobodys in zip(ask("dense"), ask("nobody"), strict=True):
            assert_error(theirs, 404, "'dense' does not exist or you do not have access to it", param="model")
            assert theirs.text.replace("dense", "nobody") == nobodys.text
            assert set(theirs.headers) == set(nobodys.headers)
        assert [reply.status_code for reply in ask(BASE)] == [200] * 6
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key)
        with client, pytest.raises(openai.NotFoundError, match="do not have access"):
            client.completions.create(model="dense", prompt="hi")
        other = guarded.http.get("/v1/models/dense", headers=self.bearer(ACMES))
        assert other.status_code == 200

    def test_a_tenant_is_shown_what_it_may_use(self, guarded: RunningServer) -> None:
        def names(key: str, **query: Any) -> list[str]:
            page = guarded.http.get("/v1/models", params=query, headers=self.bearer(key)).json()
            return [model["id"] for model in page["data"]]

        everything = names(OPERATORS)
        assert names(ACMES) == everything
        assert {"dense", "embedded"} < set(everything)
        assert names("deltas-key-1") == [BASE]
        gammas = [BASE, *(name for name in everything if name in ("routed", "single"))]
        assert names("gammas-key-1") == gammas
        assert len(gammas) == 3
        body = {"prompt": "hi", "max_tokens": 1}
        for model in gammas:
            reply = guarded.http.post(
                "/v1/completions", json={"model": model, **body}, headers=self.bearer("gammas-key-1")
            )
            assert reply.status_code == 200
        # Page by page, none of which is short or tells of what is between
        found: list[str] = []
        query: dict[str, Any] = {"limit": 2}
        while True:
            page = guarded.http.get("/v1/models", params=query, headers=self.bearer("gammas-key-1")).json()
            found += [model["id"] for model in page["data"]]
            if not page["has_more"]:
                break
            assert len(page["data"]) == 2
            query["after"] = page["last_id"]
        assert found == gammas

    def test_administration_is_not_bound_to_it(self, guarded: RunningServer, tiny_adapters: Mapping[str, str]) -> None:
        headers = self.bearer("gammas-key-1")
        assert guarded.http.get("/v1/adapters/routed", headers=headers).status_code == 403
        assert guarded.http.get("/v1/adapters/dense", headers=self.bearer(OPERATORS)).status_code == 200
        # A name that comes later is judged as it comes
        guarded.client.catalog.register("new/one", tiny_adapters["dense"])
        body = {"model": "new/one", "prompt": "hi", "max_tokens": 1}
        assert guarded.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert_error(
            guarded.http.post("/v1/completions", json=body, headers=self.bearer("deltas-key-1")), 404, param="model"
        )

    def test_tenants_do_not_share_cached_prompts(self, guarded: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[object] = []
        link = guarded.client._link
        assert link is not None
        send = link.send

        def note(command: Any) -> None:
            seen.append(command)
            send(command)

        monkeypatch.setattr(link, "send", note)
        prompt = list(range(5, 69))

        def cached(key: str, salt: str | None = None) -> int:
            body = {"model": BASE, "prompt": prompt, "max_tokens": 1, "cache_salt": salt}
            reply = guarded.http.post("/v1/completions", json=body, headers=self.bearer(key)).json()
            return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached(ACMES) == 0
        assert cached(ACMES) > 0
        assert cached("acmes-key-2") > 0
        assert cached("betas-key-1") == 0
        assert cached(OPERATORS) == 0
        assert cached(OPERATORS, "acme\n") == 0  # a salt cannot name a tenant
        tenants = [command.requests[0].tenant for command in seen if isinstance(command, Submit)]
        assert tenants == ["acme"] * 3 + ["beta"] + [""] * 2

    def test_the_description_names_them(self, guarded: RunningServer) -> None:
        document = guarded.http.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
        assert "security" not in document["paths"]["/health"]["get"]

    def test_one_tenant_cannot_take_everything(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(api_keys=(f"acme:{ACMES}", "beta:betas-key-1"), max_tenant_requests=2))
        server.knobs.set(pace=0.02)
        body = {"model": BASE, "prompt": "hello", "max_tokens": 100, "n": 2, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body, headers=self.bearer(ACMES)) as reply:
            lines = reply.iter_lines()
            next(lines)
            short = {**body, "n": 1, "max_tokens": 1, "stream": False}
            refused = server.http.post("/v1/completions", json=short, headers=self.bearer(ACMES))
            assert_error(refused, 429, "2 of your completions")
            assert refused.headers["retry-after"] == "1"
            other = server.http.post("/v1/completions", json=short, headers=self.bearer("betas-key-1"))
            assert other.status_code == 200
        server.wait_until_idle()
        end = time.monotonic() + 5
        while server.http.post("/v1/completions", json=short, headers=self.bearer(ACMES)).status_code != 200:
            assert time.monotonic() < end
        many = server.http.post("/v1/completions", json={**short, "n": 3}, headers=self.bearer(ACMES))
        assert_error(many, 400, "at most 2")


def test_how_access_is_written() -> None:
    access = AdapterAccess(["acme=acme-*", "acme=shared/[ab]?", "beta="], {"acme", "beta", "gamma"})
    for tenant, adapter, expected in (
        ("acme", "acme-", True),
        ("acme", "acme-x/y", True),
        ("acme", "Acme-x", False),
        ("acme", "not-acme-x", False),
        ("acme", "acme", False),
        ("acme", "shared/b1", True),
        ("acme", "shared/b12", False),
        ("beta", "acme-x", False),
        ("gamma", "acme-x", True),
        (OPERATOR, "acme-x", True),
    ):
        assert access.allows(tenant, adapter) is expected, (tenant, adapter)
    keys = ("acme:acmes-key-1",)
    for bad, words in (
        ("acme", "TENANT=PATTERN"),
        ("=x", "TENANT=PATTERN"),
        ("a b=x", "TENANT=PATTERN"),
        ("beta=x", "no API key"),
        ("acme=a b", "no adapter's name"),
        ("acme=../x,y", "no adapter's name"),
    ):
        with pytest.raises(ValueError, match=words):
            ServerConfig(api_keys=keys, tenant_adapters=(bad,))
    with pytest.raises(ValueError, match="no API key"):
        ServerConfig(tenant_adapters=("acme=x",))


def test_how_keys_are_written() -> None:
    assert parse_keys(["secret-key", "acme:another-key", "acme:a:third:key"]) == {
        "secret-key": "",
        "another-key": "acme",
        "a:third:key": "acme",
    }
    for bad in ("", "short", "has a space", "acme:", ":secret-key", "a b:secret-key", "a\nb:secret-key", "k" * 513):
        with pytest.raises(ValueError, match="API key 1") as caught:
            parse_keys([bad])
        assert not bad or bad not in str(caught.value)
    with pytest.raises(ValueError, match="another tenant"):
        parse_keys(["acme:secret-key", "beta:secret-key"])
    assert "secret" not in repr(ServerConfig(api_keys=("secret-key",)))
