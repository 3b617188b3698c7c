"""`perft analyze`: what it counts is right, what it draws is there, and the page needs nothing beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_adapter, save_tiny_model, tiny_model

from perft.adapter import read_adapter
from perft.analysis import Analysis, _base_keys, _base_router, analyze, balance, mutual_information
from perft.analysis_report import choose_layers, project, rows, write_report
from perft.cli import main
from perft.config import PerftConfig
from perft.errors import AdapterError, PerftError
from perft.layer import PerftLayer, RouterTrace
from perft.moe import find_moe_blocks
from perft_serve import LLM, SamplingParams


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    words = [
        "hello",
        "router",
        "the quick brown fox jumps",
        "adapter",
        "dog",
        "one of the experts",
        "token",
        "a",
        "b",
    ] * 2
    file.write_text("".join(json.dumps({"prompt": word, "completion": f" {word[::-1]}"}) + "\n" for word in words))
    return str(file)


@pytest.fixture(scope="module")
def analyses(tiny_base: Path, tiny_adapters: Mapping[str, str], data: str) -> dict[str, Analysis]:
    return {name: analyze(path, str(tiny_base), [data], limit=17) for name, path in tiny_adapters.items()}


def test_choices_are_those_of_the_engine(
    analyses: Mapping[str, Analysis], tiny_base: Path, tiny_adapters: Mapping[str, str], data: str
) -> None:
    """Adapter experts by `return_routing`, which the serving step itself says."""
    llm = LLM(str(tiny_base), dict(tiny_adapters), dtype="float32", kv_memory=1 << 23)
    records = [json.loads(line) for line in Path(data).read_text().splitlines()][:17]
    assert llm.tokenizer is not None
    prompts = [[*llm.tokenizer.encode(record["prompt"] + record["completion"]), 0] for record in records]
    params = SamplingParams(max_tokens=1, temperature=0.0, return_routing=True)
    for name in ("routed", "embedded", "dense", "single"):
        found = analyses[name]
        assert found.num_tokens == sum(map(len, prompts))
        counts = torch.zeros(2, len(found.layers[0].adapter_load_M), dtype=torch.float64)
        for output in llm.generate(prompts, params, adapter=name):
            routing = output.outputs[0].routing
            assert routing is not None
            for by_layer in np.asarray(routing.ids):
                for layer, ids in enumerate(by_layer):
                    counts[layer] += torch.bincount(torch.as_tensor(ids), minlength=counts.shape[1])
        for layer, each in enumerate(found.layers):
            torch.testing.assert_close(each.adapter_load_M, (counts[layer] / counts[layer].sum()).float())
    llm.close()


def test_what_the_numbers_mean(analyses: Mapping[str, Analysis]) -> None:
    for name, found in analyses.items():
        assert found.num_examples == 17
        for each in found.layers:
            assert float(each.base_load_N.sum()) == pytest.approx(1)
            taken = each.base_load_N > 0
            torch.testing.assert_close(each.together_NM[taken].sum(1), torch.ones(int(taken.sum())))
            # every token takes the same number of adapter experts, so base loads weigh the rows
            torch.testing.assert_close(each.base_load_N @ each.together_NM, each.adapter_load_M)
            assert (each.router_entropy is not None) == (name == "routed")
    assert all(each.information == pytest.approx(0, abs=1e-9) for each in analyses["dense"].layers)
    assert all(each.information > 0 for each in analyses["embedded"].layers)
    for each in analyses["embedded"].layers:
        torch.testing.assert_close(each.base_load_N, each.adapter_load_M)


def test_balance_and_information() -> None:
    assert balance(torch.full((4,), 0.25)) == pytest.approx(1)
    assert balance(torch.tensor([1.0, 0.0])) == 0
    assert balance(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)
    assert balance(torch.ones(1)) == 1
    assert mutual_information(torch.eye(4)) == pytest.approx(2)
    assert mutual_information(torch.ones(3, 5)) == pytest.approx(0)


def test_alignment_with_own_memories(tiny_base: Path, tmp_path: Path, data: str) -> None:
    """An adapter whose router vectors are one of its own key memories each."""
    blocks = find_moe_blocks(tiny_model("mixtral"))
    path = random_adapter(tmp_path / "a", PerftConfig(r=1, num_experts=3, top_k=1), blocks)
    layers = read_adapter(path).layers
    tensors: dict[str, Any] = {}
    for block in blocks:
        own = layers[block.layer]
        tensors |= {
            f"base_model.model.{block.name}.perft_down": own.down_MRD.clone(),
            f"base_model.model.{block.name}.perft_up": own.up_MRD.clone(),
            f"base_model.model.{block.name}.perft_gate": -2 * own.down_MRD[:, 0],
        }
    from safetensors.torch import save_file

    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    for each in analyze(path, str(tiny_base), [data]).layers:
        assert each.own_keys == pytest.approx(1)
        assert each.other_keys is not None
        assert each.other_keys < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_of_the_base_are_found(family: str) -> None:
    model = tiny_model(family)
    for block in find_moe_blocks(model):
        router = _base_router(model, block)
        assert router is not None
        assert router.shape == (block.num_experts, block.hidden_size)
        layer = PerftLayer(model.get_submodule(block.name), block, RouterTrace())
        keys, owner = _base_keys(layer, torch.Generator().manual_seed(0))
        assert keys is not None
        assert owner is not None
        assert keys.shape == (len(owner), block.hidden_size)
        # a key memory's product with an input is what the expert's first matrices give for it
        first = dict(layer.base_layer.named_parameters())["gate_up_proj"].detach()
        h_D = torch.randn(block.hidden_size)
        products = (first @ h_D if first.shape[2] == block.hidden_size else h_D @ first)[owner[-1]]
        assert float((products - keys[-1] @ h_D).abs().min()) < 1e-4


def test_the_plane_is_the_routers_as_much_as_the_memories() -> None:
    """A few router vectors along one axis, many memories along another: both are seen, whatever the inputs are."""
    torch.manual_seed(0)
    axes = torch.eye(30)
    noise = 0.01 * torch.randn(404, 30)
    sides = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None]
    kinds = {
        "router": axes[7] + sides * axes[0] + noise[:4],
        "base_keys": axes[7] + sides.repeat(100, 1) * axes[1] + noise[4:],
        "hidden": 50 * torch.randn(20, 30),
    }
    placed, share = project(kinds, "pca", 0)
    assert sum(share) > 0.9
    assert share[0] == pytest.approx(share[1], rel=0.1)
    reach = max(float(placed[name].norm(dim=-1).max()) for name in ("router", "base_keys"))
    assert float(placed["hidden"].norm(dim=-1).median()) < reach
    again, _ = project({**kinds, "hidden": -kinds["hidden"]}, "pca", 0)
    torch.testing.assert_close(again["router"], placed["router"])
    torch.testing.assert_close(again["hidden"], -placed["hidden"])


def test_the_report_is_whole(analyses: Mapping[str, Analysis], tmp_path: Path) -> None:
    for name in ("routed", "dense"):
        found = analyses[name]
        paths = write_report(found, tmp_path / name, layers=[1])
        pictures = ["vectors.png", "load.png", *(["together.png"] if name == "routed" else [])]
        assert [path.name for path in paths] == [*pictures, "analysis.html", "analysis.json"]
        page = paths[-2].read_text()
        assert page.count("data:image/png;base64,") == len(pictures)
        assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|@import", page)
        written = json.loads(paths[-1].read_text())
        assert written["layers"][1]["base_load"] == pytest.approx(found.layers[1].base_load_N.tolist(), abs=1e-5)
        head, body = rows(found)
        assert len(body) == 2
        assert ("router entropy" in head) == ("bits in common" in head) == (name == "routed")


def test_the_command(
    tiny_base: Path, tiny_adapters: Mapping[str, str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyze", tiny_adapters["routed"], "--base", str(tiny_base), "--data", data, "--limit", "4"]
    assert main([*arguments, "--json", "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_examples"], found["variant"], found["top_k"]) == (4, "R", 2)
    assert (tmp_path / "out" / "analysis.html").is_file()
    assert main([*arguments, "--layers", "0"]) == 2
    assert "give --output" in capsys.readouterr().err


def test_what_is_wrong_is_said(
    analyses: Mapping[str, Analysis], tiny_base: Path, tiny_adapters: Mapping[str, str], tmp_path: Path, data: str
) -> None:
    with pytest.raises(PerftError, match=r"layers \[7\] are not adapted; there are \[0, 1\]"):
        choose_layers(analyses["routed"], [7])
    with pytest.raises(PerftError, match="limit and max_length"):
        analyze(tiny_adapters["routed"], str(tiny_base), [data], limit=0)
    with pytest.raises(AdapterError, match="does not exist"):
        analyze(tmp_path / "none", str(tiny_base), [data])
    other = save_tiny_model("olmoe", tmp_path / "other")
    for file in tiny_base.glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(AdapterError):
        analyze(tiny_adapters["embedded"], str(other), [data])
    assert math.isfinite(analyses["routed"].layers[0].information)
