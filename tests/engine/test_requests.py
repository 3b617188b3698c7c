"""What the engine refuses, and how requests end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from driving import request, run
from served import Served

from perft.errors import AdapterError, BaseModelError
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.params import RequestError, SamplingParams


@pytest.fixture(scope="module")
def engine(mixtral: Served) -> Engine:
    return mixtral.engine()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 128], {}, "128 at position 1 .* is not in the vocabulary"),
        ([-1], {}, "-1 at position 0 .* not in the vocabulary"),
        ([True], {}, "must be integers"),
        (["1"], {}, "must be integers"),
        ([1] * 257, {}, "257 tokens, but the context is 256"),
        ([1] * 256, {"max_tokens": 1}, "256 tokens, but the context is 256"),
        ([1] * 256, {"max_tokens": None}, "shorten the prompt by 1"),
        ([1] * 250, {"max_tokens": 7}, "max_tokens is 7, .* room for 6"),
    ],
)
def test_prompts_that_cannot_be_served(engine: Engine, prompt: list[Any], settings: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(request("x", prompt, **settings))
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("settings", "bad_words"),
    [
        ({"logit_bias": {128: 1}}, ()),
        ({"allowed_token_ids": (1, 128)}, ()),
        ({}, ((1, 128),)),
        ({}, ((-1,),)),
        ({}, ((),)),
    ],
)
def test_tokens_that_there_are_not(engine: Engine, settings: Any, bad_words: Any) -> None:
    with pytest.raises(RequestError, match="vocabulary|without tokens"):
        engine.submit(replace(request("x", [1], **settings), bad_words=bad_words))
    assert not engine.has_work()


def test_a_request_id_that_is_taken(engine: Engine) -> None:
    engine.submit(request("x", [1]))
    with pytest.raises(RequestError, match="in use"):
        engine.submit(request("x", [1]))
    engine.abort("x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9 * 3}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n must be"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("",)}, "non-empty"),
        ({"stop": 5}, "stop must be a list"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens is 17, which is more than max_tokens, 16"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": [1]}, "logit_bias must map"),
        ({"logit_bias": {"5": 1}}, "logit_bias must be an integer"),
        ({"logit_bias": {5: 101}}, "logit_bias must be in"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "at most 1024"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"bad_words": "no"}, "bad_words must be a list"),
        ({"bad_words": (" ",)}, "not blank"),
        ({"bad_words": ("x",) * 257}, "at most 256"),
    ],
)
def test_bad_sampling_parameters(settings: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**settings)


def test_requests_that_the_pages_can_never_hold(mixtral: Served) -> None:
    """Refused at once and with the numbers, not when they would run out of pages."""
    page_bytes = 2 * 2 * 2 * 8 * 4 * 16  # layers, keys and values, kv heads, head width, page size, float32
    engine = mixtral.engine(kv_memory=4 * page_bytes)
    assert (engine.limits.max_model_len, engine.limits.num_pages) == (64, 4)
    with pytest.raises(RequestError, match=r"65 tokens, but the context is 64 .* \(all 4 pages of the KV cache\)"):
        engine.submit(request("x", [1] * 65))
    with pytest.raises(RequestError, match=r"has room for 4 .* \(all 4 pages of the KV cache\)"):
        engine.submit(request("x", [1] * 60, max_tokens=5))
    assert len(run(engine, [request("x", [1] * 60, max_tokens=None)])["x"].token_ids) == 4


def test_ends(engine: Engine) -> None:
    """At the limit, at a stop token, and with the prompt scored only."""
    free = run(engine, [request("x", [9, 8, 7], max_tokens=6)])["x"]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 6)
    stop = next(t for t in free.token_ids[1:] if t != free.token_ids[0])
    stopped = run(engine, [request("x", [9, 8, 7], max_tokens=6, stop_token_ids=(stop,))])["x"]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    scored = run(engine, [request("x", [9, 8, 7], max_tokens=0, prompt_logprobs=2)])["x"]
    assert (scored.finish_reason, scored.token_ids) == ("length", [])
    assert scored.prompt_logprobs is not None
    assert [None if p is None else (p.token_id, len(p.top)) for p in scored.prompt_logprobs] == [None, (8, 2), (7, 2)]
    late = run(engine, [request("x", [9, 8, 7], max_tokens=0, prompt_logprobs=2, prompt_logprobs_start=2)])["x"]
    assert late.prompt_logprobs is not None
    assert [None if p is None else (p.token_id, len(p.top)) for p in late.prompt_logprobs] == [None, None, (7, 2)]
    with pytest.raises(RequestError, match="prompt_logprobs_start is 3, but the prompt has 3 tokens"):
        engine.submit(request("x", [9, 8, 7], max_tokens=0, prompt_logprobs=2, prompt_logprobs_start=3))
    whole = run(engine, [request("x", [9] * 250, max_tokens=None)])["x"]
    assert len(whole.token_ids) == 6


def test_eos_and_ignore_eos(mixtral: Served) -> None:
    engine = mixtral.engine()
    free = run(engine, [request("x", [9, 8, 7], max_tokens=6)])["x"]
    engine._scheduler._eos_token_ids = frozenset(free.token_ids[:1])
    ended = run(engine, [request("x", [9, 8, 7], max_tokens=6)])["x"]
    assert (ended.finish_reason, ended.token_ids) == ("stop", free.token_ids[:1])
    assert run(engine, [request("x", [9, 8, 7], max_tokens=6, ignore_eos=True)])["x"].token_ids == free.token_ids


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "/nowhere"}, BaseModelError, "cannot load the base model '/nowhere'"),
        ({"adapters": {"a": "/nowhere"}}, AdapterError, r"adapter 'a' \(from '/nowhere'\): its folder does not exist"),
        ({"adapters": {"": "/nowhere"}}, AdapterError, "cannot be an adapter's name"),
        ({"kv_memory": 10}, BaseModelError, "does not hold one page"),
        ({"adapter_memory": 10}, AdapterError, "does not hold one row"),
        ({"max_model_len": 100_000}, ValueError, "more than the model's context of 256"),
        ({"max_model_len": 256, "kv_memory": 1 << 14}, ValueError, "does not fit into the KV cache"),
        ({"max_num_batched_tokens": 8}, ValueError, "must be at least max_num_seqs"),
        ({"device": "cuda:99"}, ValueError, "finds [0-9]+ CUDA devices"),
        ({"device": "abacus"}, ValueError, "use auto, cpu, cuda"),
        ({"prefix_caching": True}, ValueError, "must be 'on' or 'off', got True"),
        ({"host_adapter_memory": -1}, ValueError, "host_adapter_memory must be at least 0"),
    ],
)
def test_bad_settings(mixtral: Served, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine(EngineConfig(**{"model": str(mixtral.path), "adapter_memory": 1 << 20, **settings}))
