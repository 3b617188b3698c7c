"""LoRA, the paper's baseline: trained by recipes through PEFT, loaded by PEFT, described by `perft inspect`, refused if bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, TrainerCallback

from perft.base import build_skeleton, count_activated, load_skeleton
from perft.cli import main
from perft.errors import AdapterError, PerftError
from perft.fleet import train_many
from perft.lora import LoraAdapter, LoraRecipe, read_any_adapter, read_lora
from perft.moe import find_moe_blocks
from perft.recipe import TrainConfig, build_configs, load_recipe, recipe_values
from perft.report import describe_adapter
from perft.train import train

RECIPES = Path(__file__).parents[2] / "recipes" / "baselines"
NEEDED: dict[str, Any] = {"model": "base", "data": "train.jsonl", "output": "out", "method": "lora"}


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Eight answers to learn by heart."""
    words = ["hello", "world", "experts", "router", "token", "adapter", "fox", "dog"]
    lines = [json.dumps({"prompt": a, "completion": f" {b}"}) for a, b in zip(words, words[::-1], strict=True)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": str(tiny_base),
            "data": (str(tmp_path / "train.jsonl"),),
            "output": str(tmp_path / "out"),
            "loss_on": "answer",
            "learning_rate": 2e-2,
            "max_steps": 12,
            "batch_size": 8,
            "warmup": 0,
            "log_steps": 1,
            "seed": 1,
            "dtype": "float32",
        }
        return TrainConfig(**{**values, **changes})

    return make


class Grab(TrainerCallback):
    """Keeps what the trained model says."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.logits = kwargs["model"].eval()(torch.arange(10)[None]).logits


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [
        (LoraRecipe(r=4), "float32"),
        (LoraRecipe(r=2, alpha=8, targets=("o_proj", "router", "experts"), layers_to_transform=[1]), "bfloat16"),
    ],
    ids=["qv", "router-experts"],
)
def test_it_learns_and_is_an_adapter_of_peft(
    lora: LoraRecipe, dtype: Any, recipe: Callable[..., TrainConfig], tiny_base: Path
) -> None:
    grab = Grab()
    config = recipe(dtype=dtype)
    finished = train(config, lora, callbacks=[grab])
    output = Path(config.output)
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert not any("router_aux_loss" in entry for entry in log)
    assert isinstance(finished, LoraAdapter)
    assert set(finished.targets) == set(lora.targets)
    assert finished.layers == (lora.layers_to_transform or [0, 1])
    assert {tensor.dtype for tensor in finished.tensors} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, output).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(10)[None]).logits, grab.logits, atol=0, rtol=0)
    record = json.loads((output / "perft_training.json").read_text())
    assert record["outcome"]["digest"] == finished.digest
    assert record["recipe"] == json.loads(json.dumps(recipe_values(config, lora)))
    card = (output / "README.md").read_text()
    assert f"# LoRA adapter ({', '.join(finished.targets)})" in card
    assert "import perft" not in card
    assert ("perft-serve serve" in card) == (finished.targets == ["q_proj", "v_proj"])
    report = describe_adapter(output, base=tiny_base)
    assert (report.variant, report.targets, report.digest) == ("LoRA", finished.targets, finished.digest)


def test_the_commands(
    recipe: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    recipe()  # writes the data
    flags = ["--model", str(tiny_base), "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["train", *flags, "--method", "lora", "--targets", "q_proj", "v_proj", "--max-steps", "1"]) == 0
    assert "trained LoRA: " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("variant LoRA", "targets q_proj, v_proj", "rank (r) 8", "scale 2", "2 (0-1)", "1 steps"):
        assert words in shown
    assert main(["inspect", str(tmp_path / "out"), "--base", str(tiny_base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"] == ["q_proj", "v_proj"]


def test_a_recipe_is_of_one_method() -> None:
    train_config, lora = build_configs({**NEEDED, "targets": "router", "r": "4"})
    assert lora == LoraRecipe(targets=("router",), r=4, alpha=8.0)
    assert build_configs(recipe_values(train_config, lora)) == (train_config, lora)
    for values, message in (
        ({"variant": "R"}, "variant has no meaning for method='lora'"),
        ({"num_experts": 2}, "num_experts has no meaning for method='lora'"),
        ({"targets": []}, "targets must name each target once"),
        ({"targets": ["q_proj", "q_proj"]}, "targets must name each target once"),
        ({"targets": "up_proj"}, "targets must be one of q_proj"),
        ({"targets": ["router"], "dropout": 0.1}, "PEFT has none for a LoRA on the router"),
        ({"r": 0}, "r must be at least 1"),
        ({"method": "perft", "targets": "q_proj"}, "targets has no meaning for method='perft'"),
        ({"method": "prefix"}, "method must be one of perft, lora"),
    ):
        with pytest.raises(PerftError, match=message):
            build_configs({**NEEDED, **values})
    with pytest.raises(PerftError, match="a: method=lora is for `perft train`"):
        train_many([("a", train_config, lora)])


def test_the_example_recipes_have_the_papers_sizes() -> None:
    """On OLMoE-1B-7B: 2.10 M parameters for qvLoRA of rank 16 (0.164 % of the activated ones)."""
    counts = {}
    for file in sorted(RECIPES.glob("*.yaml")):
        _, lora = build_configs(load_recipe(file))
        assert isinstance(lora, LoraRecipe)
        model = build_skeleton(OlmoeConfig(intermediate_size=1024))
        activated = count_activated(model, find_moe_blocks(model))
        with torch.device("meta"):
            peft = get_peft_model(model, lora.to_peft(model))
        counts[file.stem] = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert counts == {
        "qv": 16 * 2 * 16 * (2048 + 2048),
        "router": 16 * 16 * (2048 + 64),
        "experts": 16 * 64 * 16 * ((2048 + 2048) + (1024 + 2048)),
    }
    assert f"{counts['qv'] / activated:.3%}" == "0.164%"


def test_what_the_base_does_not_have_is_said() -> None:
    model = build_skeleton(OlmoeConfig(num_hidden_layers=2))
    with pytest.raises(PerftError, match=r"names layers that have no such target: \[5\]"):
        LoraRecipe(layers_to_transform=[0, 5]).to_peft(model)
    for module in model.modules():
        if hasattr(module, "k_proj"):
            del module.k_proj
    with pytest.raises(PerftError, match="OlmoeForCausalLM has no k_proj"):
        LoraRecipe(targets=("k_proj",)).to_peft(model)


@pytest.fixture
def stored(tiny_base: Path, tmp_path: Path) -> Path:
    """A LoRA with patterns, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, "layers.1.self_attn.q_proj": 10, "q_proj": 11},
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(str(tmp_path / "stored"))
    return tmp_path / "stored"


def test_scales_are_pefts(stored: Path, tiny_base: Path) -> None:
    adapter = read_any_adapter(stored, tiny_base)
    assert isinstance(adapter, LoraAdapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(stored))
    scales = {
        pair.path: model.get_submodule(f"base_model.model.{pair.path}").scaling["default"] for pair in adapter.pairs
    }
    assert {pair.path: pair.scale for pair in adapter.pairs} == scales
    assert {pair.down_RI.shape[0] for pair in adapter.pairs} == {2, 4}
    assert read_lora(stored).digest == adapter.digest


def change(folder: Path, **fields: Any) -> None:
    """Changes fields of the configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora: plain LoRA is supported"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, "bias, modules_to_save: plain LoRA"),
        ({"of_the_future": 1}, "of_the_future: plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base's weights"),
        ({"r": 0}, "r"),
        ({"r": 8}, r"are not of rank 8"),
        ({"lora_alpha": "much"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"(a+)+b": 2}}, "is a regular expression, which is not supported"),
        ({"exclude_modules": "(a+)+b"}, "is a regular expression, which is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "tensors are missing: base_model"),
        ({"target_modules": ["q_proj"]}, "tensors for modules that the base does not have, or that are not targets"),
        ({"target_modules": ["w_proj"]}, "PEFT cannot put it on this base"),
    ],
)
def test_a_configuration_that_is_not_honoured_is_refused(
    fields: dict[str, Any], message: str, stored: Path, tiny_base: Path
) -> None:
    change(stored, **fields)
    with pytest.raises(AdapterError, match=message):
        read_any_adapter(stored, tiny_base)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nan", "layers.0.self_attn.q_proj.lora_B.weight holds NaN"),
        ("alone", "has lora_B alone"),
        ("extra", "do not belong to a plain LoRA: base_model.model.x.lora_magnitude_vector"),
        ("int", "is torch.int32"),
        ("narrow", r"has shape \[4, 31\], but \[4, 32\] is needed"),
        ("pickle", "pickled weights can run code"),
    ],
)
def test_tensors_that_are_not_whole_are_refused(spoil: str, message: str, stored: Path, tiny_base: Path) -> None:
    file = stored / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    if spoil == "nan":
        tensors[key.format("B")][1, 2] = torch.nan
    elif spoil == "alone":
        del tensors[key.format("A")]
    elif spoil == "extra":
        tensors["base_model.model.x.lora_magnitude_vector"] = torch.ones(3)
    elif spoil == "int":
        tensors[key.format("A")] = tensors[key.format("A")].int()
    elif spoil == "narrow":
        tensors[key.format("A")] = tensors[key.format("A")][:, :31].contiguous()
    save_file(tensors, file)
    if spoil == "pickle":
        shutil.move(file, stored / "adapter_model.bin")
    with pytest.raises(AdapterError, match=message):
        read_lora(stored, load_skeleton(tiny_base))
