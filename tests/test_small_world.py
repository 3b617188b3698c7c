"""The small world's runner: the grid, what is skipped, matched parameters, and a smaller world yet from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import load_script

from perft.tasks import TASKS, record, write_jsonl

FOLDER = Path(__file__).parents[1] / "recipes" / "small_world"


report = load_script(FOLDER / "small_world_report.py", "small_world_report")
run = load_script(FOLDER / "run.py", "small_world_run")
WORLD: dict[str, Any] = run.read_world(FOLDER / "world.yaml")
# SmolLM2-135M: 576 wide, q 576 -> 576, v 576 -> 192
SHAPES = {
    base: run.Shape(hidden=576, top_k=settings["top_k"], attention=576 * 3 + 192, layers=30, activated=1)
    for base, settings in WORLD["bases"].items()
}


def test_first_seeds_of_all_methods_come_first() -> None:
    found = list(run.cells(WORLD))
    methods = list(WORLD["methods"])
    assert sorted(methods) == ["D", "E", "R", "S", "qvLoRA"]
    assert [cell.name for cell in found[:3]] == ["coarse-base", f"coarse-{methods[0]}-1", f"coarse-{methods[1]}-1"]
    assert [(cell.seed, cell.method) for cell in found[1:16]] == [(seed, m) for seed in (1, 2, 3) for m in methods]
    assert [cell.base for cell in found] == ["coarse"] * 16 + ["fine"] * 16


@pytest.mark.parametrize("base", WORLD["bases"])
def test_all_methods_activate_the_same_number_of_parameters(base: str) -> None:
    ranks = {}
    for method, settings in WORLD["methods"].items():
        rank, activated, _ = run.rank_of(method, settings, SHAPES[base], WORLD["activated_per_layer"])
        assert activated == WORLD["activated_per_layer"], method
        ranks[method] = rank
    assert ranks == {"S": 40, "D": 20, "R": 19, "E": 20 if base == "coarse" else 5, "qvLoRA": 24}


def test_a_rank_is_the_closest_there_is() -> None:
    shape = SHAPES["coarse"]
    assert run.rank_of("S", {"variant": "S"}, shape, 1152 * 7 + 500) == (7, 1152 * 7, 1152 * 7)
    assert run.rank_of("R", {"variant": "R", "num_experts": 8, "top_k": 2}, shape, 10)[0] == 1
    settings = {"variant": "R", "num_experts": 8, "top_k": 2}
    assert run.rank_of("R", settings, shape, 8 * 576 + 2 * 1152 * 3) == (
        3,
        8 * 576 + 2 * 1152 * 3,
        8 * (576 + 1152 * 3),
    )


def test_a_digest_holds_what_a_result_depends_on() -> None:
    data = {"train": "a", "piqa validation": "b"}
    base, first = run.Cell(base="coarse", method=None, seed=None), run.Cell(base="coarse", method="S", seed=1)
    of_base, of_first = run.digest_of(WORLD, base, data), run.digest_of(WORLD, first, data)
    everything = {run.digest_of(WORLD, cell, data) for cell in run.cells(WORLD)}
    assert len(everything) == 32
    slower: dict[str, Any] = {
        **WORLD,
        "methods": {**WORLD["methods"], "S": {**WORLD["methods"]["S"], "learning_rate": 1e-9}},
    }
    longer = {**WORLD, "train": {**WORLD["train"], "epochs": 2}}
    other = run.Cell(base="coarse", method="D", seed=1)
    assert run.digest_of(slower, first, data) != of_first
    assert run.digest_of(slower, other, data) == run.digest_of(WORLD, other, data)
    assert run.digest_of(longer, first, data) != of_first
    assert run.digest_of(WORLD, first, {**data, "train": "c"}) != of_first
    assert run.digest_of(longer, base, {**data, "train": "c"}) == of_base  # the base is not trained
    assert run.digest_of(WORLD, base, {**data, "piqa validation": "c"}) != of_base


def test_learning_rates_are_taken_when_the_search_is_done() -> None:
    low, middle, *higher = WORLD["search"]["methods"]["S"]
    some = run.with_rates(WORLD, {"S": {low: 3.0, middle: 2.0}})
    assert {name: each["learning_rate"] for name, each in some["methods"].items()} == dict.fromkeys(WORLD["methods"])
    whole = run.with_rates(WORLD, {"S": {low: 3.0, middle: 2.0, **dict.fromkeys(higher, 2.5)}})["methods"]
    assert [whole[name]["learning_rate"] for name in ("S", "D", "R", "E", "qvLoRA")] == [middle] * 4 + [None]
    assert whole["R"] == {"variant": "R", "num_experts": 4, "top_k": 2, "learning_rate": middle}
    fixed = run.with_rates({**WORLD, "methods": {"S": {"variant": "S", "learning_rate": 7e-4}}}, {})
    assert fixed["methods"] == {"S": {"variant": "S", "learning_rate": 7e-4}}


def test_a_line_that_a_kill_has_cut_is_lost_alone(tmp_path: Path) -> None:
    file = tmp_path / "results" / "lines.jsonl"
    assert run.read_lines(file) == []
    run.append_line(file, {"n": 1})
    with file.open("a") as stream:
        stream.write('{"n": 2, "cut')
    run.append_line(file, {"n": 3})
    assert run.read_lines(file) == [{"n": 1}, {"n": 3}]


def line(method: str, seed: int | None, right: str, bits: float = 1.0) -> dict[str, Any]:
    accuracy = right.count("1") / len(right)
    score = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    sizes = {"r": 40, "trainable": 100, "activated": 100, "base_activated": 10000, "efficiency": 0.01}
    return {
        "kind": "run",
        "base": "coarse",
        "method": method,
        "seed": seed,
        **({} if seed is None else sizes | {"train": {"held_out_loss": 2.0}}),
        "tasks": {"piqa": score},
        "average": score,
        "average_norm": score,
        "right": {"piqa": right},
        "answer_bits": {"piqa": {"value": bits, "low": bits, "high": bits}},
        "answer_nats": {"piqa": [-bits * math.log(2) * 10] * len(right)},
        "answer_characters": {"piqa": [10] * len(right)},
    }


def test_seeds_are_compared_with_the_base_question_by_question(tmp_path: Path) -> None:
    answers = "01" * 50
    lines = [
        line("base", None, answers),
        line("S", 1, answers[:98] + "11"),
        line("S", 2, "11" + answers[2:]),
        line("D", 1, answers, bits=0.9),
    ]
    base, single, dense = report.summarise(lines)
    assert base.difference is None
    assert single.difference[0] == pytest.approx(0.01)  # each seed has one of a hundred more
    assert single.difference[1] == pytest.approx(0.0)
    assert 0.01 < single.difference[2] < 0.03
    assert dense.difference == (0.0, 0.0, 0.0)
    assert single.bits_difference["piqa"] == pytest.approx((0.0, 0.0, 0.0))
    assert dense.bits_difference["piqa"] == pytest.approx((-0.1, -0.1, -0.1))
    assert single.averages == [0.51, 0.51]
    text = report.table(lines)
    (row,) = [row for row in text.split("\n") if row.startswith("| S | 40")]
    assert "| 40 | 100 | 1.000 | 2 | 51.0 | 51.0 | 51.0 .. 51.0 | +1.0 (+0.0 .. " in row
    assert "| S | +0.100 (+0.100 .. +0.100) |" in text
    assert "| S | +1.0 (+0.0 .. " in text
    worse = line("S", 3, answers, bits=1.3)
    value, low, high = report.between([lines[1], worse], [lines[3]], report.bits)
    assert (value, low, high) == pytest.approx((0.25, 0.1, 0.4)), "as far as the seeds are apart"
    report.draw(lines, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_world_from_end_to_end(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 12), ("validation", 6)):
        rows = [record(TASKS["piqa"], f"Make tea {n}.", ["Boil water.", f"Boil {n}."], n % 2) for n in range(count)]
        write_jsonl(tmp_path / "data/piqa" / f"{split}.jsonl", rows)
    world = {
        **WORLD,
        "tasks": ["piqa"],
        "data": str(tmp_path / "data"),
        "bases": {"tiny": {"path": str(tiny_base)}},
        "seeds": [1],
        "train_examples": 8,
        "held_out_examples": 4,
        "eval_questions": {"piqa": 5},
        "activated_per_layer": 256,
        "methods": {"S": WORLD["methods"]["S"], "qvLoRA": {"learning_rate": 2e-3}, "E": WORLD["methods"]["E"]},
        "search": {"base": "tiny", "seed": 0, "train_examples": 4, "methods": {"S": [1e-3]}},
    }
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(world))
    results = tmp_path / "lines.jsonl"
    command = ["--world", str(tmp_path / "world.yaml"), "--work", str(tmp_path / "work"), "--results", str(results)]
    assert run.main([*command, "--list"]) == 0
    assert "to do tiny-S-1 r 4, activated 512, all 512" in capsys.readouterr().out
    assert run.main([*command, "--methods", "S", "qvLoRA"]) == 0
    lines = run.read_lines(results)
    assert [(each["kind"], each["method"], each.get("seed")) for each in lines] == [
        ("search", "S", 0),
        ("run", "base", None),
        ("run", "S", 1),
        ("run", "qvLoRA", 1),
    ]
    _, base, trained, lora = lines
    assert [each["train"]["learning_rate"] for each in (trained, lora)] == [1e-3, 2e-3]
    assert (lora["r"], lora["activated"]) == (2, 2 * 2 * (32 + 32 + 32 + 16))  # the closest to 256 a layer
    assert lora["answer_bits"]["piqa"]["value"] != base["answer_bits"]["piqa"]["value"]  # what was merged is asked
    assert not (tmp_path / "work/runs/tiny-qvLoRA-1/merged").exists()
    assert trained["train"]["tokens"] > 8 * 5
    assert trained["train"]["held_out_loss"] > 0
    assert (trained["activated"], trained["trainable"]) == (512, 512)
    assert len(trained["right"]["piqa"]) == trained["tasks"]["piqa"]["num_examples"] == 5
    assert trained["right"]["piqa"].count("1") / 5 == trained["tasks"]["piqa"]["accuracy"]
    assert trained["answer_bits"]["piqa"]["value"] != base["answer_bits"]["piqa"]["value"]
    before = results.read_bytes()
    assert run.main([*command, "--methods", "S", "qvLoRA"]) == 0  # nothing is left to do
    assert run.main([*command, "--search"]) == 0
    assert results.read_bytes() == before
    capsys.readouterr()
    assert run.main([*command, "--list"]) == 0
    said = capsys.readouterr().out
    assert "done  tiny-S-1" in said
    assert "to do tiny-E-1" in said
    assert "| qvLoRA | 2 | 448 |" in (tmp_path / "lines.md").read_text()
    assert (tmp_path / "lines.png").is_file()
    assert json.loads((tmp_path / "work/runs/tiny-S-1/eval/results.json").read_text())["settings"]["mode"] == "cloze"
    assert run.main([*command, "--methods", "X"]) == 1
    assert "no method X" in capsys.readouterr().err
