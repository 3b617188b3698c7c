"""Recipes: YAML and flags become checked configurations, and nothing unknown is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perft.config import PerftConfig
from perft.errors import PerftError
from perft.recipe import build_configs, load_recipe, recipe_fields, recipe_values

NEEDED: dict[str, Any] = {"model": "base", "data": "train.jsonl", "output": "out"}


def test_yaml_values_get_their_types(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: base\ndata: [a.jsonl, b.jsonl]\noutput: out\nlearning_rate: 1e-3\nmax_steps: 20\nvariant: E\nr: 4\n"
        "unit: parallel\ngradient_checkpointing: true\nlayers_to_transform: [0, 2]\n"
    )
    train, adapter = build_configs(load_recipe(tmp_path / "r.yaml"))
    assert (train.data, train.learning_rate, train.max_steps) == (("a.jsonl", "b.jsonl"), 1e-3, 20)
    assert train.gradient_checkpointing is True
    assert isinstance(adapter, PerftConfig)
    assert (adapter.variant, adapter.unit, adapter.r, adapter.layers_to_transform) == ("E", "parallel", 4, [0, 2])
    assert adapter.task_type == "CAUSAL_LM"


def test_a_recipe_survives_being_written_out() -> None:
    train, adapter = build_configs({**NEEDED, "num_experts": "8", "norm_topk": "true", "eval_split": "0.1"})
    assert build_configs(recipe_values(train, adapter)) == (train, adapter)
    assert isinstance(adapter, PerftConfig)
    assert (adapter.num_experts, adapter.norm_topk, train.eval_split) == (8, True, 0.1)


def test_every_field_of_the_adapters_configuration_is_there() -> None:
    names = {field.name for field in recipe_fields()}
    assert {"variant", "r", "unit", "alpha", "num_experts", "top_k", "norm_topk", "combine", "dropout", "init"} <= names
    assert {"router_aux_loss_coef", "layers_to_transform"} <= names
    assert not {"target_modules", "peft_type", "inference_mode"} & names
    assert all(field.help for field in recipe_fields())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"unknown key 'learning_rte'"),
        ("target_modules: [x]", r"unknown key 'target_modules'"),
        ("- a\n- b", r"a recipe is a mapping"),
        ("a: [", r"not valid YAML"),
    ],
)
def test_a_bad_recipe_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PerftError, match=message):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": None}, r"output needs a value"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number, got 1\.5"),
        ({"batch_size": True}, r"batch_size must be a whole number, got True"),
        ({"batch_size": "many"}, r"batch_size must be a whole number, got 'many'"),
        ({"learning_rate": "nan"}, r"learning_rate must be a positive number"),
        ({"learning_rate": -1}, r"learning_rate must be a positive number"),
        ({"warmup": -1}, r"warmup must not be negative"),
        ({"warmup": 2.5}, r"warmup.*must be whole, got 2\.5"),
        ({"epochs": 1, "max_steps": 10}, r"epochs and max_steps both"),
        ({"eval_data": "a.jsonl", "eval_split": 0.1}, r"eval_data and eval_split both"),
        ({"eval_split": 1.5}, r"eval_split must be a share below 1 or a whole number"),
        ({"eval_steps": 10}, r"eval_steps needs something to evaluate on"),
        ({"streaming": True}, r"streaming does not know how much data there is: give max_steps"),
        ({"streaming": True, "max_steps": 3, "eval_split": 0.1}, r"eval_split cannot divide"),
        ({"early_stopping": 2}, r"early_stopping needs something to evaluate on"),
        ({"keep_best": True, "eval_split": 0.1, "eval_steps": 5}, r"keep_best needs a checkpoint of each evaluation"),
        ({"columns": "prompt"}, r"columns are given as theirs=ours, got 'prompt'"),
        ({"report_to": "mail"}, r"report_to must be one of tensorboard, wandb, got 'mail'"),
        ({"mixed_precision": "int8"}, r"mixed_precision must be one of bfloat16, float16"),
        ({"loss_on": "prompt"}, r"loss_on must be one of all, answer, got 'prompt'"),
        ({"gradient_checkpointing": "yes"}, r"gradient_checkpointing must be true or false"),
        ({"model": 3}, r"model must be text, got 3"),
        ({"data": []}, r"data names no file"),
        ({"top_k": 5}, r"top_k=5 is more than num_experts=4"),
        ({"variant": "S", "combine": "base-rank"}, r"combine has no meaning for variant='S'"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PerftError, match=message):
        build_configs({**NEEDED, **values})


def test_a_missing_field_says_how_to_give_it() -> None:
    with pytest.raises(PerftError, match="data is missing: give --data, or data: in the recipe"):
        build_configs({"model": "base", "output": "out"})
