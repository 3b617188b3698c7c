"""How evenly adapters' tokens spread: what is counted, and that looking at it changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from perft_kernels.adapter_router import KIND_ALL, KIND_EMBEDDED, KIND_ROUTED
from perft_serve.adapters.arena import AdapterArena
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import Lease
from perft_serve.engine.balance import MAX_ADAPTERS, Balances, entropy_of
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest
from perft_serve.engine.params import SamplingParams
from perft_serve.engine.scheduler import Chunk, Plan
from perft_serve.engine.sequence import Sequence


class Arena:
    """Three adapters: routed over adapter experts 4 to 7, dense, and embedded over 20 and 21."""

    rule_A6 = torch.tensor([[KIND_ROUTED, 4, 1, 0, 0, 4], [KIND_ALL, 3, 0, 0, 0, 8], [KIND_EMBEDDED, 2, 0, 0, 0, 20]])


def chunk(name: str, slot: int, num_tokens: int) -> Chunk:
    ref = AdapterRef(name=name, source="somewhere")
    request = EngineRequest(request_id=name, prompt_ids=(1,) * num_tokens, params=SamplingParams(), adapter=ref)
    seq = Sequence(request=request, seed=0, max_tokens=1)
    seq.hold(Lease(ref=ref, slot=slot, width=1, digest=name))
    return Chunk(seq, 0, num_tokens, samples=False)


def balances() -> Balances:
    return Balances(cast(AdapterArena, Arena()))


def entropies(found: Balances) -> dict[str, float]:
    return {balance.adapter: balance.entropy for balance in found.take()}


def test_shares_become_entropies() -> None:
    even, one = torch.full((3, 4), 100.0), torch.zeros(3, 4)
    one[:, 2] = 100.0
    assert entropy_of(even) == pytest.approx(1.0)
    assert entropy_of(one) == 0.0
    assert entropy_of(torch.tensor([[50.0, 50.0, 0.0, 0.0]])) == pytest.approx(math.log(2) / math.log(4))
    assert entropy_of(torch.cat([even, one])) == pytest.approx(0.5), "a layer that collapses is not hidden by others"
    assert entropy_of(torch.cat([even, torch.zeros(2, 4)])) == pytest.approx(1.0), "layers that are not adapted"
    assert entropy_of(torch.zeros(2, 4)) is None
    assert entropy_of(torch.full((1, 4), 2.0)) is None, "too few to tell"
    assert entropy_of(torch.full((1, 1), 100.0)) is None, "no choice"


def test_each_token_counts_for_its_own_adapter() -> None:
    found = balances()
    plan = Plan((chunk("routed", 0, 64), chunk("dense", 1, 64), chunk("embedded", 2, 64)), ())
    ids_TX = torch.full((192, 2), -1)
    ids_TX[:64, 0] = 4 + torch.arange(64) % 4
    ids_TX[64:128] = torch.tensor([8, 9])
    ids_TX[128:] = 21
    found.note(plan, [(0, ids_TX), (1, ids_TX)])
    assert entropies(found) == {"routed": pytest.approx(1.0), "embedded": 0.0}
    assert entropies(found) == {}, "it was told"


def test_another_version_begins_anew_and_few_are_remembered() -> None:
    found = balances()
    found._add("a", "1", torch.full((1, 4), 1000.0))
    found._add("a", "2", torch.tensor([[100.0, 0.0, 0.0, 0.0]]))
    assert entropies(found) == {"a": 0.0}
    for index in range(2 * MAX_ADAPTERS):
        found._add(str(index), "1", torch.full((1, 4), 1000.0))
    assert len(found._seen) == MAX_ADAPTERS


def test_what_is_old_counts_less() -> None:
    found = balances()
    for _ in range(10):
        found._add("a", "1", torch.full((1, 4), 1000.0))
    for _ in range(60):
        found._add("a", "1", torch.tensor([[1000.0, 0.0, 0.0, 0.0]]))
    assert entropies(found)["a"] < 0.01


def run(engine: Engine) -> dict[str, list[int | None]]:
    tokens: dict[str, list[int | None]] = {}
    for name in ("routed", "embedded", "dense"):
        ref = AdapterRef(name=name, source="", version=1)
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        engine.submit(EngineRequest(request_id=name, prompt_ids=tuple(range(60)), params=params, adapter=ref))
    while engine.has_work():
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
    return tokens


def test_looking_changes_no_token(
    tiny_base: Path, tiny_adapters: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": 1 << 22}
    config = EngineConfig(model=str(tiny_base), adapters=dict(tiny_adapters), **settings)
    watched, unwatched = Engine(config), Engine(config)
    monkeypatch.setattr(unwatched._runner.balances, "begin", lambda batch: None)
    try:
        assert run(watched) == run(unwatched)
        counts, others = watched.take_counts(), unwatched.take_counts()
    finally:
        watched.close()
        unwatched.close()
    assert counts is not None
    assert others is not None
    assert {balance.adapter for balance in counts.balances} == {"routed", "embedded"}
    assert all(0 < balance.entropy <= 1 for balance in counts.balances)
    assert not others.balances
