"""The engine's tokens and log-probabilities are those of Transformers and PEFT, alone and in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Output, request, run
from served import Served, make_served
from tiny import FAMILIES, VOCAB_SIZE

from perft_serve.engine.events import EngineRequest

TOLERANCE = 1e-4


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (3 + 5 * i % 23,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str, tmp_path: Path) -> None:
    """All variants and units in one mixed batch against `generate` of the PEFT model, one at a time, 32 tokens."""
    served = make_served(family, tmp_path)
    cases = list(zip([None, *served.adapters], prompts(len(served.adapters) + 1), strict=True))
    outputs = run(served.engine(), [request(str(i), p, a, max_tokens=32) for i, (a, p) in enumerate(cases)])
    for i, (adapter, prompt) in enumerate(cases):
        expected = served.generate(adapter, prompt, 32)
        assert outputs[str(i)].token_ids == expected, f"{family} {adapter}"
        logprobs = served.logits(adapter, prompt + expected).log_softmax(-1)
        wanted = [logprobs[len(prompt) - 1 + j, token].item() for j, token in enumerate(expected)]
        torch.testing.assert_close(torch.tensor(outputs[str(i)].logprobs), torch.tensor(wanted), atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def alone(mixtral: Served) -> dict[str, Output]:
    """Each of 16 requests by itself, prefilled in one piece."""
    engine = mixtral.engine()
    return {str(i): run(engine, [one])[str(i)] for i, one in enumerate(sixteen(mixtral))}


def sixteen(served: Served) -> list[EngineRequest]:
    """Sixteen requests: base only and every adapter, some of them twice."""
    adapters = [None, *served.adapters, None, *served.adapters][:16]
    return [
        request(str(i), p, a, max_tokens=12, prompt_logprobs=0)
        for i, (a, p) in enumerate(zip(adapters, prompts(16, seed=1), strict=True))
    ]


def assert_same(outputs: dict[str, Output], expected: dict[str, Output]) -> None:
    for key, want in expected.items():
        got = outputs[key]
        assert got.token_ids == want.token_ids, key
        assert got.finish_reason == want.finish_reason == "length"
        torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), atol=TOLERANCE, rtol=0)
        assert got.prompt_logprobs is not None
        assert want.prompt_logprobs is not None
        pairs = list(zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True))
        assert all(g and w and g.token_id == w.token_id and abs(g.logprob - w.logprob) < TOLERANCE for g, w in pairs)


def test_same_in_a_mixed_batch(mixtral: Served, alone: dict[str, Output]) -> None:
    assert_same(run(mixtral.engine(), sixteen(mixtral)), alone)


@pytest.mark.parametrize("budget", [16, 21])
def test_same_when_prefill_is_chunked(mixtral: Served, alone: dict[str, Output], budget: int) -> None:
    engine = mixtral.engine(max_num_batched_tokens=budget, max_num_seqs=16)
    assert_same(run(engine, sixteen(mixtral)), alone)


def test_same_when_preempted(mixtral: Served, alone: dict[str, Output]) -> None:
    """With pages for a few requests only, some lose theirs in mid-generation and are computed again."""
    page_bytes = 2 * 2 * 2 * 8 * 4 * 4  # layers, keys and values, kv heads, head width, page size, float32
    engine = mixtral.engine(page_size=4, kv_memory=24 * page_bytes)
    assert_same(run(engine, sixteen(mixtral)), alone)
    assert engine.stats().num_preemptions > 3


def test_sampling_depends_on_the_seed_only(mixtral: Served) -> None:
    """Seeded samples are the same alone, in company, chunked and preempted; other seeds and choices differ."""
    prompt = prompts(3)[2]
    sampling: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": 7, "max_tokens": 16}
    engine = mixtral.engine()
    first = run(engine, [request("x", prompt, "R-lora", **sampling)])["x"].token_ids
    crowd = [request("x", prompt, "R-lora", **sampling), *sixteen(mixtral)]
    assert run(engine, crowd)["x"].token_ids == first
    assert run(mixtral.engine(max_num_batched_tokens=17, max_num_seqs=17), crowd)["x"].token_ids == first
    assert run(engine, [request("x", prompt, "R-lora", **sampling | {"seed": 8})])["x"].token_ids != first
    assert run(engine, [request("x", prompt, "R-lora", choice=1, **sampling)])["x"].token_ids != first


def test_unseeded_samples_differ(mixtral: Served) -> None:
    engine = mixtral.engine()
    outputs = run(engine, [request(str(i), [5, 6, 7], temperature=1.5, max_tokens=16) for i in range(4)])
    assert len({tuple(output.token_ids) for output in outputs.values()}) > 1
