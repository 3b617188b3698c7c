"""Recipes of many runs: names, what overrides what, and what is wrong with a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from perft.cli import main
from perft.errors import PerftError
from perft.recipe_table import load_run, load_runs

TABLE = """
all: {model: base, output: out, seed: 1}
runs:
  - - &data {math: {data: m.json}, code: {data: c.json, seed: 2}}
    - {small: {r: 4}, large: {r: 32, seed: 3}}
  - - *data
    - {E: {variant: E}}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "table.yaml"
    file.write_text(TABLE)
    return file


def test_a_run_is_one_entry_of_each_axis(table: Path) -> None:
    runs = load_runs(table)
    assert list(runs) == ["math-small", "math-large", "code-small", "code-large", "math-E", "code-E"]
    assert runs["math-small"] == {"model": "base", "output": "out/math-small", "seed": 1, "data": "m.json", "r": 4}
    assert [run["seed"] for run in runs.values()] == [1, 3, 2, 3, 1, 2]
    assert load_run(table, "code-E") == runs["code-E"]
    assert list(load_runs(table, ["math-[sl]*", "code-E"])) == ["math-small", "math-large", "code-E"]


def test_a_recipe_alone_has_no_runs(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: base\nr: 3\n")
    assert load_run(tmp_path / "one.yaml", None) == {"model": "base", "r": 3}
    with pytest.raises(PerftError, match="is one recipe and has no runs"):
        load_run(tmp_path / "one.yaml", "math-small")
    with pytest.raises(PerftError, match="is one recipe and has no runs to choose from; leave --runs out"):
        load_runs(tmp_path / "one.yaml", ["*"])


def test_a_run_that_is_not_there_is_named(table: Path) -> None:
    with pytest.raises(PerftError, match="holds many runs: give --run, one of math-small, math-large, "):
        load_run(table, None)
    with pytest.raises(PerftError, match="has no run 'maths'; give --run, one of"):
        load_run(table, "maths")
    with pytest.raises(PerftError, match=r"has no run 'x-\*'; there are math-small"):
        load_runs(table, ["math-*", "x-*"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": {}}, "unknown key 'every' beside runs"),
        ({"all": {"rank": 4}}, "table.yaml, all: unknown key 'rank'"),
        ({"all": [1]}, "`all` is a mapping"),
        ({"runs": {}}, "`runs` a list of grids"),
        ({"runs": [{"a": {}}]}, "grid 1: a grid is a list of axes"),
        ({"runs": [[{"a": {"r": 1}}], [{"b": 4}]]}, "grid 2, b: values are a mapping"),
        ({"runs": [[{"a": {"rank": 4}}]]}, "grid 1, a: unknown key 'rank'"),
        ({"runs": [[{"../a": {"r": 4}}]]}, "cannot hold a /"),
        ({"runs": [[{"a": {"r": 4}}], [{"a": {"r": 5}}]]}, "'a' is the name of two runs"),
    ],
)
def test_a_bad_table_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump({"runs": [[{"a": {"r": 1}}]], **change}))
    with pytest.raises(PerftError, match=re.escape(message)):
        load_runs(file)


def test_its_runs_are_trained_by_name(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, table, output = tmp_path / "data.jsonl", tmp_path / "table.yaml", tmp_path / "out"
    data.write_text('{"prompt": "hello", "completion": " world"}\n' * 4)
    common = {"model": str(tiny_base), "data": str(data), "output": str(output), "max_steps": 1, "variant": "S"}
    table.write_text(yaml.safe_dump({"all": common, "runs": [[{"a": {}, "b": {}}, {"r1": {"r": 1}, "r2": {"r": 2}}]]}))
    assert main(["train", "--config", str(table), "--run", "a-r2"]) == 0
    assert [folder.name for folder in output.iterdir()] == ["a-r2"]
    assert main(["train-many", str(table), "--runs", "b-*"]) == 0
    assert {folder.name for folder in output.iterdir()} == {"a-r2", "b-r1", "b-r2"}
    assert all((folder / "adapter_model.safetensors").is_file() for folder in output.iterdir())
    capsys.readouterr()
    assert main(["train", "--run", "a-r2"]) == 2
    assert "give --config" in capsys.readouterr().err
