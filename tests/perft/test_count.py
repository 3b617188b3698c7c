"""The paper's recipes: every one can be run, and what they would train has the sizes that the paper's own runs had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from perft.cli import main
from perft.count import AdapterCount, count
from perft.lora import LoraRecipe, Target
from perft.recipe import TrainConfig, build_configs
from perft.recipe_table import load_runs

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
BASES = PAPER / "bases"
OLMOE, MIXTRAL = "allenai/OLMoE-1B-7B-0924", "mistralai/Mixtral-8x7B-v0.1"

# Trained parameters in millions and, where known, activated ones as a percentage of ACTIVATED: as the authors give them
ACTIVATED = {OLMOE: "1.28", MIXTRAL: "12.88"}
SIZES = {
    OLMOE: {
        "S": {4: ("0.26", ""), 8: ("0.52", ""), 16: ("1.05", ""), 32: ("2.10", "0.164")},
        "R-1-of-2": {4: ("0.59", "0.026"), 8: ("1.11", ""), 16: ("2.16", ""), 32: ("4.26", "")},
        "R-2-of-4": {4: ("1.18", "0.051"), 8: ("2.23", ""), 16: ("4.33", "0.174"), 32: ("8.52", "")},
        "R-2-of-8": {4: ("2.36", "0.061"), 8: ("4.46", ""), 16: ("8.65", "0.184"), 32: ("17.0", "")},
        "R-8-of-64": {4: ("18.9", ""), 8: ("35.7", ""), 16: ("69.2", ""), 32: ("136", "")},
        "qvLoRA": {4: ("0.52", "0.041"), 8: ("1.05", ""), 16: ("2.10", ""), 32: ("4.19", "")},
        "E": {4: ("16.8", "0.164"), 8: ("33.6", ""), 16: ("67.1", "0.655"), 32: ("134", "1.31")},
    },
    MIXTRAL: {
        "S": {8: ("2.1", ""), 16: ("4.2", ""), 32: ("8.4", ""), 64: ("16.8", "")},
        "R-2-of-2": {8: ("4.5", "0.035"), 16: ("8.7", ""), 32: ("17.0", ""), 64: ("33.8", "")},
        "R-2-of-8": {8: ("17.8", "0.041"), 16: ("34.6", ""), 32: ("68.2", "0.138"), 64: ("135", "")},
        "E": {8: ("16.8", "0.033"), 16: ("33.6", ""), 32: ("67.1", "0.130"), 64: ("134", "")},
    },
}
FILES = {OLMOE: "olmoe.yaml", MIXTRAL: "mixtral.yaml"}


def digits(value: float, like: str) -> str:
    """`value` with as many decimals as `like`."""
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("base", SIZES)
def test_sizes_are_the_papers_to_the_digit(base: str) -> None:
    names = [f"commonsense-{method}-r{rank}" for method, ranks in SIZES[base].items() for rank in ranks]
    runs = load_runs(PAPER / FILES[base], names)
    (counted,) = count([(name, *build_configs(values)) for name, values in runs.items()], bases=BASES)
    assert digits(counted.num_activated / 1e9, ACTIVATED[base]) == ACTIVATED[base]
    found = {name: adapter for adapter in counted.adapters for name in adapter.runs}
    assert found.keys() == set(names)
    for method, ranks in SIZES[base].items():
        for rank, (millions, percent) in ranks.items():
            adapter = found[f"commonsense-{method}-r{rank}"]
            assert digits(adapter.num_parameters / 1e6, millions) == millions, (method, rank)
            share = 100 * adapter.num_activated / (float(ACTIVATED[base]) * 1e9)
            assert digits(share, percent) == percent or not percent, (method, rank)


def all_runs() -> Mapping[str, dict[str, Any]]:
    return {
        f"{file.stem} {name}": run for file in sorted(PAPER.glob("*.yaml")) for name, run in load_runs(file).items()
    }


def test_every_run_is_whole() -> None:
    """Each has the authors' settings, and a folder of its own."""
    runs = all_runs()
    outputs = set()
    for name, values in runs.items():
        config, adapter = build_configs(values)
        outputs.add(config.output)
        assert (config.batch_size, config.gradient_accumulation, config.epochs, config.warmup) == (16, 1, 3, 100), name
        assert (config.max_length, config.seed, config.scheduler, config.weight_decay) == (256, 42, "linear", 0), name
        assert (config.eval_split, config.eval_steps, config.save_steps, config.keep_best) == (120, 80, 80, True), name
        assert (config.dtype, config.mixed_precision, config.loss_on) == ("bfloat16", "bfloat16", "all"), name
        higher = config.model == MIXTRAL or "commonsense-qvLoRA" in name
        assert (config.learning_rate, adapter.dropout) == (2e-5 if higher else 1e-5, 0.05), name
        if isinstance(adapter, LoraRecipe):
            assert (adapter.targets, adapter.alpha) == (("q_proj", "v_proj"), 2 * adapter.r), name
            continue
        assert adapter.init == "official", name
        if adapter.variant == "R":
            assert adapter.router_aux_loss_coef == (0.02 if config.model == MIXTRAL else 0.01), name
    assert len(outputs) == len(runs)
    assert {values["data"] for values in runs.values()} == {"data/commonsense_170k.json", "data/math_50k.json"}


def of_lora(*targets: Target) -> AdapterCount:
    config = TrainConfig(model=OLMOE, data=("x",), output="y")
    (counted,) = count([("lora", config, LoraRecipe(targets=targets, r=4))], bases=BASES)
    return counted.adapters[0]


def test_lora_beside_attention_is_counted_too() -> None:
    router = of_lora("router")
    assert router.num_parameters == router.num_activated == 16 * 4 * (64 + 2048)
    experts = of_lora("experts")
    assert experts.num_parameters == 16 * 64 * 4 * (2048 + 2 * 1024 + 2048 + 1024)
    assert experts.num_activated * 8 == experts.num_parameters


def test_the_table_names_runs_of_equal_adapters_once(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["count", str(PAPER / "olmoe.yaml"), "--bases", str(BASES), "--runs", "*-S-r4"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "{commonsense,math}-S-r4" in printed
    assert "262,144" in printed
    assert main([*arguments, "--json"]) == 0
    (base,) = json.loads(capsys.readouterr().out)
    assert base["adapters"][0]["runs"] == ["commonsense-S-r4", "math-S-r4"]
    assert main([*arguments[:2], "--runs", "no-such-run"]) == 2
