"""bench/training.py itself works, on a tiny base: all ways run, and do the same."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import run_script

ROOT = Path(__file__).parents[1]


def test_both_parts_run(tiny_base: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    sizes = ("--batch", "2", "--length", "16", "--steps", "2", "--adapters", "2")
    arguments = ("--model", str(tiny_base), *sizes, "--results", str(results))
    printed = run_script(ROOT / "bench" / "training.py", *arguments, environ={"CUDA_VISIBLE_DEVICES": ""})
    [line] = results.read_text().splitlines()
    parts = json.loads(line)["parts"]
    assert parts["step"]["ours/plain"] > 0
    assert parts["step"]["ours/qv_lora"] > 0
    assert parts["step"]["losses_apart"] < 1e-4
    assert parts["fleet"]["together/alone"] > 0
    assert parts["fleet"]["losses_apart"] < 1e-3
    assert "together/alone " in printed
