"""The Triton kernels compile for real GPUs, in bfloat16 too, and fit into their shared memory; no GPU is needed for that."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import CALLS, TARGETS

BACKENDS = ("torch",)  # compiling has nothing to do with them


@functools.cache
def compiled(op: str) -> list[str]:
    """A line a kernel."""
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
    return [line for line in run.stdout.splitlines() if "shared memory" in line]


@pytest.mark.parametrize("op", CALLS)
def test_compiles(op: str) -> None:
    assert len(compiled(op)) >= len(CALLS[op])


def test_batch_invariant_products_have_one_instruction_for_every_number_of_tokens() -> None:
    """Another one may add in another order."""
    experts = [line for line in compiled("moe_experts") if "_gate_up" in line or "_down" in line]
    invariant = [line for line in experts if "bfloat16 512" not in line or "invariant" in line]
    assert len(invariant) == 3 * 4 < len(experts)
    for lines in (compiled("linear"), invariant):
        assert {line.rpartition("; ")[2] for line in lines} == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}


@pytest.mark.parametrize(
    ("op", "kernels"),
    [
        ("paged_attention", ["_attend_splits"]),
        ("moe_experts", ["_gate_up", "_down"]),
        ("adapter_router", ["_adapter_router"]),
        ("routed_units", ["_shrink_tokens", "_expand_tokens"]),
    ],
)
def test_what_decodes_loads_ahead(op: str, kernels: list[str]) -> None:
    """Whether a loop does is up to Triton, which stops at a branch or at a chain of loads without a word; no result tells."""
    for kernel in kernels:
        lines = [line for line in compiled(op) if f"bfloat16 128 {kernel}" in line or f"bfloat16 64 {kernel}" in line]
        lines = lines or [line for line in compiled(op) if f"bfloat16 {kernel}" in line]
        assert lines
        for line in lines:
            copies = re.search(r"(\d+) copies ahead", line)
            assert copies is not None
            assert int(copies[1]) > 0, line


def test_kernels_that_may_begin_early_wait_before_all_else() -> None:
    lines = compiled("programmatic dependent launch")
    assert len({line.split()[2] for line in lines}) == 16
    assert all("takes its turn" in line for line in lines), lines
