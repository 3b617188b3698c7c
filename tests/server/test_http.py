"""The wire itself: shapes of replies and streams, every bad input, hang-ups, limits, and requests that fail."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import msgspec
import pytest
from replies import assert_error, events_of
from running_server import BASE, RunningServer

from perft_serve.server.config import ServerConfig
from perft_serve.server.protocol import ChatChunk, ChatCompletion, Completion, ModelCard, ModelList

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


class TestCompletions:
    def test_shape(self, server: RunningServer) -> None:
        reply = server.post(COMPLETIONS, {"prompt": "hello world", "max_tokens": 5, "temperature": 0})
        body = reply.json()
        Completion.model_validate(body, strict=True)
        assert body["id"] == f"cmpl-{reply.headers['x-request-id']}"
        assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
        assert set(body["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
        assert abs(body["created"] - time.time()) < 60

    def test_times_of_a_request(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(per_request_metrics="on"))
        server.complete(max_tokens=1)  # what is done once
        server.knobs.set(pace=0.03)
        body = {"prompt": "hello world", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        began = time.monotonic()
        whole = server.complete(max_tokens=5)
        took = 1000 * (time.monotonic() - began)
        Completion.model_validate(whole, strict=True)
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        *before, last = events_of(server.post(COMPLETIONS, {**body, **stream}).text)
        Completion.model_validate(last, strict=True)
        chat = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        answer = server.post(CHAT, chat).json()
        ChatCompletion.model_validate(answer, strict=True)
        *_, last_answer = events_of(server.post(CHAT, {**chat, **stream}).text)
        ChatChunk.model_validate(last_answer, strict=True)
        for reply in (whole, last, answer, last_answer):
            times = reply["metrics"]
            assert times["queue_time_ms"] >= 25  # the pause comes before the step
            assert times["time_to_first_token_ms"] > 0
            assert times["generation_time_ms"] >= 4 * 25
            assert times["mean_itl_ms"] == pytest.approx(times["generation_time_ms"] / 4, abs=0.01)
            busy = times["time_to_first_token_ms"] + times["generation_time_ms"]
            assert times["tokens_per_second"] == pytest.approx(5000 / busy, rel=0.01)
        parts = ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms")
        assert sum(whole["metrics"][part] for part in parts) < took
        assert not any("metrics" in event for event in before)
        alone = server.complete(max_tokens=1)["metrics"]
        assert (alone["generation_time_ms"], alone["mean_itl_ms"]) == (0, None)
        # Those of several are nobody's
        assert "metrics" not in server.complete(max_tokens=2, n=2)
        assert "metrics" not in server.complete(max_tokens=2, prompt=["hello", "world"])
        nothing = server.complete(max_tokens=0, echo=True)["metrics"]
        assert nothing["time_to_first_token_ms"] is nothing["tokens_per_second"] is None

    def test_choices_are_numbered_over_prompts_and_completions(self, server: RunningServer) -> None:
        one = server.complete(max_tokens=4)
        body = server.complete(prompt=["hello world", "fox"], n=3, max_tokens=4, return_token_ids=True)
        assert [choice["index"] for choice in body["choices"]] == list(range(6))
        prompts = [choice["prompt_token_ids"] for choice in body["choices"]]
        assert prompts[0] == prompts[1] == prompts[2] != prompts[3] == prompts[5]
        assert body["choices"][1]["text"] == one["choices"][0]["text"]
        assert body["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[3])
        assert body["usage"]["completion_tokens"] == 6 * 4

    def test_prompts_as_token_ids(self, server: RunningServer) -> None:
        text = server.complete(max_tokens=6, return_token_ids=True)
        ids = text["choices"][0]["prompt_token_ids"]
        assert server.complete(prompt=ids, max_tokens=6)["choices"][0]["text"] == text["choices"][0]["text"]
        both = server.complete(prompt=[ids, [5]], max_tokens=6)
        assert both["choices"][0]["text"] == text["choices"][0]["text"]

    def test_logprobs(self, server: RunningServer) -> None:
        choice = server.complete(max_tokens=8, logprobs=2, skip_special_tokens=False)["choices"][0]
        logprobs = choice["logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {8}
        for token, logprob, top in zip(
            *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
        ):
            assert top[token] == logprob == max(top.values())
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
        assert logprobs["text_offset"][0] == 0
        by_id = server.complete(max_tokens=8, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True)
        named = [f"token_id:{token_id}" for token_id in by_id["choices"][0]["token_ids"]]
        assert by_id["choices"][0]["logprobs"]["tokens"] == named
        only = server.complete(max_tokens=8, logprobs=0)["choices"][0]["logprobs"]
        assert all(len(top) == 1 for top in only["top_logprobs"])

    def test_echo_with_logprobs_scores_the_prompt(self, server: RunningServer) -> None:
        prompt = "the quick brown fox"
        scored = server.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=0, return_token_ids=True)
        choice = scored["choices"][0]
        num_tokens = len(choice["prompt_token_ids"])
        assert choice["text"] == prompt
        usage = scored["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
            num_tokens,
            0,
            num_tokens,
        )
        logprobs = choice["logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {num_tokens}
        assert "".join(logprobs["tokens"]) == prompt
        assert logprobs["text_offset"] == [0, *accumulate(len(token) for token in logprobs["tokens"][:-1])]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(logprob < 0 for logprob in logprobs["token_logprobs"][1:])
        # What lm-eval sends: one token more, which it drops
        longer = server.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=1)["choices"][0]
        assert longer["logprobs"]["token_logprobs"][:-1] == pytest.approx(logprobs["token_logprobs"], abs=1e-5)
        assert longer["text"].startswith(prompt)
        assert longer["logprobs"]["text_offset"][-1] == len(prompt)

    def test_echo_only(self, server: RunningServer) -> None:
        choices = server.complete(prompt=["hello", "fox"], echo=True, max_tokens=0)["choices"]
        assert [choice["text"] for choice in choices] == ["hello", "fox"]
        assert choices[0]["logprobs"] is None
        assert choices[0]["finish_reason"] == "length"
        streamed = server.post(COMPLETIONS, {"prompt": "hello", "echo": True, "max_tokens": 3, "stream": True})
        assert events_of(streamed.text)[0]["choices"][0]["text"].startswith("hello")

    def test_stop_strings_whole_and_streamed(self, server: RunningServer) -> None:
        free = server.complete(max_tokens=30)["choices"][0]["text"]
        stop = free[5:8]
        whole = server.complete(max_tokens=30, stop=[stop, "never there"], n=2)
        for choice in whole["choices"]:
            assert choice["text"] == free[: free.index(stop)]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        body = {"prompt": "hello world", "temperature": 0, "ignore_eos": True, "max_tokens": 30, "stop": stop}
        chunks = events_of(server.post(COMPLETIONS, {**body, "stream": True}).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == free[: free.index(stop)]
        assert chunks[-1]["choices"][0]["stop_reason"] == stop
        kept = server.complete(max_tokens=30, stop=stop, include_stop_str_in_output=True)
        assert kept["choices"][0]["text"].endswith(stop)

    def test_stop_token(self, server: RunningServer) -> None:
        free = server.complete(max_tokens=12, return_token_ids=True)["choices"][0]["token_ids"]
        choice = server.complete(max_tokens=12, stop_token_ids=[free[3]])["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", free[3])

    def test_a_seed_repeats_and_null_is_the_default(self, server: RunningServer) -> None:
        texts = [server.complete(temperature=1, seed=3, n=2, max_tokens=12)["choices"] for _ in range(2)]
        assert texts[0] == texts[1]
        assert texts[0][0]["text"] != texts[0][1]["text"]
        assert server.complete(max_tokens=None, stop=None, n=None, logprobs=None)["usage"]["completion_tokens"] == 16

    def test_the_default_length_gives_way_to_the_context(self, server: RunningServer) -> None:
        assert server.complete(prompt=[5] * 250)["usage"]["completion_tokens"] == 6

    def test_neutral_values_of_what_is_not_supported_are_fine(self, server: RunningServer) -> None:
        server.complete(
            max_tokens=2,
            frequency_penalty=0,
            presence_penalty=0.0,
            logit_bias={},
            suffix=None,
            best_of=1,
            user="someone",
            response_format={"type": "text"},
        )


class TestChat:
    def test_shape(self, server: RunningServer) -> None:
        reply = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 5, "n": 2, "tools": [], "tool_choice": "none"})
        body = reply.json()
        ChatCompletion.model_validate(body, strict=True)
        assert body["id"] == f"chatcmpl-{reply.headers['x-request-id']}"
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert set(body["choices"][0]) == {"index", "message", "logprobs", "finish_reason", "stop_reason"}
        assert set(body["choices"][0]["message"]) == {"role", "content"}

    def test_stream_shape(self, server: RunningServer) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        reply = server.post(CHAT, {**body, "stream": True, "stream_options": options})
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        chunks = events_of(reply.text)
        for chunk in chunks:
            ChatChunk.model_validate(chunk, strict=True)
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "role" not in chunks[1]["choices"][0]["delta"]
        assert all("usage" in chunk for chunk in chunks)
        assert chunks[-1]["choices"] == []

    def test_messages_as_other_clients_send_them_back(self, server: RunningServer) -> None:
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "hi", "name": None},
            {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "again"},
        ]
        body = server.post(CHAT, {"messages": messages, "max_tokens": 2, "return_token_ids": True}).json()
        prompt = server.complete(prompt=body["prompt_token_ids"], echo=True, max_tokens=0)["choices"][0]["text"]
        assert prompt == (
            "<|im_start|>system\nbe\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_without_a_limit_it_runs_to_the_contexts_end(self, server: RunningServer) -> None:
        body = server.post(CHAT, {"messages": MESSAGES, "ignore_eos": True}).json()
        assert body["usage"]["total_tokens"] == 256


BAD_FIELDS: list[tuple[dict[str, Any], str | None, list[str]]] = [
    ({"max_tokens": 0}, "max_tokens", ["between 1 and", "got 0"]),
    ({"max_tokens": -1}, "max_tokens", ["between 1 and", "got -1"]),
    ({"max_tokens": 10**9}, "max_tokens", ["1000000000", "the context of 256 tokens"]),
    ({"max_tokens": 10**30}, "max_tokens", ["between 1 and"]),
    ({"max_tokens": "3"}, "max_tokens", ["integer", '"3"']),
    ({"max_tokens": True}, "max_tokens", ["integer", "true"]),
    ({"max_tokens": 3.0}, "max_tokens", ["integer"]),
    ({"max_tokens": -1, "echo": True}, "max_tokens", ["got -1"]),
    ({"temperature": -0.1}, "temperature", ["[0, 2]"]),
    ({"temperature": "hot"}, "temperature", ["number"]),
    ({"temperature": True}, "temperature", ["number"]),
    ({"top_p": 0}, "top_p", ["(0, 1]"]),
    ({"top_k": -5}, "top_k", ["-5"]),
    ({"min_p": 2}, "min_p", ["[0, 1]"]),
    ({"n": 0}, "n", ["between 1 and"]),
    ({"n": 100}, None, ["100 completions", "at most 64"]),
    ({"seed": 1 << 70}, "seed", ["between"]),
    ({"logprobs": 21}, "logprobs", ["between 0 and 20"]),
    ({"logprobs": True}, "logprobs", ["integer"]),
    ({"stop": [""]}, "stop", ["non-empty"]),
    ({"stop": 5}, "stop", ["a string or a list of strings"]),
    ({"stop": ["x"] * 17}, "stop", ["at most 16"]),
    ({"stop_token_ids": [-1]}, "stop_token_ids", ["between 0 and"]),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids", ["at most 256", "got 257"]),
    ({"stream": 1}, "stream", ["boolean"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["set stream to true"]),
    ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", ["unknown field"]),
    ({"prompt": ""}, "prompt", ["the prompt is empty"]),
    ({"prompt": []}, "prompt", ["the prompt is empty"]),
    ({"prompt": ["hello", ""]}, "prompt", ["the prompt is empty"]),
    ({"prompt": [[]]}, "prompt", ["the prompt is empty"]),
    ({"prompt": None}, "prompt", ["a list of token ids"]),
    ({"prompt": ["hello", 3]}, "prompt", ["a list of token ids"]),
    ({"prompt": [3, True]}, "prompt", ["a list of token ids"]),
    ({"prompt": {"text": "hello"}}, "prompt", ["a list of token ids"]),
    ({"prompt": [3, 10**9]}, "prompt", ["token id 1000000000 at position 1", "not in the vocabulary"]),
    ({"prompt": [-3]}, "prompt", ["token id -3 at position 0"]),
    ({"prompt": [5] * 300}, "prompt", ["300 tokens", "the context is 256"]),
    ({"prompt": "x " * 1000}, "prompt", ["tokens", "the context is 256", "shorten the prompt by 1745"]),
    ({"prompt": "x " * 3000}, "prompt", ["6000 characters", "the context is 256"]),
    ({"prompt": [5] * 300 + [10**9]}, "prompt", ["301 tokens", "shorten the prompt by 46"]),
    ({"prompt": ["hello", [5] * 256]}, "prompt", ["a list of token ids"]),
    ({"prompt": [[5], [5] * 256]}, "prompt", ["256 tokens", "shorten the prompt by 1"]),
    ({"model": None}, "model", ["string"]),
    ({"max_token": 3}, "max_token", ["unknown field 'max_token'"]),
    ({"frequency_penalty": 2.5}, "frequency_penalty", ["[-2, 2]", "got 2.5"]),
    ({"presence_penalty": False}, "presence_penalty", ["number"]),
    ({"repetition_penalty": 0}, "repetition_penalty", ["(0, 100]"]),
    ({"logit_bias": {"5": 101}}, "logit_bias", ["[-100, 100]"]),
    ({"logit_bias": {"five": 1}}, "logit_bias", ["the key", "five", "not a token id"]),
    ({"logit_bias": {"05": 1}}, "logit_bias", ["05", "not a token id"]),
    ({"logit_bias": {"-5": 1}}, "logit_bias", ["not a token id"]),
    ({"logit_bias": {"9999999999": 1}}, "logit_bias", ["between 0 and"]),
    ({"logit_bias": {"5000000": 1}}, "logit_bias", ["token id 5000000 is not in the vocabulary"]),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", ["at most 1024"]),
    ({"logit_bias": [5]}, "logit_bias", ["dictionary"]),
    ({"allowed_token_ids": []}, "allowed_token_ids", ["no token could be taken"]),
    ({"allowed_token_ids": [5, 5000000]}, "allowed_token_ids", ["5000000 is not in the vocabulary"]),
    ({"bad_words": ["a", " "]}, "bad_words", ["not blank"]),
    ({"bad_words": ["a" * 257]}, "bad_words", ["256 characters"]),
    ({"bad_words": "a"}, "bad_words", ["list"]),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", ["more than max_tokens"]),
    ({"min_tokens": -1}, "min_tokens", ["between 0 and"]),
    ({"suffix": "the end"}, "suffix", ["not supported"]),
    ({"best_of": 2}, "best_of", ["not supported"]),
    ({"use_beam_search": True}, "use_beam_search", ["not supported"]),
]


class TestBadInput:
    @pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS, ids=[str(case[0])[:40] for case in BAD_FIELDS])
    def test_a_bad_field(
        self, server: RunningServer, fields: dict[str, Any], param: str | None, words: list[str]
    ) -> None:
        assert_error(server.post(COMPLETIONS, {"prompt": "hello", **fields}), 400, *words, param=param)

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"messages": []}, "messages", ["at least 1"]),
            ({"messages": "hi"}, "messages", ["list"]),
            ({"messages": [{"role": "critic", "content": "hi"}]}, "messages[0].role", ["'system'"]),
            ({"messages": [{"role": "user"}]}, "messages[0].content", ["missing"]),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", ["text parts"]),
            ({"messages": [{**MESSAGES[0], "colour": "red"}]}, "messages[0].colour", ["unknown field"]),
            ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", ["the user speaks first"]),
            ({"messages": [{"role": "user", "content": "x " * 3000}]}, "prompt", ["the context is 256"]),
            ({"max_tokens": 0}, "max_tokens", ["between 1 and"]),
            ({"max_completion_tokens": 10**9}, "max_tokens", ["the context of 256 tokens"]),
            ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", ["differ"]),
            ({"top_logprobs": 3}, "top_logprobs", ["set it to true"]),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["20"]),
            ({"logprobs": 3}, "logprobs", ["boolean"]),
            ({"chat_template": "{{ 1 }}"}, "chat_template", ["not supported"]),
            ({"prompt": "hello"}, "prompt", ["unknown field"]),
        ],
    )
    def test_a_bad_field_in_chat(
        self, server: RunningServer, fields: dict[str, Any], param: str | None, words: list[str]
    ) -> None:
        assert_error(server.post(CHAT, {"messages": MESSAGES, **fields}), 400, *words, param=param)

    @pytest.mark.parametrize(
        "body",
        [
            b'{"model": "tiny-mixtral", "prompt": "hello", "temperature": NaN}',
            b'{"model": "tiny-mixtral", "prompt": "hello", "temperature": Infinity}',
            b'{"model": "tiny-mixtral", "prompt": "hello", "temperature": -Infinity}',
            b'{"model": "tiny-mixtral", "prompt": "hello \\ud800"}',
            b'{"model": "tiny-mixtral", "prompt": "hello \xff"}',
            b'{"model": "tiny-mixtral", "prompt": "hello"',
            b"",
            b"hello",
            b"[" * 60_000,
            b'{"max_tokens": ' + b"9" * 10_000 + b"}",
        ],
    )
    def test_what_is_not_json(self, server: RunningServer, body: bytes) -> None:
        reply = server.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert_error(reply, 400, "not valid JSON")

    def test_a_number_too_large_for_a_float(self, server: RunningServer) -> None:
        body = b'{"model": "tiny-mixtral", "prompt": "hello", "temperature": 1e999}'
        reply = server.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert_error(reply, 400, "temperature must be in [0, 2], got inf", param="temperature")

    @pytest.mark.parametrize("body", [b"[]", b"3", b'"hello"', b"null"])
    def test_json_that_is_not_an_object(self, server: RunningServer, body: bytes) -> None:
        reply = server.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert_error(reply, 400, "must be a JSON object")

    def test_missing_fields(self, server: RunningServer) -> None:
        assert_error(server.http.post(COMPLETIONS, json={"prompt": "hello"}), 400, "model is missing", param="model")
        assert_error(server.post(COMPLETIONS, {}), 400, "prompt is missing", param="prompt")
        assert_error(server.post(CHAT, {}), 400, "messages is missing", param="messages")

    def test_an_unknown_model(self, server: RunningServer) -> None:
        for path, body in ((COMPLETIONS, {"prompt": "hello"}), (CHAT, {"messages": MESSAGES})):
            for model in ("nobody", "", "../tiny-mixtral", "<base>"):
                assert_error(server.post(path, {**body, "model": model}), 404, "does not exist", param="model")
        assert_error(server.http.get("/v1/models/no/body"), 404, "'no/body'", param="model")

    def test_bodies_that_are_too_long(self, server: RunningServer) -> None:
        content = b'{"prompt": "' + b"x" * (64 << 10) + b'"}'
        headers = {"content-type": "application/json"}
        assert_error(server.http.post(COMPLETIONS, content=content, headers=headers), 413, "65536 bytes")

        def in_parts() -> Any:  # without a content-length
            for start in range(0, len(content), 1000):
                yield content[start : start + 1000]

        assert_error(server.http.post(COMPLETIONS, content=in_parts(), headers=headers), 413, "65536 bytes")

    def test_many_bad_items_are_one_error(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(max_open_requests=64))
        headers = {"content-type": "application/json"}
        for prompt, words in (
            ([5] * 2_000_000, "2000000 tokens"),
            ([[5]] * 500_000, "500000 completions"),
            ([0.5] * 1_000_000, "a list of token ids"),
            (["x"] * 500_000 + [5], "a list of token ids"),
        ):
            body = json.dumps({"model": BASE, "prompt": prompt})
            assert_error(server.http.post(COMPLETIONS, content=body, headers=headers), 400, words, param=ANY)
        reply = server.post(COMPLETIONS, {"prompt": "hello", "stop_token_ids": [5] * 2_000_000})
        assert_error(reply, 400, "at most 256", param="stop_token_ids")
        reply = server.post(COMPLETIONS, {"prompt": "hello", "x" * 1_000_000: 1})
        assert_error(reply, 400, "unknown field", param=ANY)
        assert len(reply.content) < 4000

    def test_others_are_answered_while_a_long_body_is_read(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server()
        headers = {"content-type": "application/json"}
        empty = {"role": "user", "content": ""}
        cases: tuple[tuple[str, dict[str, Any], str, str], ...] = (
            (CHAT, {"messages": [empty] * 400_000}, "at most 16384", "messages"),
            (CHAT, {"messages": [empty] * 16_000}, "448022 characters", "prompt"),
            (CHAT, {"messages": [{**empty, "content": "hello fox " * 800_000}]}, "8000050 characters", "prompt"),
            (COMPLETIONS, {"prompt": "hello fox " * 1_500_000}, "15000000 characters", "prompt"),
        )
        for path, fields, words, param in cases:
            body = json.dumps({"model": BASE, **fields}).encode()
            longest = 0.0
            with ThreadPoolExecutor(1) as pool:
                reply = pool.submit(httpx.post, server.url + path, content=body, headers=headers, timeout=60)
                while not reply.done():
                    start = time.monotonic()
                    assert server.http.get("/health").status_code == 200
                    longest = max(longest, time.monotonic() - start)
            assert_error(reply.result(), 400, words, param=param)
            assert longest < 1

    def test_wrong_paths_methods_and_types(self, server: RunningServer) -> None:
        assert_error(server.http.get("/v1/nothing"), 404)
        assert_error(server.http.post(COMPLETIONS + "/", json={}), 404)
        wrong_method = server.http.get(COMPLETIONS)
        assert_error(wrong_method, 405)
        assert wrong_method.headers["allow"] == "OPTIONS, POST"
        assert_error(server.http.delete("/v1/adapters"), 405, "GET, HEAD, OPTIONS, POST")
        assert_error(server.http.post("/health"), 405)
        body = json.dumps({"model": BASE, "prompt": "hello"})
        assert_error(server.http.post(COMPLETIONS, content=body), 415, "application/json")
        plain = {"content-type": "text/plain"}
        assert_error(server.http.post(COMPLETIONS, content=body, headers=plain), 415, "'text/plain'")

    def test_the_clients_own_request_id_is_not_taken(self, server: RunningServer) -> None:
        """It goes back under another name, if it is short and plain."""
        for name, value, echoed in (
            ("x-request-id", "mine", "mine"),
            ("x-client-request-id", "req-1:2/3", "req-1:2/3"),
            ("x-request-id", "x" * 129, None),
            ("x-request-id", "<b>", None),
        ):
            reply = server.http.get("/v1/nothing", headers={name: value})
            assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
            assert reply.headers.get("x-client-request-id") == echoed


class TestHangUps:
    def test_while_waiting_for_a_whole_reply(self, server: RunningServer) -> None:
        server.knobs.set(pace=0.02)
        body = json.dumps({"model": "dense", "prompt": "hello", "max_tokens": 200, "n": 2, "ignore_eos": True}).encode()
        with socket.create_connection(server.address) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            server.wait_until(lambda stats: stats.num_running == 2)
        steps = server.client.stats().num_steps
        server.wait_until_idle()
        assert server.client.stats().num_steps < steps + 100, "it ran to its end"

    def test_while_sending_the_body(self, server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
        with socket.create_connection(server.address) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b'content-length: 100\r\n\r\n{"model"'
            )
        counted = 'perft_http_requests_total{handler="/v1/completions",method="POST",status="499"}'
        end = time.monotonic() + 5
        while counted not in server.http.get("/metrics").text:
            assert time.monotonic() < end
        assert "Traceback" not in caplog.text
        assert server.complete(max_tokens=1)["usage"]["completion_tokens"] == 1


class TestLimits:
    def test_too_many_open_requests(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(max_open_requests=2))
        server.knobs.set(pace=0.02)
        body = {"model": BASE, "prompt": "hello", "max_tokens": 200, "n": 2, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", COMPLETIONS, json=body) as first:
            lines = first.iter_lines()
            next(lines)
            for stream in (False, True):
                refused = server.post(COMPLETIONS, {"prompt": "hello", "stream": stream})
                assert_error(refused, 503, "try again later")
                assert refused.headers["retry-after"]
        server.wait_until_idle()
        server.complete(max_tokens=1)

    def test_a_stopped_reader_is_given_up(
        self, start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("perft_serve.server.client.MAX_PENDING_EVENTS", 8)
        # The reader's socket and the server's must fill up before the reader is behind
        monkeypatch.setattr(
            "perft_serve.server.completions.CompletionFormat.chunk", lambda *_: '"' + "x" * 2_000_000 + '"'
        )
        server = start_server()
        server.knobs.set(pace=0.005)
        body = {"model": BASE, "prompt": "hello", "max_tokens": 250, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", COMPLETIONS, json=body) as reply:
            server.wait_until(lambda stats: stats.num_running == 1)
            server.wait_until_idle()
            assert server.client.stats().num_steps < 200, "it ran to its end"
            # Others are served meanwhile
            assert server.http.get("/health").status_code == 200
            text = reply.read().decode()
        assert "tokens behind" in events_of(text)[-1]["error"]["message"]

    @pytest.mark.parametrize("num_tokens", [250, 5])
    def test_a_reader_that_never_goes_on_does_not_stay(
        self, start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch, num_tokens: int
    ) -> None:
        """Whether its request was given up, or is complete."""
        monkeypatch.setattr("perft_serve.server.client.MAX_PENDING_EVENTS", 8)
        monkeypatch.setattr("perft_serve.server.client.DRAIN_SECONDS", 0.3)
        monkeypatch.setattr(
            "perft_serve.server.completions.CompletionFormat.chunk", lambda *_: '"' + "x" * 4_000_000 + '"'
        )
        server = start_server()
        server.knobs.set(pace=0.005)
        body = {"model": BASE, "prompt": "hello", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", COMPLETIONS, json=body):
            server.wait_until(lambda stats: stats.num_steps > 1)
            server.wait_until_idle()
            server.wait_until(lambda _: server.client._num_open == 0)


class TestStreams:
    TEXT = "naïve 世界 👩‍🚀 한국 ἀρχή 🇫🇷."

    def test_characters_are_never_cut(self, server: RunningServer) -> None:
        """The tiny tokenizer writes these characters as two to four tokens each."""
        body = {"prompt": self.TEXT, "add_special_tokens": False}
        tokens = server.http.post("/tokenize", json=body).json()["tokens"]
        assert len(tokens) > len(self.TEXT)
        server.knobs.set(say=tuple(tokens))
        sizes = []
        for path, given in ((COMPLETIONS, {"prompt": "hello"}), (CHAT, {"messages": MESSAGES})):
            options = {"max_tokens": len(tokens), "stream": True, "ignore_eos": True}
            with server.http.stream("POST", path, json={"model": BASE, **given, **options}) as reply:
                for part in reply.iter_raw():
                    part.decode()  # each alone
                    sizes.append(len(part))
            reply = server.post(path, {**given, **options})
            texts = [
                choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or ""
                for chunk in events_of(reply.text)
                for choice in chunk["choices"]
            ]
            assert "".join(texts) == self.TEXT
            assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
        assert len(sizes) > 20

    def test_one_event_for_each_token(self, server: RunningServer) -> None:
        server.knobs.set(pace=0.02)
        body = {"prompt": "hello", "max_tokens": 12, "stream": True, "ignore_eos": True, "return_token_ids": True}
        chunks = events_of(server.post(COMPLETIONS, body).text)
        assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == [1] * 12

    def test_a_silent_stream_is_kept_alive(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(stream_keep_alive=1))
        server.knobs.set(pace=1.4)
        body = {"prompt": "hello", "max_tokens": 2, "stream": True, "ignore_eos": True}
        parts = server.post(COMPLETIONS, body).text.split("\n\n")
        comments = [part for part in parts if part.startswith(":")]
        assert set(comments) == {": keep-alive"}
        assert len(comments) >= 2
        assert parts[0] == ": keep-alive"  # the first token had not come yet
        assert parts[-2:] == ["data: [DONE]", ""]
        # What fails after the first comment has its status already
        server.knobs.set(pace=1.4, spoil="broken")
        reply = server.post(COMPLETIONS, body)
        assert reply.status_code == 200
        comment, error, done, _ = reply.text.split("\n\n")
        assert (comment, done) == (": keep-alive", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "generation has failed: broken"

    def test_no_comments_unless_asked(self, start_server: Callable[..., RunningServer]) -> None:
        server = start_server(ServerConfig(stream_keep_alive=0))
        server.knobs.set(pace=1.2)
        reply = server.post(COMPLETIONS, {"prompt": "hello", "max_tokens": 1, "stream": True, "ignore_eos": True})
        assert len(events_of(reply.text)) == 1


class TestFailures:
    def test_a_request_that_the_engine_refuses_fails_alone(self, server: RunningServer) -> None:
        server.knobs.set(refuse=(5, 5, 5))
        assert_error(server.post(COMPLETIONS, {"prompt": [[7], [5, 5, 5]]}), 500, "internal error")
        assert_error(server.post(COMPLETIONS, {"prompt": [5, 5, 5], "stream": True}), 500, "internal error")

    def test_a_request_that_fails_inside_the_engine(self, server: RunningServer) -> None:
        server.knobs.set(spoil="not a number")
        assert_error(server.post(COMPLETIONS, {"prompt": "hello"}), 500, "not a number")

    def test_a_bug_in_a_handler_becomes_a_reply(
        self, server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("perft_serve.server.service.parse_request", lambda *_: 1 // 0)
        assert_error(server.post(COMPLETIONS, {"prompt": "hello"}), 500, "internal error")
        assert "ZeroDivisionError" in caplog.text


class TestOthers:
    def test_models(self, server: RunningServer) -> None:
        models = server.http.get("/v1/models").json()
        msgspec.convert(models, ModelList)
        for model in models["data"]:
            card = server.http.get(f"/v1/models/{model['id']}").json()
            msgspec.convert(card, ModelCard)
            assert ("adapter" in card) == (card["parent"] is not None)
            assert card == model
            assert card["max_model_len"] == 256
        assert "/" not in json.dumps(models), "a path of the server"

    def test_version_and_documentation(self, server: RunningServer) -> None:
        assert server.http.get("/version").json() == {"version": "0.0.0"}
        schema = server.http.get("/openapi.json").json()
        body = schema["paths"][COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        assert "max_tokens" in schema["components"]["schemas"][name]["properties"]
        references = set(_references(schema))
        assert references <= {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
        assert "#/components/schemas/AdapterCard" in references
        limit = schema["paths"]["/v1/adapters"]["get"]["parameters"][0]
        assert (limit["name"], limit["in"], limit["schema"]["maximum"]) == ("limit", "query", 1000)

    def test_a_base_without_tokenizer(
        self, start_server: Callable[..., RunningServer], tiny_base_without_tokenizer: Path
    ) -> None:
        server = start_server(model=str(tiny_base_without_tokenizer))
        choice = server.complete(prompt=[5, 6, 7], max_tokens=4, logprobs=1)["choices"][0]
        assert choice["text"] == ""
        assert choice["prompt_token_ids"] == [5, 6, 7]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "stream": True, "ignore_eos": True}
        chunks = events_of(server.post(COMPLETIONS, body).text)
        assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 4
        assert_error(server.post(COMPLETIONS, {"prompt": "hello"}), 400, "no tokenizer", param="prompt")
        assert_error(server.post(COMPLETIONS, {"prompt": [5], "stop": "x"}), 400, "stop_token_ids", param="stop")
        assert_error(server.post(CHAT, {"messages": MESSAGES}), 400, "no tokenizer", param="messages")


def _references(schema: Any) -> Any:
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            yield from _references(item)
