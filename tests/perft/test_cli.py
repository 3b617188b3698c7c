"""The command `perft`: what it prints, and that every error is one line and status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perft.cli import main

ORACLE = Path(__file__).parents[1] / "oracle"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "hello", "completion": " world"}\n' * 8)
    return file


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to the user's eyes: one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perft: error:")]
    assert len(lines) == 1
    return lines[0]


def test_import_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = str(ORACLE / "olmoe/base"), str(tmp_path / "adapter")
    assert main(["import", str(ORACLE / "olmoe/R4-2-lora"), out, "--base", base]) == 0
    assert "imported PERFT-R (lora, r=4, combine base-rank): 4,608 parameters in 2 layers" in capsys.readouterr().out
    assert main(["inspect", out, "--base", base, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["variant"], report["num_parameters"], report["combine"]) == ("R", 4608, "base-rank")
    assert report["efficiency"] == pytest.approx(0.02057, rel=1e-3)
    assert main(["inspect", out]) == 0
    assert "PERFT-R (Routed)" in capsys.readouterr().out


def test_the_combine_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import", str(ORACLE / "olmoe/R4-2-lora"), str(tmp_path / "a"), "--base", str(ORACLE / "olmoe/base")]
    assert main([*arguments, "--combine", "own"]) == 0
    assert "combine own" in capsys.readouterr().out


def test_train_by_flags(tiny_base: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("train", "--model", str(tiny_base), "--data", str(data_file), "--output", str(tmp_path / "out")),
        *(
            "--variant",
            "R",
            "--num-experts",
            "3",
            "--top-k",
            "1",
            "--norm-topk",
            "true",
            "--r",
            "2",
            "--max-steps",
            "2",
        ),
        *("--learning-rate", "1e-2", "--layers-to-transform", "1", "--gradient-checkpointing"),
    ]
    assert main(arguments) == 0
    assert "trained PERFT-R" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["num_experts"], config["top_k"], config["norm_topk"], config["r"]) == (3, 1, True, 2)
    assert config["layers_to_transform"] == [1]
    assert main(arguments) == 2
    assert "--overwrite" in error_of(capsys)
    assert main([*arguments, "--overwrite"]) == 0


def test_train_by_recipe_with_a_flag_that_overrides(tiny_base: Path, data_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_base}\ndata: {data_file}\noutput: {tmp_path / 'out'}\nvariant: S\nr: 2\nmax_steps: 3\n"
    )
    assert main(["train", "--config", str(recipe), "--r", "3", "--max-steps", "1"]) == 0
    run = json.loads((tmp_path / "out" / "perft_training.json").read_text())
    assert (run["recipe"]["variant"], run["recipe"]["r"], run["outcome"]["steps"]) == ("S", 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "no adapter at 'nowhere': the folder does not exist"),
        (["inspect", str(ORACLE / "olmoe/S-lora")], "perft import"),
        (["import", "nowhere", "out", "--base", "b"], "no checkpoint at 'nowhere'"),
        (["train"], "model is missing: give --model"),
        (["train", "--config", "nowhere.yaml"], "recipe not found: nowhere.yaml"),
        (
            ["train", "--model", "m", "--data", "d", "--output", "o", "--r", "two"],
            "r must be a whole number, got 'two'",
        ),
        (["train", "--model", "m", "--data", "no.jsonl", "--output", "o"], "data file not found: no.jsonl"),
        (["demo-base", "x", "--experts", "2", "--top-k", "3"], "need 1 <= top_k <= experts"),
    ],
)
def test_an_error_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["inspect"],
        ["inspect", "a", "--bas", "b"],
        ["train", "--lr", "1"],
        ["train", "--target-modules", "x"],
        ["train", "--resume", "--overwrite"],
        ["import", "a", "b"],
        ["import", "a", "b", "--base", "c", "--combine", "mean"],
        ["demo-base", "x", "--experts", "four"],
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: perft" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("perft 0.")
    assert "--router-aux-loss-coef" in out
