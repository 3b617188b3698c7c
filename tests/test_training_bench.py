"""bench/training.py itself works, on a tiny base: all ways run, and the bench finds out if they do not do the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_both_parts_run(tiny_base: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    sizes = ("--batch", "2", "--length", "16", "--steps", "2", "--adapters", "2")
    run = subprocess.run(
        [
            *(sys.executable, str(ROOT / "bench" / "training.py"), "--model", str(tiny_base), *sizes),
            *("--results", str(results)),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    [line] = results.read_text().splitlines()
    parts = json.loads(line)["parts"]
    assert parts["step"]["ours/plain"] > 0
    assert parts["step"]["ours/qv_lora"] > 0
    assert parts["step"]["losses_apart"] < 1e-4
    assert parts["fleet"]["together/alone"] > 0
    assert parts["fleet"]["losses_apart"] < 1e-3
    assert "together/alone " in run.stdout
