"""Adapters on disk: what was written is read, and nothing broken is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_adapter, tiny_model, variant_configs

from perft import AdapterError, PerftConfig
from perft.adapter import read_adapter
from perft.moe import MoeBlock, find_moe_blocks

Tensors = dict[str, torch.Tensor]
DOWN = "base_model.model.model.layers.0.mlp.experts.perft_down"
GATE = "base_model.model.model.layers.1.mlp.experts.perft_gate"


@pytest.fixture(scope="module")
def blocks() -> list[MoeBlock]:
    return find_moe_blocks(tiny_model("mixtral"))


@pytest.mark.parametrize("name", list(variant_configs()))
@pytest.mark.parametrize("with_base", [True, False])
def test_round_trip(name: str, with_base: bool, tmp_path: Path, blocks: list[MoeBlock]) -> None:
    config = variant_configs()[name]
    random_adapter(tmp_path, config, blocks)
    adapter = read_adapter(tmp_path, blocks if with_base else None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(adapter.layers) == (config.layers_to_transform or [0, 1])
    assert adapter.num_parameters == sum(t.numel() for t in tensors.values())
    assert adapter.num_bytes == sum(t.nbytes for t in tensors.values())
    assert adapter.num_bytes <= (tmp_path / "adapter_model.safetensors").stat().st_size
    assert adapter.num_experts == (4 if config.variant == "E" else config.num_experts)
    assert torch.equal(adapter.layers[1].down_MRD, tensors[DOWN.replace(".0.", ".1.")])


def test_digest_is_of_the_content(tmp_path: Path, blocks: list[MoeBlock]) -> None:
    """The same content has one digest, with or without a base; a bit or a rule changed gives another."""
    config = PerftConfig(variant="R", r=2, norm_topk=True)
    digests = {
        "first": read_adapter(random_adapter(tmp_path / "a", config, blocks), blocks).digest,
        "seed": read_adapter(random_adapter(tmp_path / "c", config, blocks, seed=1), blocks).digest,
        "rule": read_adapter(
            random_adapter(tmp_path / "d", PerftConfig(variant="R", r=2, norm_topk=False), blocks), blocks
        ).digest,
    }
    assert len(set(digests.values())) == 3
    assert read_adapter(random_adapter(tmp_path / "b", config, blocks)).digest == digests["first"]


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def nan(tensors: Tensors) -> None:
    tensors[DOWN][1, 2, 3] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(DOWN), r"layers.0.mlp.experts.perft_down is missing"),
        (lambda t: t.pop(GATE), r"layers.1.mlp.experts.perft_gate is missing"),
        (lambda t: [t.pop(k) for k in list(t) if ".0." in k], r"missing for model.layers.0.mlp.experts"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2)}), "do not belong to a PERFT adapter: lm_head.weight"),
        (lambda t: t.update({DOWN.replace(".0.", ".7."): torch.ones(5, 4, 32)}), "does not have.*layers.7"),
        (lambda t: t.update({DOWN: torch.ones(5, 3, 32)}), r"has shape \[5, 3, 32\], but \[5, 4, 32\] is needed"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int32)}), "is torch.int32"),
        (lambda t: t.update({DOWN: t[DOWN].double()}), "is torch.float64"),
        (nan, r"perft_down holds NaN or infinity"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_broken_tensors(
    edit: Callable[[Tensors], object], message: str, tmp_path: Path, blocks: list[MoeBlock]
) -> None:
    random_adapter(tmp_path, variant_configs()["R-lora"], blocks)
    change(tmp_path, edit)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path, blocks)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_truncated_file(keep: int, tmp_path: Path, blocks: list[MoeBlock]) -> None:
    random_adapter(tmp_path, variant_configs()["R-lora"], blocks)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        read_adapter(tmp_path, blocks)


def test_another_base(tmp_path: Path, blocks: list[MoeBlock]) -> None:
    """Another hidden size, another number of base experts, other layers."""
    random_adapter(tmp_path / "r", variant_configs()["R-lora"], blocks)
    random_adapter(tmp_path / "e", variant_configs()["E-lora"], blocks)
    wide = [
        MoeBlock(layer=b.layer, name=b.name, hidden_size=64, num_experts=4, top_k=2, norm_topk=True) for b in blocks
    ]
    many = [
        MoeBlock(layer=b.layer, name=b.name, hidden_size=32, num_experts=8, top_k=2, norm_topk=True) for b in blocks
    ]
    with pytest.raises(AdapterError, match=r"\[5, 4, 32\], but \[5, 4, 64\].*another base"):
        read_adapter(tmp_path / "r", wide)
    with pytest.raises(AdapterError, match=r"\[4, 2, 32\], but \[8, 2, 32\].*another base"):
        read_adapter(tmp_path / "e", many)
    with pytest.raises(AdapterError, match="layers.1.mlp.experts"):
        read_adapter(tmp_path / "r", blocks[:1])


def test_pickles_are_never_read(tmp_path: Path, blocks: list[MoeBlock]) -> None:
    random_adapter(tmp_path, variant_configs()["R-lora"], blocks)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: pickled weights can run code"):
        read_adapter(tmp_path, blocks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "peft_type is None"),
        ('{"peft_type": "LORA", "r": 8}', "peft_type is 'LORA'"),
        ('{"peft_type": "PERFT", "variant": "R", "top_k": 9}', "top_k=9 is more than"),
        ('{"peft_type": "PERFT", "variant": "R", "experts": 9}', r"unknown fields \['experts'\]"),
    ],
)
def test_broken_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_missing_pieces(tmp_path: Path, blocks: list[MoeBlock]) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="has no adapter_config.json"):
        read_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="perft import"):
        read_adapter(tmp_path)
    random_adapter(tmp_path, variant_configs()["S-lora"], blocks)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="no adapter_model.safetensors.*does not exist"):
        read_adapter(tmp_path, blocks)


def test_config_on_disk_is_plain_json(tmp_path: Path, blocks: list[MoeBlock]) -> None:
    random_adapter(tmp_path, variant_configs()["R-base-rank"], blocks)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["variant"], fields["combine"]) == ("PERFT", "R", "base-rank")
    assert "target_modules" not in fields
