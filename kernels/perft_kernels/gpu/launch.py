"""How kernels of a decode step follow one another: programmatic dependent launch (CUDA, compute capability 9.0 and later).

A kernel that is launched so may start while the one before it still runs, and waits where it begins (`take_turn`) until that
one has ended and all that it wrote can be seen. What is saved is the time between two kernels, a microsecond or so; reading
the weights of a layer takes no more than some of these. Every kernel with an argument `PDL` calls `take_turn` first and
always: one that ended without would let the next run before the one before it has ended.

Off unless the environment says `PERFT_PDL=1`: no GPU has measured it yet (bench/gpu/README.md).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from perft_kernels import gpu


@triton.jit
def take_turn(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernel before, and let the one after start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def options() -> dict[str, Any]:
    """Of the launch of a kernel that calls `take_turn`."""
    pdl = is_programmatic()
    return {**gpu.OPTIONS, "PDL": pdl, "launch_pdl": pdl}


def is_programmatic() -> bool:
    """Whether launches overlap."""
    wanted = os.environ.get("PERFT_PDL", "0") == "1"
    return wanted and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
