"""Adapters over HTTP, under load: what is loaded, reloaded, deleted or broken, and which tokens requests get meanwhile.

What is right is said by `LLM`, one prompt and one adapter at a time.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import torch
from peft import PeftModel
from replies import assert_error, events_of
from running_server import BASE, RunningServer, running_server
from tiny import random_lora
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from perft_serve import LLM, SamplingParams
from perft_serve.adapters.catalog import CONFIG_FILE
from perft_serve.adapters.store import RETRY_SECONDS
from perft_serve.engine.config import EngineConfig
from perft_serve.server.config import ServerConfig
from perft_serve.server.protocol import AdapterCard, AdapterList, ModelList

ADAPTERS, COMPLETIONS, CHAT = "/v1/adapters", "/v1/completions", "/v1/chat/completions"
PROMPT = "hello world, the quick brown fox"
SLOW = 0.02
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def llm(tiny_base: Path, tiny_adapters: Mapping[str, str]) -> LLM:
    return LLM(str(tiny_base), dict(tiny_adapters), dtype="float32", device="cpu", kv_memory=1 << 22)


@pytest.fixture(scope="session")
def tokens_of(llm: LLM) -> Callable[..., list[int]]:
    """Greedy tokens of one of `tiny_adapters`, or of the base, alone."""
    known: dict[tuple[str | None, int], list[int]] = {}

    def tokens(adapter: str | None, num_tokens: int) -> list[int]:
        if (adapter, num_tokens) not in known:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            known[adapter, num_tokens] = llm.generate(PROMPT, params, adapter=adapter)[0].outputs[0].token_ids
        return known[adapter, num_tokens]

    return tokens


def fill(folder: Path, tiny_adapters: Mapping[str, str]) -> Path:
    """Puts `tiny_adapters` into a folder of adapters."""
    for name, source in tiny_adapters.items():
        shutil.copytree(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_adapters: Mapping[str, str]) -> Path:
    """The folder of adapters of the server that most tests share, with all of `tiny_adapters` in it."""
    return fill(tmp_path_factory.mktemp("shared") / "adapters", tiny_adapters)


@pytest.fixture(scope="module")
def shared_server(engine_config: EngineConfig, folder: Path) -> Iterator[RunningServer]:
    config = replace(engine_config, adapters={}, adapter_dir=str(folder))
    with running_server(config, ServerConfig()) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer, folder: Path, tiny_adapters: Mapping[str, str]) -> Iterator[RunningServer]:
    """The shared server; afterwards it is idle and healthy, and has the folder's adapters only."""
    server = shared_server
    yield server
    server.knobs.reset()
    server.wait_until_idle()
    assert server.http.get("/health").status_code == 200
    for other in {each["id"] for each in server.http.get(ADAPTERS).json()["data"]} - {*tiny_adapters}:
        assert server.http.delete(f"{ADAPTERS}/{other}").status_code == 200
    for path in folder.iterdir():
        if path.is_symlink():
            path.unlink()
        elif path.name not in tiny_adapters:
            shutil.rmtree(path)


@pytest.fixture
def spare(folder: Path) -> Path:
    """A sub-folder of the folder of adapters that is not there yet."""
    return folder / f"spare-{next(_numbers)}"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def request_of(model: str, num_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0}
    return {**body, "ignore_eos": True, "return_token_ids": True, **fields}


def ask(server: RunningServer, model: str, num_tokens: int = 8, **fields: Any) -> list[int]:
    """The tokens of a completion."""
    reply = server.http.post(COMPLETIONS, json=request_of(model, num_tokens, **fields))
    assert reply.status_code == 200, reply.text
    tokens: list[int] = reply.json()["choices"][0]["token_ids"]
    return tokens


def follow(server: RunningServer, model: str, num_tokens: int) -> list[Any]:
    """The events of a stream, to its end."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        body = request_of(model, num_tokens, stream=True)
        with http.stream("POST", COMPLETIONS, json=body) as reply:
            assert reply.status_code == 200, reply.read()
            return events_of(reply.read().decode())


def tokens_in(events: list[Any]) -> list[int]:
    return [token for event in events if "choices" in event for token in event["choices"][0].get("token_ids", [])]


def register(server: RunningServer, name: str, source: Path | str, **fields: Any) -> httpx.Response:
    return server.http.post(ADAPTERS, json={"name": name, "source": str(source), **fields}, timeout=60)


def card_of(reply: httpx.Response) -> AdapterCard:
    return msgspec.json.decode(reply.content, type=AdapterCard)


def card(server: RunningServer, name: str) -> AdapterCard:
    reply = server.http.get(f"{ADAPTERS}/{name}")
    assert reply.status_code == 200, reply.text
    return card_of(reply)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def running(server: RunningServer, number: int) -> None:
    server.wait_until(lambda stats: stats.num_running >= number)


def break_weights(adapter: Path) -> None:
    """Cuts an adapter's weights in half."""
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class TestRegister:
    def test_loaded_and_served(self, server: RunningServer, folder: Path, tokens_of: Callable[..., list[int]]) -> None:
        reply = register(server, "org/new:1", folder / "dense")
        assert reply.status_code == 201, reply.text
        loaded = card_of(reply)
        assert loaded.state in ("host", "resident")
        assert (loaded.id, loaded.version, loaded.pinned, loaded.error) == ("org/new:1", 1, False, None)
        assert (loaded.variant, loaded.unit, loaded.num_experts, loaded.r) == ("D", "lora", 2, 3)
        assert loaded.num_bytes is not None
        assert loaded.num_bytes > 0
        assert ask(server, "org/new:1") == tokens_of("dense", 8)
        after = card(server, "org/new:1")
        assert after.state == "resident"
        assert after.last_used is not None
        assert abs(after.last_used - time.time()) < 60
        model = server.http.get("/v1/models/org/new:1").json()
        assert model["parent"] == BASE
        assert model["adapter"]["digest"] == after.digest

    def test_first_use_of_a_name_that_the_folder_holds(
        self, server: RunningServer, folder: Path, spare: Path, tokens_of: Callable[..., list[int]]
    ) -> None:
        name = spare.name
        assert_error(server.http.post(COMPLETIONS, json=request_of(name)), 404, f"'{name}'", param="model")
        assert_error(server.http.get(f"{ADAPTERS}/{name}"), 404, f"'{name}'")
        shutil.copytree(folder / "routed", spare)
        assert card(server, name).state == "registered"
        assert card(server, name).variant is None
        assert "adapter" not in server.http.get(f"/v1/models/{name}").json()
        assert ask(server, name) == tokens_of("routed", 8)
        assert card(server, name).variant == "R"

    def test_registering_only_reads_nothing(
        self, server: RunningServer, folder: Path, spare: Path, tokens_of: Callable[..., list[int]]
    ) -> None:
        reply = register(server, "soon", spare, load=False)
        assert reply.status_code == 201, reply.text
        assert card_of(reply).state == "registered"
        for path, body in (
            (COMPLETIONS, {"prompt": "hi"}),
            (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            for stream in (False, True):
                failed = server.http.post(path, json={"model": "soon", "stream": stream, **body})
                assert_error(failed, 422, "'soon'", param="model")
                assert str(folder) not in failed.text
        assert card(server, "soon").state == "failed"
        assert "does not exist" in (card(server, "soon").error or "")
        # A request that comes a little later tries again
        time.sleep(RETRY_SECONDS)
        shutil.copytree(folder / "embedded", spare)
        assert ask(server, "soon") == tokens_of("embedded", 8)
        assert card(server, "soon").error is None

    def test_warmed_and_pinned_without_a_source(self, server: RunningServer, folder: Path, spare: Path) -> None:
        shutil.copytree(folder / "routed", spare)
        assert server.http.post(ADAPTERS, json={"name": spare.name, "load": False}).json()["state"] == "registered"
        assert server.http.post(ADAPTERS, json={"name": spare.name}).json()["pinned"] is False
        reply = server.http.post(ADAPTERS, json={"name": spare.name, "pin": True})
        assert reply.status_code == 200, reply.text
        assert card_of(reply).pinned
        assert card_of(reply).state == "resident"
        assert_error(server.http.post(ADAPTERS, json={"name": "nobody"}), 404, "'nobody'", param="name")

    def test_a_broken_adapter_is_refused_and_hurts_nobody(
        self,
        server: RunningServer,
        folder: Path,
        spare: Path,
        pool: ThreadPoolExecutor,
        tokens_of: Callable[..., list[int]],
    ) -> None:
        name = spare.name
        shutil.copytree(folder / "routed", spare)
        break_weights(spare)
        server.knobs.set(pace=SLOW)
        others = [pool.submit(ask, server, name, 40) for name in ("dense", BASE)]
        running(server, 2)
        for _ in range(2):
            refused = register(server, "new", spare)
            assert_error(refused, 422, "'new'", "whole", param="source")
        for stream in (False, True):
            asked = server.http.post(COMPLETIONS, json=request_of(name, stream=stream))
            assert_error(asked, 422, f"'{name}'", "whole", param="model")
        assert str(folder) not in refused.text + asked.text
        assert_error(server.http.get(f"{ADAPTERS}/new"), 404, "'new'")
        assert card(server, name).state == "failed"
        assert [other.result() for other in others] == [tokens_of("dense", 40), tokens_of(None, 40)]


class TestReload:
    def test_under_traffic(
        self, server: RunningServer, folder: Path, pool: ThreadPoolExecutor, tokens_of: Callable[..., list[int]]
    ) -> None:
        first = card_of(register(server, "x", folder / "routed"))
        server.knobs.set(pace=SLOW)
        old = [pool.submit(follow, server, "x", 60) for _ in range(3)]
        running(server, 3)
        start = time.monotonic()
        reply = register(server, "x", folder / "dense")
        assert reply.status_code == 200, reply.text
        assert not any(stream.done() for stream in old), "it has waited for requests in flight"
        assert time.monotonic() - start < 5
        second = card_of(reply)
        assert second.version > first.version
        assert second.digest != first.digest
        new = [pool.submit(ask, server, "x", 30) for _ in range(3)]
        assert [stream.result() for stream in new] == [tokens_of("dense", 30)] * 3
        assert [tokens_in(stream.result()) for stream in old] == [tokens_of("routed", 60)] * 3
        assert tokens_of("routed", 30) != tokens_of("dense", 30)

    def test_what_cannot_be_loaded_leaves_the_old_version(
        self, server: RunningServer, folder: Path, spare: Path, tokens_of: Callable[..., list[int]]
    ) -> None:
        before = card_of(register(server, "x", folder / "routed"))
        shutil.copytree(folder / "dense", spare)
        break_weights(spare)
        assert_error(register(server, "x", spare), 422, "whole", param="source")
        after = card(server, "x")
        assert (after.version, after.digest, after.error) == (before.version, before.digest, None)
        assert ask(server, "x") == tokens_of("routed", 8)
        later = card_of(register(server, "x", folder / "single"))
        assert later.version > before.version
        assert ask(server, "x") == tokens_of("single", 8)

    def test_many_at_a_time_are_one_after_the_other(
        self,
        server: RunningServer,
        folder: Path,
        pool: ThreadPoolExecutor,
        tiny_adapters: Mapping[str, str],
        tokens_of: Callable[..., list[int]],
    ) -> None:
        digests = {card_of(register(server, f"{name}-too", folder / name)).digest: name for name in tiny_adapters}
        asked = [pool.submit(register, server, "x", folder / name) for name in [*tiny_adapters] * 3]
        cards = [card_of(each.result()) for each in asked]
        versions = sorted(each.version for each in cards)
        assert versions == list(range(versions[0], versions[0] + len(cards)))
        assert sum(each.result().status_code == 201 for each in asked) == 1
        last = card(server, "x")
        assert last.version == versions[-1]
        assert ask(server, "x") == tokens_of(digests[last.digest], 8)

    def test_requests_during_reloads_take_one_version_or_the_other(
        self, server: RunningServer, folder: Path, pool: ThreadPoolExecutor, tokens_of: Callable[..., list[int]]
    ) -> None:
        register(server, "x", folder / "routed")
        right = [tokens_of(name, 12) for name in ("routed", "dense")]
        asked = [pool.submit(ask, server, "x", 12) for _ in range(24)]
        for turn in range(8):
            assert register(server, "x", folder / ("dense", "routed")[turn % 2]).status_code == 200
            asked.append(pool.submit(ask, server, "x", 12))
        for each in asked:
            assert each.result() in right
        assert ask(server, "x", 12) == right[0]


class TestPin:
    def test_it_stays_over_a_reload_until_it_is_taken_back(self, server: RunningServer, folder: Path) -> None:
        def pinned(**fields: Any) -> bool:
            reply = server.http.post(ADAPTERS, json={"name": "x", **fields})
            assert reply.status_code in (200, 201), reply.text
            assert card(server, "x") == card_of(reply)
            return card_of(reply).pinned

        sources = [str(folder / name) for name in ("routed", "dense")]
        assert not pinned(source=sources[0])
        assert pinned(pin=True)
        assert pinned()
        assert pinned(source=sources[1])
        body = {"lora_name": "x", "lora_path": sources[0], "load_inplace": True}
        assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert card(server, "x").pinned
        unread = server.http.post(ADAPTERS, json={"name": "x", "source": sources[1], "load": False})
        assert_error(unread, 400, "'x' is pinned", param="load")
        assert pinned(pin=None)
        assert not pinned(pin=False, load=False)
        assert not pinned(source=sources[1])
        assert pinned(pin=True)
        assert not pinned(source=sources[0], pin=False)
        assert pinned(pin=True)
        assert not pinned(source=sources[0], pin=False, load=False)

    def test_a_reload_needs_no_room_for_two_pinned_ones(
        self,
        start_server: Callable[..., RunningServer],
        tmp_path: Path,
        tiny_adapters: Mapping[str, str],
        tokens_of: Callable[..., list[int]],
    ) -> None:
        folder = fill(tmp_path / "adapters", tiny_adapters)
        size = card_of(register(start_server(adapters={}, adapter_dir=str(folder)), "x", folder / "routed")).num_bytes
        assert size is not None
        server = start_server(adapters={}, adapter_dir=str(folder), adapter_memory=size + size // 4)
        assert card_of(register(server, "x", folder / "routed", pin=True)).pinned
        assert_error(register(server, "x", folder / "dense", pin=True), 422, "cannot be pinned", param="source")
        assert card(server, "x").version == 1
        wait_for(lambda: [*server.client._statuses["x"]] == [1])
        reloaded = card_of(register(server, "x", folder / "dense"))
        assert (reloaded.version, reloaded.pinned, reloaded.state) == (3, True, "resident")
        assert ask(server, "x") == tokens_of("dense", 8)


class TestDelete:
    def test_its_requests_are_waited_for(
        self, server: RunningServer, folder: Path, pool: ThreadPoolExecutor, tokens_of: Callable[..., list[int]]
    ) -> None:
        register(server, "x", folder / "routed")
        server.knobs.set(pace=SLOW)
        stream = pool.submit(follow, server, "x", 60)
        running(server, 1)
        deletion = pool.submit(server.http.delete, f"{ADAPTERS}/x")
        wait_for(lambda: server.http.get(f"{ADAPTERS}/x").status_code == 404)
        for path in (COMPLETIONS, CHAT):
            for streamed in (False, True):
                asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": PROMPT}
                refused = server.http.post(path, json={"model": "x", "stream": streamed, **asked})
                assert_error(refused, 404, "'x'", param="model")
        assert not deletion.done()
        assert not stream.done()
        assert deletion.result().json() == {"id": "x", "object": "adapter", "deleted": True}
        assert tokens_in(stream.result()) == tokens_of("routed", 60)
        assert "x" not in [model["id"] for model in server.http.get("/v1/models").json()["data"]]

    def test_force_ends_its_requests_and_no_others(
        self, server: RunningServer, folder: Path, pool: ThreadPoolExecutor, tokens_of: Callable[..., list[int]]
    ) -> None:
        register(server, "x", folder / "routed")
        server.knobs.set(pace=SLOW)
        stream = pool.submit(follow, server, "x", 200)
        whole = pool.submit(server.http.post, COMPLETIONS, json=request_of("x", 200))
        # Of the same content, under another name
        other = pool.submit(ask, server, "routed", 60)
        running(server, 3)
        start = time.monotonic()
        assert server.http.delete(f"{ADAPTERS}/x", params={"force": True}).status_code == 200
        assert time.monotonic() - start < 3
        events = stream.result()
        assert events[-1]["error"]["code"] == 404
        assert "'x'" in events[-1]["error"]["message"]
        assert "deleted" in events[-1]["error"]["message"]
        assert tokens_in(events) == tokens_of("routed", 200)[: len(tokens_in(events))]
        assert_error(whole.result(), 404, "'x'", "deleted", param="model")
        assert other.result() == tokens_of("routed", 60)

    def test_one_that_waits_can_be_forced(self, server: RunningServer, folder: Path, pool: ThreadPoolExecutor) -> None:
        register(server, "x", folder / "routed")
        server.knobs.set(pace=SLOW)
        stream = pool.submit(follow, server, "x", 240)
        running(server, 1)
        deletion = pool.submit(server.http.delete, f"{ADAPTERS}/x")
        wait_for(lambda: server.http.get(f"{ADAPTERS}/x").status_code == 404)
        assert_error(server.http.delete(f"{ADAPTERS}/x"), 404)
        assert not deletion.done()
        start = time.monotonic()
        assert server.http.delete(f"{ADAPTERS}/x", params={"force": True}).status_code == 200
        assert deletion.result().status_code == 200
        assert time.monotonic() - start < 3
        assert "deleted" in stream.result()[-1]["error"]["message"]
        assert_error(server.http.delete(f"{ADAPTERS}/x", params={"force": True}), 404)

    def test_it_goes_on_when_its_client_hangs_up(
        self,
        start_server: Callable[..., RunningServer],
        tmp_path: Path,
        tiny_adapters: Mapping[str, str],
        pool: ThreadPoolExecutor,
        tokens_of: Callable[..., list[int]],
    ) -> None:
        folder = fill(tmp_path / "adapters", tiny_adapters)
        server = start_server(adapters={}, adapter_dir=str(folder))
        register(server, "x", folder / "routed")
        server.knobs.set(pace=SLOW)
        stream = pool.submit(follow, server, "x", 60)
        running(server, 1)
        with socket.create_connection(server.address) as connection:
            connection.sendall(b"DELETE /v1/adapters/x HTTP/1.1\r\nhost: x\r\n\r\n")
            wait_for(lambda: server.http.get(f"{ADAPTERS}/x").status_code == 404)
        assert tokens_in(stream.result()) == tokens_of("routed", 60)
        wait_for(lambda: server.client.stats().adapters.num_resident == 0)
        # Its name is free, and a new one of that name is not touched
        assert register(server, "x", folder / "single").status_code == 201
        assert ask(server, "x") == tokens_of("single", 8)

    def test_a_name_of_the_folder_stays_away_until_it_is_registered(
        self, server: RunningServer, folder: Path, spare: Path, tokens_of: Callable[..., list[int]]
    ) -> None:
        name = spare.name
        shutil.copytree(folder / "routed", spare)
        ask(server, name)
        assert server.http.delete(f"{ADAPTERS}/{name}").status_code == 200
        assert_error(server.http.post(COMPLETIONS, json=request_of(name)), 404, f"'{name}'", param="model")
        assert_error(server.http.post(ADAPTERS, json={"name": name}), 404, f"'{name}'", param="name")
        assert register(server, name, spare).status_code == 201
        assert ask(server, name) == tokens_of("routed", 8)

    def test_what_is_in_no_memory(self, server: RunningServer, folder: Path, spare: Path) -> None:
        register(server, "x", spare, load=False)
        assert_error(server.http.post(COMPLETIONS, json=request_of("x")), 422, param="model")
        assert server.http.delete(f"{ADAPTERS}/x").status_code == 200
        # The last of three versions was never loaded
        register(server, "y", folder / "routed")
        assert_error(register(server, "y", spare), 422, param="source")
        register(server, "y", folder / "dense", load=False)
        assert server.http.delete(f"{ADAPTERS}/y").status_code == 200
        shutil.copytree(folder / "routed", spare)
        assert server.http.delete(f"{ADAPTERS}/{spare.name}").status_code == 200

    @pytest.mark.parametrize("is_there", [True, False])
    def test_what_is_being_loaded_for_the_name_does_not_come(
        self,
        server: RunningServer,
        folder: Path,
        pool: ThreadPoolExecutor,
        tokens_of: Callable[..., list[int]],
        is_there: bool,
    ) -> None:
        if is_there:
            register(server, "x", folder / "routed")
        server.knobs.set(pace=0.5)
        load = pool.submit(register, server, "x", folder / "dense")
        wait_for(lambda: "x" in server.client.catalog._preparing)
        assert server.http.delete(f"{ADAPTERS}/x").status_code == 200
        assert_error(load.result(), 409, "'x' was deleted while it was loaded", param="name")
        server.knobs.reset()
        assert_error(server.http.get(f"{ADAPTERS}/x"), 404)
        assert_error(server.http.delete(f"{ADAPTERS}/x"), 404)
        wait_for(lambda: "x" not in server.client._statuses)
        assert register(server, "x", folder / "single").status_code == 201
        assert ask(server, "x") == tokens_of("single", 8)

    def test_a_folder_that_is_taken_away_leaves_the_memory_too(
        self, server: RunningServer, folder: Path, spare: Path
    ) -> None:
        for path in (ADAPTERS, "/v1/models", "/metrics"):
            shutil.copytree(folder / "routed", spare)
            assert server.http.post(ADAPTERS, json={"name": spare.name, "pin": True}).json()["pinned"]
            assert server.client._statuses[spare.name]
            shutil.rmtree(spare)
            assert server.http.get(path).status_code == 200
            assert_error(server.http.get(f"{ADAPTERS}/{spare.name}"), 404)
            wait_for(lambda: spare.name not in server.client._statuses)

    def test_what_is_not_there(self, server: RunningServer) -> None:
        for name in ("nobody", BASE, "no/body", "..", "%2e%2e/routed"):
            assert_error(server.http.delete(f"{ADAPTERS}/{name}"), 404)
        assert_error(server.http.delete(f"{ADAPTERS}/routed", params={"force": "perhaps"}), 400, param="force")
        assert_error(server.http.delete(f"{ADAPTERS}/routed", params={"wait": 1}), 400, "unknown", param="wait")
        assert server.http.get(f"{ADAPTERS}/routed").status_code == 200


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "param", "words"),
        [
            ({}, 400, "name", ["missing"]),
            ({"name": 3}, 400, "name", ["string"]),
            ({"name": "x", "source": 3}, 400, "source", ["string"]),
            ({"name": "x", "pin": "yes"}, 400, "pin", ["boolean"]),
            ({"name": "x", "load": None}, 400, "load", ["boolean"]),
            ({"name": "x", "path": "y"}, 400, "path", ["unknown field 'path'"]),
            ({"name": "routed", "pin": True, "load": False}, 400, "pin", ["leave out load"]),
            ({"name": BASE, "source": "{folder}/routed"}, 409, "name", ["the base's name"]),
            ({"name": "", "source": "{folder}/routed"}, 400, "name", ["name"]),
            ({"name": ".hidden", "source": "{folder}/routed"}, 400, "name", ["name"]),
            ({"name": "x" * 300, "source": "{folder}/routed"}, 400, "name", ["name"]),
            ({"name": "<base>", "source": "{folder}/routed"}, 400, "name", ["name"]),
            ({"name": "x", "source": ""}, 400, "source", ["at least 1"]),
            ({"name": "x", "source": "/etc"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "{folder}/../secret"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "{folder}/routed/../../secret"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "{folder}x/secret"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "{folder}/link"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "org/adapter"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "hf://org/adapter"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "s3://bucket/adapter"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "memory://adapter"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "file:///etc"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "/a\0b"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "~nobody-at-all/x"}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "a" * 500}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": " "}, 403, "source", ["--allow-adapter-source"]),
            ({"name": "x", "source": "a" * 5000}, 400, "source", ["1024"]),
        ],
    )
    def test_a_bad_body(
        self, server: RunningServer, folder: Path, body: dict[str, Any], status: int, param: str, words: list[str]
    ) -> None:
        shutil.copytree(folder / "routed", folder.parent / "secret", dirs_exist_ok=True)
        (folder / "link").symlink_to(folder.parent / "secret")
        body = {key: value.replace("{folder}", str(folder)) if key == "source" and isinstance(value, str) else value
                for key, value in body.items()}  # fmt: skip
        assert_error(server.http.post(ADAPTERS, json=body), status, *words, param=param)
        assert_error(server.http.get(f"{ADAPTERS}/x"), 404)

    def test_names_that_climb(self, server: RunningServer, folder: Path) -> None:
        shutil.copytree(folder / "routed", folder.parent / "secret", dirs_exist_ok=True)
        for name in ("../secret", "routed/../../secret", "a/../../secret", str(folder.parent / "secret"), "."):
            assert_error(server.http.post(COMPLETIONS, json=request_of(name)), 404, param="model")
            assert server.http.post(ADAPTERS, json={"name": name}).status_code == 404

    def test_an_allowed_source(
        self,
        start_server: Callable[..., RunningServer],
        tmp_path: Path,
        folder: Path,
        tokens_of: Callable[..., list[int]],
    ) -> None:
        shutil.copytree(folder / "dense", tmp_path / "elsewhere" / "it")
        server = start_server(
            ServerConfig(allow_adapter_sources=(str(tmp_path / "elsewhere"),)), adapters={}, adapter_dir=str(folder)
        )
        assert register(server, "it", tmp_path / "elsewhere" / "it").status_code == 201
        assert ask(server, "it") == tokens_of("dense", 8)
        assert register(server, "also", folder / "dense").status_code == 201
        assert_error(register(server, "no", tmp_path), 403, param="source")

    def test_wrong_types_and_paths(self, server: RunningServer) -> None:
        body = json.dumps({"name": "routed"})
        assert_error(server.http.post(ADAPTERS, content=body), 415, "application/json")
        assert_error(server.http.post(ADAPTERS, content="{", headers={"content-type": "application/json"}), 400)
        assert_error(server.http.put(ADAPTERS, json={}), 405)
        for query, param in (
            ("limit=0", "limit"),
            ("limit=x", "limit"),
            ("limit=100000", "limit"),
            ("order=asc", "order"),
        ):
            assert_error(server.http.get(f"{ADAPTERS}?{query}"), 400, param=param)
        assert_error(server.http.get(f"{ADAPTERS}?state=happy"), 400, "'resident'", param="state")
        assert_error(server.http.get("/v1/models?limit=-1"), 400, param="limit")

    def test_no_path_is_shown(self, server: RunningServer, folder: Path) -> None:
        register(server, "x", folder / "routed")
        register(server, "gone", folder / "not-there", load=False)
        server.http.post(COMPLETIONS, json=request_of("gone"))
        shown = "".join(
            server.http.get(path).text
            for path in (ADAPTERS, f"{ADAPTERS}/x", f"{ADAPTERS}/gone", "/v1/models", "/v1/models/x", "/metrics")
        )
        assert str(folder) not in shown
        assert not re.search(r"/(tmp|var|etc)\b", shown)


class TestVllmsRoutes:
    LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

    def test_a_lora_as_vllm_knows_it(
        self, server: RunningServer, spare: Path, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        random_lora(spare, base, r=4, target_modules=["q_proj", "v_proj"])
        random_lora(
            spare.with_name(f"{spare.name}-mlp"), base, r=2, target_parameters=["mlp.gate.weight"], target_modules=[]
        )
        assert server.http.post(self.LOAD, json={"lora_name": "x", "lora_path": str(spare)}).status_code == 200
        prompt = torch.tensor([tiny_tokenizer(PROMPT)["input_ids"]])
        oracle = PeftModel.from_pretrained(base, str(spare)).eval()
        wanted = oracle.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert ask(server, "x") == wanted[0, prompt.shape[1] :].tolist()
        loaded = card(server, "x")
        assert (loaded.variant, loaded.targets, loaded.r) == ("LoRA", ("q_proj", "v_proj"), 4)
        told = server.http.post(COMPLETIONS, json=request_of("x", return_routing=True))
        assert_error(told, 400, "'x' is a LoRA and has no adapter experts")
        refused = server.http.post(self.LOAD, json={"lora_name": "y", "lora_path": f"{spare}-mlp"})
        assert_error(refused, 400, "it is a LoRA on router", "q_proj, k_proj, v_proj, o_proj", param="lora_path")

    def test_load_reload_and_unload(
        self, server: RunningServer, folder: Path, tokens_of: Callable[..., list[int]]
    ) -> None:
        body = {"lora_name": "x", "lora_path": str(folder / "routed")}
        loaded = server.http.post(self.LOAD, json=body)
        assert loaded.status_code == 200, loaded.text
        assert loaded.text == "Success: LoRA adapter 'x' added successfully."
        assert ask(server, "x") == tokens_of("routed", 8)
        again = server.http.post(self.LOAD, json=body)
        assert_error(again, 400, "has already been loaded", "load_inplace", param="lora_name")
        body["lora_path"] = str(folder / "dense")
        assert server.http.post(self.LOAD, json={**body, "load_inplace": True}).status_code == 200
        assert ask(server, "x") == tokens_of("dense", 8)
        unloaded = server.http.post(self.UNLOAD, json={"lora_name": "x", "lora_int_id": 1})
        assert unloaded.status_code == 200, unloaded.text
        assert unloaded.text == "Success: LoRA adapter 'x' removed successfully."
        assert_error(server.http.post(self.UNLOAD, json={"lora_name": "x"}), 404, "'x'", param="lora_name")
        assert_error(server.http.post(COMPLETIONS, json=request_of("x")), 404, param="model")

    def test_refusals(self, server: RunningServer, folder: Path, spare: Path) -> None:
        good = {"lora_name": "x", "lora_path": str(folder / "routed")}
        shutil.copytree(folder / "single", spare)
        break_weights(spare)
        for change, status, param in (
            ({"lora_name": None}, 400, "lora_name"),
            ({"lora_name": ""}, 400, "lora_name"),
            ({"lora_path": ""}, 400, "lora_path"),
            ({"lora_path": "/etc"}, 403, "lora_path"),
            ({"lora_path": str(spare)}, 400, "lora_path"),
            ({"lora_path": str(folder / "not-there")}, 400, "lora_path"),
            ({"lora_name": BASE}, 409, "lora_name"),
            ({"is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
            ({"colour": "red"}, 400, "colour"),
        ):
            assert_error(server.http.post(self.LOAD, json={**good, **change}), status, param=param)
        assert server.http.post(self.LOAD, json={**good, "is_3d_lora_weight": False}).status_code == 200


class TestLists:
    def test_pages(self, server: RunningServer, folder: Path, spare: Path, tiny_adapters: Mapping[str, str]) -> None:
        shutil.copytree(folder / "routed", spare)
        names = sorted([*tiny_adapters, spare.name])
        for name in tiny_adapters:
            ask(server, name)
        whole = msgspec.json.decode(server.http.get(ADAPTERS).content, type=AdapterList)
        assert [each.id for each in whole.data] == names
        assert (whole.first_id, whole.last_id, whole.has_more) == (names[0], names[-1], False)
        found: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = msgspec.json.decode(
                server.http.get(ADAPTERS, params={"limit": 3, **after}).content, type=AdapterList
            )
            found += [each.id for each in page.data]
            if not page.has_more:
                break
            assert len(page.data) == 3
            assert page.last_id is not None
            after = {"after": page.last_id}
        assert found == names
        resident = server.http.get(ADAPTERS, params={"state": "resident"}).json()
        assert [each["id"] for each in resident["data"]] == sorted(tiny_adapters)
        unread = server.http.get(ADAPTERS, params={"state": "registered", "limit": 1}).json()
        assert [each["id"] for each in unread["data"]] == [spare.name]
        beyond = server.http.get(ADAPTERS, params={"after": "zzz"}).json()
        assert beyond == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}

    def test_pages_of_models(self, server: RunningServer, tiny_adapters: Mapping[str, str]) -> None:
        names = [BASE, *sorted(tiny_adapters)]
        found: list[str] = []
        after: dict[str, str] = {}
        for _ in names:
            page = msgspec.json.decode(
                server.http.get("/v1/models", params={"limit": 1, **after}).content, type=ModelList
            )
            assert (page.first_id, page.last_id) == (page.data[0].id, page.data[0].id)
            found.append(page.data[0].id)
            assert page.has_more == (len(found) < len(names))
            after = {"after": found[-1]}
        assert found == names
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == names

    def test_a_folder_with_the_bases_name_is_no_adapter(self, server: RunningServer, folder: Path) -> None:
        shutil.copytree(folder / "routed", folder / BASE)
        ids = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
        assert ids.count(BASE) == 1
        assert BASE not in [each["id"] for each in server.http.get(ADAPTERS).json()["data"]]
        assert_error(server.http.get(f"{ADAPTERS}/{BASE}"), 404)

    def test_ten_thousand_names(
        self,
        start_server: Callable[..., RunningServer],
        tmp_path: Path,
        tiny_adapters: Mapping[str, str],
        tokens_of: Callable[..., list[int]],
    ) -> None:
        folder = tmp_path / "many"
        config = (Path(tiny_adapters["routed"]) / CONFIG_FILE).read_bytes()
        for number in range(10_000):
            adapter = folder / f"a{number:05d}"
            adapter.mkdir(parents=True)
            (adapter / CONFIG_FILE).write_bytes(config)
        shutil.copytree(tiny_adapters["routed"], folder / "zzz")
        server = start_server(adapters={}, adapter_dir=str(folder))

        def seconds(work: Callable[[], Any]) -> float:
            start = time.monotonic()
            work()
            return time.monotonic() - start

        def lists_all() -> None:
            models = msgspec.json.decode(server.http.get("/v1/models").content, type=ModelList)
            assert len(models.data) == 10_002
            assert models.data[-1].id == "zzz"

        lists_all()
        assert seconds(lists_all) < 1
        assert seconds(lambda: server.http.get(ADAPTERS, params={"after": "a05000"}).raise_for_status()) < 0.5
        assert seconds(lambda: server.http.get(f"{ADAPTERS}/a09999").raise_for_status()) < 0.5
        assert seconds(lambda: server.http.get("/metrics").raise_for_status()) < 0.5
        state = {"state": "resident"}
        assert seconds(lambda: server.http.get(ADAPTERS, params=state).raise_for_status()) < 1
        assert ask(server, "zzz") == tokens_of("routed", 8)
        assert [each["id"] for each in server.http.get(ADAPTERS, params=state).json()["data"]] == ["zzz"]


class TestCachedTokens:
    """Pages hold 16 tokens, and a prompt's last token is always computed."""

    @pytest.fixture
    def ids(self) -> list[int]:
        """A prompt that no test has had before."""
        return [4 + next(_numbers), *((7 * position) % 300 + 5 for position in range(49))]

    def usage(self, server: RunningServer, ids: Sequence[Any], model: str = BASE, **fields: Any) -> dict[str, Any]:
        reply = server.http.post(COMPLETIONS, json=request_of(model, 4, **{"prompt": ids, **fields}))
        assert reply.status_code == 200, reply.text
        usage: dict[str, Any] = reply.json()["usage"]
        return usage

    def cached(self, *args: Any, **fields: Any) -> int:
        number: int = self.usage(*args, **fields)["prompt_tokens_details"]["cached_tokens"]
        return number

    def test_the_same_prompt_hits_and_its_tokens_are_the_same(self, server: RunningServer, ids: list[int]) -> None:
        first, second = (ask(server, BASE, 12, prompt=ids) for _ in range(2))
        assert first == second
        assert self.cached(server, ids) == 48
        assert self.cached(server, [*ids[:40], 5]) == 32
        assert self.cached(server, [3, *ids]) == 0
        usage = self.usage(server, ids)
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (50, 4, 54)

    def test_adapters_and_salts_do_not_share(self, server: RunningServer, ids: list[int]) -> None:
        for fields in (
            {"model": BASE},
            {"model": "routed"},
            {"model": "dense"},
            {"model": "routed", "cache_salt": "a"},
            {"model": "routed", "cache_salt": "b"},
        ):
            assert self.cached(server, ids, **fields) == 0, fields
            assert self.cached(server, ids, **fields) == 48, fields

    def test_a_reloaded_adapter_does_not_take_the_old_ones_pages(
        self, server: RunningServer, folder: Path, ids: list[int]
    ) -> None:
        register(server, "x", folder / "routed")
        old = ask(server, "x", 12, prompt=ids)
        register(server, "x", folder / "dense")
        assert self.cached(server, ids, "x") == 0
        new = ask(server, "x", 12, prompt=ids)
        assert new == ask(server, "dense", 12, prompt=ids) != old
        # The content counts, not the name
        assert self.cached(server, ids, "dense") == 48

    def test_streams_and_chat_say_it_too(self, server: RunningServer, ids: list[int]) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for expected in (0, 48):
            reply = server.http.post(COMPLETIONS, json=request_of(BASE, 4, prompt=ids, **options))
            assert events_of(reply.text)[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": expected}
        messages = [{"role": "user", "content": f"{ids[0]}: " + "the quick brown fox " * 4}]
        body = {"model": BASE, "max_tokens": 2, "messages": messages, "cache_salt": "chat"}
        first = server.http.post(CHAT, json=body).json()["usage"]
        assert first["prompt_tokens_details"] == {"cached_tokens": 0}
        options["stream_options"] = {"continuous_usage_stats": True, "include_usage": True}
        events = events_of(server.http.post(CHAT, json={**body, **options}).text)
        hits = {event["usage"]["prompt_tokens_details"]["cached_tokens"] for event in events}
        assert hits == {(first["prompt_tokens"] - 1) // 16 * 16}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            completion = client.completions.create(model=BASE, prompt=ids, max_tokens=1)
        assert completion.usage is not None
        assert completion.usage.prompt_tokens_details is not None
        assert completion.usage.prompt_tokens_details.cached_tokens == 48

    def test_with_several_prompts_and_completions_each_prompt_counts_once(
        self, server: RunningServer, ids: list[int]
    ) -> None:
        self.usage(server, ids)
        usage = self.usage(server, [ids, ids[::-1]], n=3)
        assert usage["prompt_tokens"] == 100
        assert usage["completion_tokens"] == 24
        assert usage["prompt_tokens_details"]["cached_tokens"] == 48

    def test_none_are_cached_where_the_cache_is_off(
        self, start_server: Callable[..., RunningServer], ids: list[int]
    ) -> None:
        server = start_server(prefix_caching="off")
        assert [self.cached(server, ids) for _ in range(2)] == [0, 0]

    @pytest.mark.parametrize("salt", ["", 3, "x" * 1025, ["a"]])
    def test_bad_salts(self, server: RunningServer, ids: list[int], salt: Any) -> None:
        for path, body in ((COMPLETIONS, {"prompt": ids}), (CHAT, {"messages": [{"role": "user", "content": "hi"}]})):
            reply = server.http.post(path, json={"model": BASE, "cache_salt": salt, **body})
            assert_error(reply, 400, param="cache_salt")
        assert self.cached(server, ids, cache_salt=None) == 0


def test_adapters_come_and_go_while_others_run(
    server: RunningServer,
    folder: Path,
    pool: ThreadPoolExecutor,
    tiny_adapters: Mapping[str, str],
    tokens_of: Callable[..., list[int]],
) -> None:
    """Everything at once; each reply is right, or says that its adapter is not there."""
    names = [*tiny_adapters]
    right = {name: tokens_of(name, 12) for name in names}

    def ask_steadily(name: str) -> None:
        for _ in range(10):
            assert ask(server, name, 12) == right[name]

    def ask_in_passing(name: str) -> set[int]:
        statuses = set()
        for _ in range(20):
            reply = server.http.post(COMPLETIONS, json=request_of(f"{name}-guest", 12))
            statuses.add(reply.status_code)
            if reply.status_code == 200:
                assert reply.json()["choices"][0]["token_ids"] == right[name]
        return statuses

    def come_and_go(name: str) -> None:
        for turn in range(6):
            assert register(server, f"{name}-guest", folder / name).status_code == 201
            time.sleep(0.02 * turn)
            reply = server.http.delete(f"{ADAPTERS}/{name}-guest", params={"force": turn % 2 == 0})
            assert reply.status_code == 200, reply.text

    work: list[Future[Any]] = [
        pool.submit(job, name) for name in names for job in (ask_steadily, ask_in_passing, come_and_go)
    ]
    for each in work:
        result = each.result()
        assert result is None or result <= {200, 404}
    server.wait_until_idle()
    assert [each["id"] for each in server.http.get(ADAPTERS).json()["data"]] == sorted(names)
