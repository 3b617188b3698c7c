"""`bench/gpu/adapter_kernels.py`, which waits for a GPU, runs: on little tensors, interpreted where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BACKENDS = ("triton",)
SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "adapter_kernels.py"


def test_the_bench_of_the_adapter_kernels(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(SCRIPT), "--tiny", "--batches", "2", "--rounds", "1", "--results", str(results)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (line,) = results.read_text(encoding="utf-8").splitlines()
    measured = json.loads(line)["lines"]
    assert [entry["adapters"] for entry in measured] == ["R 4 top-2, r 16", "E 4, r 16", "R 4 top-2, r 4..64"]
    for entry in measured:
        assert set(entry["us_per_layer"]) == {"floor", "units", "router", "gather", "padded"}
        assert max(entry["errors"].values()) < 2e-2
