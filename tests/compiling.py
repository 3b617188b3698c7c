"""Compiling Triton kernels for GPUs on a machine that has none: run by tests in a process of its own, where Triton does not
interpret. In: `CALLS`, by name. Out: a line a kernel, what it needs and what it multiplies matrices with; a kernel that does
not compile, or wants more shared memory than the GPU has, ends it with an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Compute capability and the most shared memory of a program, in bytes.
TARGETS = {80: 163 * 1024, 90: 227 * 1024}


class NoGpu:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_all(calls: dict[str, Callable[[], Any]], capability: int) -> list[str]:
    """Call what launches kernels, which are compiled rather than launched; one line a kernel."""
    found: list[str] = []
    label = ""
    driver.set_active(NoGpu(capability))

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
            assert shared <= TARGETS[capability], f"{compiled.name} wants {shared} bytes of shared memory"
            products = sorted(set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", ptx)))
            # how many copies into shared memory are still under way when a loop goes on: 0 is one that waits for its own
            under_way = max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)), default=0)
            # nothing is read before the kernel before has ended, and nothing can be left out
            first = re.search(r"griddepcontrol\.wait|ld\.global|cp\.async|\bbra\b|\bret\b", ptx)
            turn = "takes its turn, " if first is not None and first[0] == "griddepcontrol.wait" else ""
            needs = f"{turn}{shared} bytes of shared memory, {under_way} copies ahead"
            found.append(
                f"sm_{capability} {label} {compiled.name}: {needs}; {', '.join(products) or 'no tensor cores'}"
            )

        return launch

    JITFunction.__getitem__ = getitem
    for label, call in calls.items():  # noqa: B007 - `launch` reads it
        call()
    return found


def attention(dtype: torch.dtype, width: int) -> None:
    from perft_kernels.gpu.paged_attention import kv_write, paged_attention

    q, pages = torch.zeros(70, 4, width, dtype=dtype), torch.zeros(9, 16, 2, width, dtype=dtype)
    ints = torch.zeros(70, dtype=torch.int64)
    kv_write(q[:, :2], q[:, :2], pages, pages, ints)
    for sinks in (None, torch.zeros(4)):
        paged_attention(
            *(q, pages, pages, torch.zeros(2, 8, dtype=torch.int64), ints, ints, torch.zeros(2, 3, dtype=torch.int64)),
            *(64, True, 0.1, None, sinks, torch.empty_like(q)),
        )


def experts(dtype: torch.dtype, num_tokens: int, batch_invariant: bool = False) -> None:
    from perft_kernels.gpu.moe_experts import stored_experts

    h, weights = torch.zeros(num_tokens, 128, dtype=dtype), torch.zeros(num_tokens, 4, dtype=dtype)
    gate_up, down = torch.zeros(8, 128, 128, dtype=dtype), torch.zeros(8, 128, 64, dtype=dtype)
    ids = torch.zeros(num_tokens, 4, dtype=torch.int64)
    stored_experts(h, ids, weights, gate_up, down, None, None, False, False, 1.0, 0.0, batch_invariant)
    bias = torch.zeros(8, 128, dtype=dtype)
    stored_experts(h, ids, weights, gate_up, down.mT.contiguous(), bias, bias, True, True, 1.7, 7.0, batch_invariant)


def linear(dtype: torch.dtype, num_tokens: int) -> None:
    from perft_kernels.gpu.linear import stored_linear

    x, weight = torch.zeros(num_tokens, 2048, dtype=dtype), torch.zeros(2048, 2048, dtype=dtype)
    stored_linear(x, weight, None)
    stored_linear(x, weight, weight[0])


def small(dtype: torch.dtype, num_tokens: int) -> None:
    from perft_kernels.gpu.base_router import router_top_k
    from perft_kernels.gpu.rms_norm import rms_norm
    from perft_kernels.gpu.rotary import rotary_kv_write
    from perft_kernels.gpu.silu_mul import silu_mul

    h_TD = torch.zeros(num_tokens, 2048, dtype=dtype)
    for residual in (None, h_TD):
        rms_norm(h_TD, residual, h_TD[0], 1e-6)
    router_top_k(h_TD[:, :64], 8, False, dtype)
    silu_mul(h_TD[:, :1024], h_TD[:, 1024:])
    heads, pages = h_TD.unflatten(1, (16, 128)), torch.zeros(4, 16, 16, 128, dtype=dtype)
    for weight, turn in ((None, 128), (h_TD[0], 128), (h_TD[0, :128], 64)):
        rotary_kv_write(
            *(heads, heads, heads, h_TD[:, :turn], h_TD[:, :turn], weight, weight, 1e-6, 1e-6, pages, pages),
            torch.zeros(num_tokens, dtype=torch.int64),
        )


def router(dtype: torch.dtype) -> None:
    from perft_kernels.gpu.adapter_router import adapter_router

    h_TD, ints_T = torch.zeros(4, 2048, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    adapter_router(
        *(h_TD, torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 8, dtype=dtype), ints_T, h_TD),
        *(torch.zeros(4, 6, dtype=torch.int64), ints_T, 8),
    )


def units(
    dtype: torch.dtype, pool_dtype: torch.dtype, num_tokens: int, *, out: int = 2048, masked: bool = False
) -> None:
    """Forward; where tokens are so many that pairs are sorted, backward too."""
    from perft_kernels.gpu.routed_units import MAX_DECODE_TOKENS, routed_units, routed_units_backward

    h_TD = torch.zeros(num_tokens, 2048, dtype=dtype)
    y_TO = torch.zeros(num_tokens, out, dtype=dtype)
    pool_SV = torch.zeros(128, min(out, 2048), dtype=pool_dtype)
    rows_E = torch.arange(8) * 16
    arguments = (
        *(h_TD, torch.zeros(num_tokens, 2, dtype=torch.int64), torch.zeros(num_tokens, 2), pool_SV, pool_SV),
        *(rows_E, rows_E, torch.full((8,), 16), torch.ones(8), torch.ones(8, dtype=torch.bool)),
        torch.ones(num_tokens, 2, 16) if masked else None,
    )
    routed_units(y_TO, *arguments)
    if num_tokens > MAX_DECODE_TOKENS:
        routed_units_backward(y_TO, *arguments)


def programmatic() -> None:
    """What a decode step launches, each kernel beginning while the one before it ends."""
    from perft_kernels.gpu import launch

    launch.is_programmatic = lambda: True
    small(torch.bfloat16, 8)
    linear(torch.bfloat16, 1)
    experts(torch.bfloat16, 64)
    attention(torch.bfloat16, 64)
    router(torch.bfloat16)
    units(torch.bfloat16, torch.bfloat16, 64)


CALLS: dict[str, dict[str, Callable[[], Any]]] = {
    "paged_attention": {
        "bfloat16 128": lambda: attention(torch.bfloat16, 128),
        "bfloat16 256": lambda: attention(torch.bfloat16, 256),
        "float32 256": lambda: attention(torch.float32, 256),
    },
    "moe_experts": {
        "bfloat16 1": lambda: experts(torch.bfloat16, 1),
        "bfloat16 64": lambda: experts(torch.bfloat16, 64),
        "bfloat16 512": lambda: experts(torch.bfloat16, 512),
        "bfloat16 512 invariant": lambda: experts(torch.bfloat16, 512, batch_invariant=True),
    },
    "linear": {
        "bfloat16 1": lambda: linear(torch.bfloat16, 1),
        "bfloat16 64": lambda: linear(torch.bfloat16, 64),
        "bfloat16 512": lambda: linear(torch.bfloat16, 512),
    },
    "rms_norm, base_router, rotary, silu_mul": {"bfloat16": lambda: small(torch.bfloat16, 8)},
    "adapter_router": {"bfloat16": lambda: router(torch.bfloat16)},
    "routed_units": {
        "bfloat16 64": lambda: units(torch.bfloat16, torch.bfloat16, 64),
        "bfloat16 300": lambda: units(torch.bfloat16, torch.bfloat16, 300),
        "bfloat16 64 to 512": lambda: units(torch.bfloat16, torch.bfloat16, 64, out=512),
        "training": lambda: units(torch.bfloat16, torch.float32, 300, masked=True),
    },
    "programmatic dependent launch": {"bfloat16": programmatic},
}

if __name__ == "__main__":
    print(*compile_all(CALLS[sys.argv[1]], int(sys.argv[2])), sep="\n")
