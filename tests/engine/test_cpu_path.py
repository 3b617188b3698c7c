"""The engine on a CPU in bfloat16: packed weights, the kernels in C, decode steps as programs. Same tokens as without them,
and no bit of a request's result depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import Output, request, run
from tiny import random_adapters, random_loras
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import perft_kernels.native
from perft_serve.engine.batch import Batch
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.decode_programs import DecodePrograms
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest

VOCAB_SIZE = 160
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# By family, with whether the kernels do everything in each layer.
BASES: dict[str, tuple[PreTrainedConfig, bool]] = {
    "mixtral": (MixtralConfig(**_COMMON, intermediate_size=96, num_local_experts=4), True),
    "olmoe": (OlmoeConfig(**_COMMON, intermediate_size=48, num_experts=8, norm_topk_prob=False), True),
    "qwen3_moe": (
        Qwen3MoeConfig(**_COMMON, moe_intermediate_size=48, intermediate_size=48, num_experts=6, head_dim=16),
        True,
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(
            **_COMMON, moe_intermediate_size=48, intermediate_size=48, num_experts=6, shared_expert_intermediate_size=32
        ),
        False,  # the shared expert's sigmoid and SiLU
    ),
    "granitemoe": (
        GraniteMoeConfig(**_COMMON, intermediate_size=48, num_local_experts=4, logits_scaling=3.0),
        False,  # its router
    ),
    "gpt_oss": (
        GptOssConfig(**_COMMON, intermediate_size=48, num_local_experts=4, head_dim=16, sliding_window=8),
        False,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if perft_kernels.native.library() is None:
        pytest.skip("the CPU kernels cannot be compiled here")


class Base:
    """A base on disk in bfloat16, with every kind of adapter, LoRAs too."""

    def __init__(self, family: str, folder: Path) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(BASES[family][0], dtype=torch.bfloat16)
        self.path = folder / "base"
        model.save_pretrained(self.path)
        adapters = folder / "adapters"
        self.adapters = random_adapters(adapters, model.float()) | random_loras(adapters, model)

    def engine(self, **settings: object) -> Engine:
        # a cached prompt is prefilled in other pieces, which long ones round differently: attention of these is torch's
        defaults = {"dtype": "bfloat16", "kv_memory": 1 << 22, "max_num_seqs": 32, "prefix_caching": "off"}
        return Engine(
            EngineConfig(model=str(self.path), adapters=self.adapters, **{**defaults, **settings})  # type: ignore[arg-type]
        )

    def requests(self) -> list[EngineRequest]:
        """The base and every adapter, greedy and sampled."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for i, name in enumerate([None, *self.adapters, None]):
            prompt = torch.randint(VOCAB_SIZE, (2 + 3 * i,), generator=generator).tolist()
            made.append(request(str(i), prompt, name, max_tokens=4 + i, temperature=float(i % 2), seed=i))
        return made


@pytest.fixture(params=BASES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, tmp_path: Path) -> Base:
    return Base(family, tmp_path)


def everything(outputs: dict[str, Output]) -> dict[str, tuple[list[int], list[float]]]:
    return {key: (output.token_ids, output.logprobs) for key, output in outputs.items()}


def test_programs_change_no_bit(base: Base, family: str) -> None:
    requests = base.requests()
    engine = base.engine()
    got = run(engine, requests)
    assert everything(got) == everything(run(base.engine(decode_programs="off"), requests))
    programs = engine._runner._programs
    assert isinstance(programs, DecodePrograms)
    assert not programs._refused
    made = programs._programs
    assert len(made) > len(requests) // 2, "as batches shrink, each size has its program"
    num_torch_calls = max(program.num_torch_calls for program in made.values())
    assert (num_torch_calls == 0) == BASES[family][1], "of some only the attention and the linears are kernels"
    assert everything(run(engine, requests)) == everything(got), "now all programs are there"


def test_greedy_decoding_needs_no_logits(base: Base, family: str) -> None:
    """Where nothing else is wanted, programs give the likeliest token alone: the one of the logits."""
    greedy = [replace(one, params=replace(one.params, temperature=0.0, logprobs=None)) for one in base.requests()]
    engine = base.engine()
    # one that asks for more, alone at last
    longest = max(greedy, key=lambda one: one.params.max_tokens or 0)
    asks = replace(longest, request_id="asks", params=replace(longest.params, logprobs=0, max_tokens=30))
    got = run(engine, [*greedy, asks])
    want = run(base.engine(decode_programs="off"), [*greedy, asks])
    assert everything(got) == everything(want)
    made = engine._runner._programs._programs  # type: ignore[union-attr]
    assert {kind.chooses for kind in made} == {False}, "one row's logits are all rows' logits"
    assert everything(run(engine, greedy)) == {key: value for key, value in everything(want).items() if key != "asks"}
    assert any(kind.chooses for kind in made) == (family != "granitemoe"), "which divides its logits"


def test_a_greedy_token_of_nan_ends_its_own_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base("mixtral", tmp_path)
    engine = base.engine()
    requests = [request(str(i), [1 + i, 2, 3], max_tokens=8, logprobs=None) for i in range(3)]
    want = run(engine, requests)
    choose = DecodePrograms.choose

    def with_nan(programs: DecodePrograms, batch: Batch) -> torch.Tensor | None:
        chosen_B = choose(programs, batch)
        if chosen_B is not None and len(chosen_B) == 3:
            chosen_B[1] = -1
        return chosen_B

    monkeypatch.setattr(DecodePrograms, "choose", with_nan)
    got = run(engine, requests)
    assert "NaN" in (got["1"].error or "")
    assert [got[key].token_ids for key in "02"] == [want[key].token_ids for key in "02"]


@pytest.mark.parametrize("family", [family for family, (_, whole) in BASES.items() if whole])
def test_a_request_alone_and_in_company_is_the_same_to_the_bit(base: Base) -> None:
    """Where the kernels do everything; a GEMM of torch's sums in an order that depends on the number of its rows."""
    engine = base.engine()
    requests = base.requests()
    together = everything(run(engine, requests))
    for one in requests:
        assert everything(run(engine, [one]))[one.request_id] == together[one.request_id]


def mean_logprobs(outputs: dict[str, Output]) -> list[float]:
    return [sum(output.logprobs) / len(output.logprobs) for output in outputs.values()]


def test_log_probabilities_are_those_of_plain_torch(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed the same tokens: each prompt goes with what was generated, and is scored."""
    requests = base.requests()
    generated = run(base.engine(), requests)

    def scored(requests: Sequence[EngineRequest]) -> torch.Tensor:
        outputs = run(
            base.engine(),
            [
                request(
                    one.request_id,
                    (*one.prompt_ids, *generated[one.request_id].token_ids),
                    one.adapter,
                    max_tokens=0,
                    prompt_logprobs=0,
                )
                for one in requests
            ],
        )
        found = [token.logprob for o in outputs.values() for token in o.prompt_logprobs or () if token is not None]
        return torch.tensor(found)

    got = scored(requests)
    monkeypatch.setattr(perft_kernels.native, "library", lambda: None)
    monkeypatch.setattr("perft_serve.engine.packing.library", lambda: None)
    monkeypatch.setattr("perft_serve.engine.decode_programs.library", lambda: None)
    difference = (got - scored(requests)).abs()
    assert difference.median() < 0.03
    assert difference.mean() < 0.1  # where the base's router is nearly tied, bfloat16 decides either way


def test_tables_that_grow_make_new_programs(tmp_path: Path) -> None:
    base = Base("mixtral", tmp_path)
    engine = base.engine()
    requests = base.requests()
    before = everything(run(engine, requests))
    arena = engine._runner.arena
    arena._take_experts(arena.rank_LE.shape[1] + 1)
    assert everything(run(engine, requests)) == before
