"""The Triton kernels compile for real GPUs, in bfloat16 too, and fit into their shared memory; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import CALLS, TARGETS

BACKENDS = ("torch",)  # compiling has nothing to do with them


@pytest.mark.parametrize("op", CALLS)
def test_compiles(op: str) -> None:
    pytest.importorskip("triton")
    capability = max(TARGETS)
    file = Path(__file__).parents[1] / "compiling.py"
    run = subprocess.run(
        [sys.executable, str(file), op, str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("shared memory") >= len(CALLS[op])
