"""The prefix cache on a real model: whatever is found in it, the tokens are those of a run without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from driving import Output, request, run, step
from served import Served
from tiny import random_adapter, tiny_model

from perft import PerftConfig
from perft.moe import find_moe_blocks
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.scheduler import Plan

PAGE_BYTES = 2 * 2 * 2 * 8 * 4 * 4  # layers, keys and values, kv heads, head width, page size, float32
PREFIX = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def reference(mixtral: Served) -> Engine:
    """An engine without the cache."""
    return mixtral.engine(prefix_caching="off", page_size=4)


def assert_right(reference: Engine, requests: list[EngineRequest], outputs: dict[str, Output]) -> None:
    """The tokens and log-probabilities of each request are those of a run by itself without the cache."""
    for one in requests:
        want, got = run(reference, [one])[one.request_id], outputs[one.request_id]
        assert want.num_cached_tokens == 0
        assert got.token_ids == want.token_ids, one.request_id
        torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), atol=1e-4, rtol=0)
        assert (got.prompt_logprobs is None) == (want.prompt_logprobs is None)


@pytest.mark.parametrize("adapter", [None, "R-lora", "E-parallel", "S-one-layer"])
def test_pairs(mixtral: Served, reference: Engine, adapter: str | None) -> None:
    """The same adapter and scope: a hit. Another adapter, the base, another scope: a miss. The tokens are right each time."""
    engine = mixtral.engine(page_size=4)
    other = "D-lora"
    cases = [
        (request("first", [*PREFIX, 1, 2], adapter), 0),
        (request("same", [*PREFIX, 1, 2], adapter), 40),
        (request("longer", [*PREFIX, 3, 4, 5], adapter), 40),
        (request("shorter", PREFIX[:21], adapter), 20),
        (request("differs early", [*PREFIX[:6], 127, *PREFIX[7:]], adapter), 4),
        (request("other adapter", [*PREFIX, 1, 2], other), 0),
        (request("other adapter again", [*PREFIX, 1, 2], other), 40),
        (request("other scope", [*PREFIX, 1, 2], adapter, scope="tenant"), 0),
        (request("other scope again", [*PREFIX, 1, 2], adapter, scope="tenant"), 40),
        (request("scored", [*PREFIX, 1, 2], adapter, prompt_logprobs=1), 0),
    ]
    if adapter is not None:
        cases += [(request("base", [*PREFIX, 1, 2]), 0), (request("base again", [*PREFIX, 1, 2]), 40)]
    for one, num_cached in cases:
        output = run(engine, [one])[one.request_id]
        assert output.num_cached_tokens == num_cached, one.request_id
        assert_right(reference, [one], {one.request_id: output})
    stats = engine.stats()
    assert stats.prefix_hits == sum(num_cached for _, num_cached in cases)
    assert stats.prefix_queries == sum(len(one.prompt_ids) for one, _ in cases if one.request_id != "scored")


@pytest.mark.parametrize(("budget", "kv_pages"), [(512, 200), (16, 200), (16, 22)])
@pytest.mark.parametrize("adapter", [None, "R-lora"])
def test_what_is_scored_from_somewhere_on(
    mixtral: Served, reference: Engine, adapter: str | None, budget: int, kv_pages: int
) -> None:
    """As whole prompts are, whatever is found in the cache, also in chunks and when it has to begin again."""
    engine = mixtral.engine(page_size=4, max_num_batched_tokens=budget, max_num_seqs=8, kv_memory=kv_pages * PAGE_BYTES)
    tails = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11, 12]]
    starts = [40, 40, 1, 0, 38, 40, 41, 43]
    requests = [
        request(str(i), [*PREFIX, *tails[i % 4]], adapter, prompt_logprobs=2, max_tokens=0 if i < 4 else 30)
        for i in range(8)
    ]
    asked = [
        replace(one, params=replace(one.params, prompt_logprobs_start=start))
        for one, start in zip(requests, starts, strict=True)
    ]
    outputs = run(engine, asked)
    if kv_pages == 22:
        assert engine.stats().num_preemptions > 0
    else:
        assert engine.stats().prefix_hits > 0
    for one, start in zip(requests, starts, strict=True):
        want, got = run(reference, [one])[one.request_id], outputs[one.request_id]
        start = max(1, start)
        assert got.token_ids == want.token_ids
        assert got.prompt_logprobs is not None
        assert want.prompt_logprobs is not None
        assert got.prompt_logprobs[:start] == (None,) * start
        pairs = list(zip(got.prompt_logprobs[start:], want.prompt_logprobs[start:], strict=True))
        assert pairs
        for mine, its in pairs:
            assert mine is not None
            assert its is not None
            assert mine.token_id == its.token_id
            assert [token for token, _ in mine.top] == [token for token, _ in its.top]
            torch.testing.assert_close(mine.logprob, its.logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [512, 16])
def test_completions_of_one_prompt_share_it_at_once(mixtral: Served, reference: Engine, budget: int) -> None:
    """In the very step that computes it: nobody attends before all keys and values of a layer are written."""
    engine = mixtral.engine(page_size=4, max_num_batched_tokens=budget, max_num_seqs=16)
    requests = [
        request(f"{adapter}{choice}", [*PREFIX, 9], adapter, choice, temperature=1.0, seed=3)
        for adapter in ("R-lora", None, "D-parallel")
        for choice in range(4)
    ]
    outputs = run(engine, requests)
    assert sorted(output.num_cached_tokens or 0 for output in outputs.values()) == [0] * 3 + [40] * 9
    assert_right(reference, requests, outputs)


def test_a_conversation_goes_on(mixtral: Served, reference: Engine) -> None:
    """The second turn's prompt is the first one, its answer, and something new."""
    engine = mixtral.engine(page_size=4)
    first = run(engine, [request("first", PREFIX[:10], "R-norm", max_tokens=20)])["first"]
    second = request("second", [*PREFIX[:10], *first.token_ids, 7, 7, 7], "R-norm")
    outputs = run(engine, [second])
    assert outputs["second"].num_cached_tokens == 28, "29 tokens had their keys and values computed"
    assert_right(reference, [second], outputs)


def test_right_when_pages_are_scarce(mixtral: Served, reference: Engine) -> None:
    """Eviction, preemption, chunks and sharing all at once."""
    engine = mixtral.engine(page_size=4, kv_memory=30 * PAGE_BYTES, max_num_batched_tokens=20, max_num_seqs=8)
    generator = torch.Generator().manual_seed(5)
    names = [None, "R-lora", "E-lora", "S-lora"]
    requests = []
    for i in range(40):
        shared = int(torch.randint(41, (1,), generator=generator))
        tail = torch.randint(128, (1 + i % 9,), generator=generator).tolist()
        requests.append(request(str(i), [*PREFIX[:shared], *tail], names[i % 4], max_tokens=1 + i % 23))
    outputs = run(engine, requests)
    stats = engine.stats()
    assert stats.num_preemptions > 3
    assert stats.prefix_hits > 150
    assert_right(reference, requests, outputs)


def test_another_content_under_the_same_name_is_another_adapter(mixtral: Served, tmp_path: Path) -> None:
    """A reload: nothing that the old version has computed is found by the new one, and the old one's request goes on."""
    blocks = find_moe_blocks(tiny_model("mixtral"))
    config = PerftConfig(variant="R", r=4, num_experts=5, top_k=2)
    refs = [
        AdapterRef(name="mine", source=str(random_adapter(tmp_path / str(v), config, blocks, seed=v)), version=v)
        for v in (1, 2)
    ]
    prompt = [*PREFIX, 1, 2]
    fresh = [run(mixtral.engine(prefix_caching="off"), [request("x", prompt, ref)])["x"].token_ids for ref in refs]
    assert fresh[0] != fresh[1]
    engine = mixtral.engine(page_size=4)
    outputs = {name: Output() for name in ("old", "new", "new again")}
    engine.submit(request("old", prompt, refs[0]))
    while not outputs["old"].token_ids:
        step(engine, outputs)
    engine.submit(request("new", prompt, refs[1]))
    engine.retire("mine", 1)
    while not all(outputs[name].finish_reason for name in ("old", "new")):
        step(engine, outputs)
    outputs |= run(engine, [request("new again", prompt, refs[1])])
    assert [output.num_cached_tokens for output in outputs.values()] == [0, 0, 40]
    assert [output.token_ids for output in outputs.values()] == [fresh[0], fresh[1], fresh[1]]


def test_an_interrupted_step_leaves_nothing_wrong_behind(
    mixtral: Served, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are known when they are scheduled; if they are not filled then, nobody may find them."""

    def interrupted(plan: Plan) -> NoReturn:
        raise KeyboardInterrupt

    engine = mixtral.engine(page_size=4)
    one = request("x", [*PREFIX, 1, 2], "R-lora")
    engine.submit(one)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.abort("x")
    outputs = run(engine, [one])
    assert outputs["x"].num_cached_tokens == 0
    assert_right(reference, [one], outputs)


def test_bases_differ_by_config_and_by_weights(mixtral: Served) -> None:
    digest = mixtral.engine().base_digest
    assert digest == mixtral.engine(max_num_seqs=4, kv_memory=1 << 20).base_digest
    assert digest != mixtral.engine(dtype="bfloat16").base_digest
