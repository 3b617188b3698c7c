"""LoRAs on attention projections, served beside PERFT adapters: the tokens are those of PEFT, whoever else is in the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import request, run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from served import Served
from tiny import LORA_SETTINGS, random_adapter, random_lora, random_loras, save_tiny_model, tiny_model

from perft import PerftConfig
from perft.attention import find_attention_blocks
from perft.errors import AdapterError
from perft.lora import read_served_adapter
from perft.moe import find_moe_blocks
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.engine.batch import Batch
from perft_serve.engine.engine import Engine

# with as many key and value heads as query heads or fewer, with heads wider than hidden size / heads, with biases
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loras:
    """A tiny base with LoRAs, PERFT adapters beside them, and what PEFT makes of each."""

    served: Served
    perft: Served

    def engine(self, **settings: object) -> Engine:
        """A new engine with all of them."""
        both = Served(
            family=self.served.family,
            path=self.served.path,
            adapters={**self.served.adapters, **self.perft.adapters},
            oracle=self.served.oracle,
        )
        return both.engine(**settings)

    def oracle(self, name: str | None) -> Served:
        """Who knows what is right."""
        return self.perft if name in self.perft.adapters else self.served


@pytest.fixture(scope="module", params=FAMILIES)
def loras(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loras:
    return make_loras(request.param, tmp_path_factory.mktemp(request.param))


def make_loras(family: str, folder: Path) -> Loras:
    path = save_tiny_model(family, folder / "base")
    adapters = {
        "lora": random_loras(folder, tiny_model(family)),
        "perft": {
            name: str(random_adapter(folder / name, config, find_moe_blocks(tiny_model(family)), seed))
            for seed, (name, config) in enumerate(
                {"R": PerftConfig(variant="R", r=4, num_experts=5, top_k=2), "E": PerftConfig(variant="E", r=2)}.items()
            )
        },
    }
    made = {}
    for kind, named in adapters.items():
        first, *others = named
        oracle = PeftModel.from_pretrained(tiny_model(family), named[first], adapter_name=first)
        for name in others:
            oracle.load_adapter(named[name], adapter_name=name)
        made[kind] = Served(family=family, path=path, adapters=named, oracle=oracle.eval())
    return Loras(served=made["lora"], perft=made["perft"])


def test_a_mixed_batch_has_the_tokens_of_peft(loras: Loras) -> None:
    names = [None, *loras.served.adapters, *loras.perft.adapters, None, "LoRA-all"]
    prompts = [[*PROMPT[i % 3 :], 10 + i, 20 + i] for i in range(len(names))]
    engine = loras.engine()
    outputs = run(engine, [request(str(i), prompt, names[i]) for i, prompt in enumerate(prompts)])
    base = None
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        oracle, got = loras.oracle(name), outputs[str(i)]
        assert got.token_ids == oracle.generate(name, prompt, 8), name
        whole = [*prompt, *got.token_ids]
        logprobs_TV = oracle.logits(name, whole).log_softmax(dim=-1)
        want = logprobs_TV[len(prompt) - 1 : -1].gather(1, torch.tensor(got.token_ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(got.logprobs), want, atol=1e-4, rtol=0)
        base = oracle.logits(None, whole).log_softmax(dim=-1)
        assert (name is None) == torch.allclose(logprobs_TV, base, atol=1e-3), "each adapter changes something"


@pytest.fixture(scope="module")
def mixtral_loras(tmp_path_factory: pytest.TempPathFactory) -> Loras:
    return make_loras("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_cached_prompts_are_an_adapters_own(mixtral_loras: Loras) -> None:
    engine = mixtral_loras.engine(page_size=4)
    prompt = [*PROMPT, *PROMPT[::-1]]
    for name, num_cached in ((None, 0), ("LoRA-qv", 0), ("LoRA-all", 0), ("LoRA-qv", 12), ("R", 0), (None, 12)):
        output = run(engine, [request("x", prompt, name)])["x"]
        assert output.num_cached_tokens == num_cached
        assert output.token_ids == mixtral_loras.oracle(name).generate(name, prompt, 8)


def test_who_has_no_lora_pays_nothing(mixtral_loras: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a LoRA in the batch no projection asks for one, and without one in memory there are no tables."""
    perft_only = mixtral_loras.perft.engine()
    run(perft_only, [request("r", PROMPT, "R"), request("b", PROMPT)])
    assert perft_only._runner.arena.lora is None
    engine = mixtral_loras.engine(decode_programs="off")
    batches: list[bool] = []
    forward = engine._runner._forward

    def observed(batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        batches.append(batch.has_lora)
        return forward(batch, rows)

    monkeypatch.setattr(engine._runner, "_forward", observed)
    run(engine, [request("r", PROMPT, "R"), request("b", PROMPT)])
    assert not any(batches)
    run(engine, [request("r", PROMPT, "R"), request("l", PROMPT, "LoRA-qv", max_tokens=2)])
    assert any(batches)
    assert not batches[-1], "the LoRA's request is over"


def test_what_is_known_of_it_and_what_it_takes(mixtral_loras: Loras) -> None:
    engine = mixtral_loras.engine()
    statuses = {status.name: status for status in engine.adapter_updates()}
    status = statuses["LoRA-qv"]
    assert (status.variant, status.r, status.targets) == ("LoRA", 4, ("q_proj", "v_proj"))
    assert (status.num_experts, status.top_k) == (None, None)
    # two layers: q 32 to 32, v 32 to 16
    assert status.num_parameters == 2 * 4 * (32 + 32 + 32 + 16)
    assert status.num_bytes == 4 * status.num_parameters, "4 rows of 16 are 2 of 32: nothing is lost"
    one = statuses["LoRA-one-layer"]
    assert one.num_parameters == 7 * (32 + 16)
    assert one.num_bytes == 4 * 32 * 11, "10.5 rows of the pool"


def test_routing_is_for_adapters_that_route(mixtral_loras: Loras) -> None:
    engine = mixtral_loras.engine()
    outputs = run(
        engine,
        [request("l", PROMPT, "LoRA-qv", return_routing=True), request("r", PROMPT, "R", return_routing=True)],
    )
    assert outputs["l"].error == "adapter 'LoRA-qv' is a LoRA and has no adapter experts: leave return_routing out"
    assert outputs["r"].token_ids == mixtral_loras.perft.generate("R", PROMPT, 8)


def test_loras_come_and_go_among_perft_adapters(mixtral_loras: Loras, tmp_path: Path) -> None:
    """An arena that holds two or three of them at a time; each request's tokens are right."""
    adapters = {**mixtral_loras.served.adapters, **mixtral_loras.perft.adapters}
    bare = Served(family="mixtral", path=mixtral_loras.served.path, adapters={}, oracle=mixtral_loras.served.oracle)
    engine = bare.engine(adapter_memory=90 * 32 * 4)
    refs = {name: AdapterRef(name=name, source=path) for name, path in adapters.items()}
    want = {name: mixtral_loras.oracle(name).generate(name, PROMPT, 8) for name in adapters}
    for round in range(3):
        outputs = run(engine, [request(name, PROMPT, ref) for name, ref in refs.items()])
        for name in adapters:
            assert outputs[name].token_ids == want[name], (round, name)
    assert engine.stats().adapters.num_evictions > 2
    engine.close()


def broken(folder: Path, spoil: str) -> str:
    """A LoRA that is wrong in one way."""
    settings: dict[str, Any] = dict(LORA_SETTINGS["LoRA-qv"])
    model = tiny_model("olmoe" if spoil == "olmoe" else "mixtral")
    if spoil == "router":
        settings |= {"target_parameters": ["mlp.gate.weight"]}
    elif spoil == "wide":
        model = tiny_model("qwen3_moe")
    random_lora(folder, model, **settings)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    if spoil == "layer":
        del tensors[key.format("A")], tensors[key.format("B")]
    elif spoil == "nan":
        tensors[key.format("A")][0, 0] = torch.nan
    elif spoil == "mlp":
        tensors = {key.replace("self_attn.v_proj", "mlp.up_proj"): tensor for key, tensor in tensors.items()}
    elif spoil == "beyond":
        for side in "AB":
            tensors[key.format(side).replace("layers.1", "layers.2")] = tensors[key.format(side)].clone()
    save_file(tensors, file)
    if spoil == "dora":
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    return str(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("router", r"it is a LoRA on q_proj, v_proj, router .*; of LoRAs those on attention projections can be served"),
        ("mlp", r"it is a LoRA on q_proj, up_proj \(model\.layers\.0\.mlp\.up_proj"),
        ("layer", r"tensors are missing for model\.layers\.1\.self_attn\.v_proj"),
        ("beyond", r"projections that the base does not have: model\.layers\.2"),
        ("nan", r"v_proj\.lora_A\.weight holds NaN"),
        ("dora", r"use_dora: plain LoRA is supported"),
        ("wide", r"q_proj\.lora_B\.weight is 64 wide, but 32 is needed: is the adapter for another base"),
    ],
)
def test_what_cannot_be_served_is_refused(spoil: str, message: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    blocks, attention = find_moe_blocks(model), find_attention_blocks(model)
    with pytest.raises(AdapterError, match=message):
        read_served_adapter(broken(tmp_path / "broken", spoil), blocks, attention)


def test_a_base_with_other_projections_takes_no_lora(tmp_path: Path) -> None:
    """DeepSeek's compressed queries, keys and values: a LoRA for Mixtral finds no place there."""
    model = tiny_model("deepseek_v3")
    attention = find_attention_blocks(model)
    assert {target for block in attention for target in block.widths} == {"o_proj"}
    with pytest.raises(
        AdapterError, match=r"projections that the base does not have: model\.layers\.0\.self_attn\.q_proj"
    ):
        read_served_adapter(broken(tmp_path / "lora", "none"), find_moe_blocks(model), attention)
    shutil.rmtree(tmp_path / "lora")
    random_lora(tmp_path / "lora", model, r=2, target_modules=["o_proj"])
    read_served_adapter(tmp_path / "lora", find_moe_blocks(model), attention)
