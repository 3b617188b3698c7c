"""bench/gpu/step.py itself works: all of its parts but the oracle (a test of its own) at a tiny size, on whatever there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from scripts import run_script

ROOT = Path(__file__).parents[1]
PARTS = (
    *(
        "tokens",
        "bits",
        "base",
        "profile",
        "capture",
        "adapters",
        "registered",
        "prefill",
        "invariant",
        "experts",
        "linears",
    ),
)


def test_every_part_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    arguments = (*PARTS, "--tiny", "--results", str(results))
    printed = run_script(ROOT / "bench" / "gpu" / "step.py", *arguments, environ={"TRITON_INTERPRET": "0"})
    [line] = results.read_text().splitlines()
    found = json.loads(line)["parts"]
    assert tuple(found) == PARTS
    assert found["tokens"]["prompts"] == 3
    if "skipped" not in found["invariant"]:
        assert found["bits"]["other_bits_invariant"] == 0
        assert found["invariant"]["prefill_cost"] > 0
    assert {"1: all kernels", "4: all kernels", "R: all kernels"} <= found["profile"].keys()
    for part, names in {
        "base": ("ours_ms_1_eager", "floor_ms_4", "transformers_eager_ms_4"),
        "adapters": ("R_kept", "E_kept"),
        "registered": ("flat", "ms_6"),
        "prefill": ("mixed_tokens_per_s",),
        "experts": ("speedup_16",),
        "linears": ("qkv_speedup_16", "head_us_1"),
    }.items():
        for name in names:
            assert found[part][name] > 0, name
            assert f"{name} " in printed


def test_unknown_arguments_are_refused() -> None:
    """Both in one process: it is importing torch that takes the time."""
    code = """
import step
for arguments in (["nothing", "--tiny"], ["--what"]):
    try:
        step.main(arguments)
    except SystemExit as error:
        print(error.code)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench" / "gpu")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == ["2", "2"], run.stderr
    assert "no such part" in run.stderr
    assert "unrecognized" in run.stderr
