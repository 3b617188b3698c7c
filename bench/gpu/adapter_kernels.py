"""The adapter ops alone, decoding on a GPU: every token on an adapter of its own, all MoE layers of OLMoE-1B-7B's shape.

    python bench/gpu/adapter_kernels.py [--batches 1,16,64,256] [--rounds 20] [--tiny]

In: nothing. Out: a table, and a line in `bench/results/adapter_kernels.jsonl`. For each mix of adapters and each batch size, in
microseconds a layer (median of the rounds, as a CUDA graph of all layers, the L2 cache flushed before each round):

    floor    bytes that have to be moved, over the bandwidth that a copy reaches here (measured first)
    units    `routed_units`
    router   `adapter_router`
    gather   (a) the units as anybody would write them in PyTorch: rows gathered, padded to the largest rank, two bmm
    padded   (b) the units as vLLM lays them out, with our kernels: every adapter expert padded to the largest rank of all
             adapters, pairs sorted and aligned to blocks for each slot and adapter expert. The layout alone, not vLLM itself

What is timed is checked first, against the references. A mix whose pool does not fit into three quarters of the free memory
gets fewer layers, and the table says how many. `--tiny` runs the same on little tensors, on a CPU too (Triton interprets,
without graphs); its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # asked for when Triton is imported

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import RESULTS, comma_separated, surroundings, write_result

import perft_kernels.gpu
import perft_kernels.gpu.routed_units as unit_kernels
from perft_kernels.adapter_router import (
    KIND_EMBEDDED,
    KIND_ROUTED,
    adapter_router,
    adapter_router_reference,
)
from perft_kernels.routed_units import routed_units, routed_units_reference

FLUSHED_BYTES = 256 << 20  # more than any L2 cache
MAX_RMS_ERROR = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of the model: columns, MoE layers, base experts and their top-k."""

    hidden_size: int
    num_layers: int
    num_base: int
    base_top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Adapters: variant R of M adapter experts and its top-k, or E; ranks dealt out in turn."""

    name: str
    num_experts: int
    top_k: int
    ranks: tuple[int, ...]
    is_embedded: bool = False

    @property
    def gates(self) -> int:
        """Rows of a gate."""
        return 0 if self.is_embedded else self.num_experts


OLMOE = Shape(hidden_size=2048, num_layers=16, num_base=64, base_top_k=8)
TINY = Shape(hidden_size=64, num_layers=2, num_base=4, base_top_k=2)


def mixes(shape: Shape) -> list[Mix]:
    """What is measured."""
    routed = min(8, shape.num_base)
    return [
        Mix(name=f"R {routed} top-2, r 16", num_experts=routed, top_k=2, ranks=(16,)),
        Mix(
            name=f"E {shape.num_base}, r 16",
            num_experts=shape.num_base,
            top_k=shape.base_top_k,
            ranks=(16,),
            is_embedded=True,
        ),
        Mix(name=f"R {routed} top-2, r 4..64", num_experts=routed, top_k=2, ranks=(4, 8, 16, 32, 64)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Inputs of both ops in one layer."""

    y_BD: Tensor
    h_BD: Tensor
    base_ids_BK: Tensor
    base_weights_BK: Tensor
    gate_row_A: Tensor
    down_row_E: Tensor
    up_row_E: Tensor
    ids_BX: Tensor
    weights_BX: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A batch, each token on its own adapter, and the pool that they read."""

    mix: Mix
    adapter_B: Tensor
    rows_SD: Tensor
    rule_A6: Tensor
    rank_E: Tensor
    scale_E: Tensor
    silu_E: Tensor
    largest_rank: int
    layers: list[Layer]

    def router_args(self, layer: Layer) -> tuple[Any, ...]:
        """Of `adapter_router`."""
        return (
            *(layer.h_BD, layer.base_ids_BK, layer.base_weights_BK, self.adapter_B, self.rows_SD, self.rule_A6),
            *(layer.gate_row_A, self.mix.top_k),
        )

    def unit_args(self, layer: Layer) -> tuple[Any, ...]:
        """Of `routed_units`."""
        return (
            *(layer.y_BD, layer.h_BD, layer.ids_BX, layer.weights_BX, self.rows_SD, self.rows_SD),
            *(layer.down_row_E, layer.up_row_E, self.rank_E, self.scale_E, self.silu_E),
        )

    def floor_bytes(self) -> float:
        """What a layer has to read and write: the chosen rank rows, the gates, h, y, the output."""
        row = self.rows_SD.shape[1] * self.rows_SD.element_size()
        pairs = [2 * int(self.rank_E[layer.ids_BX].sum()) * row for layer in self.layers]
        rest = len(self.adapter_B) * (self.mix.gates + 3) * row
        return sum(pairs) / len(pairs) + rest

    def padded(self) -> Setup:
        """The same adapters, every rank padded with rows of zeros to the largest of all."""
        num_experts, largest = self.rank_E.numel(), self.largest_rank
        rows_SD = torch.zeros(
            2 * num_experts * largest * len(self.layers),
            self.rows_SD.shape[1],
            dtype=self.rows_SD.dtype,
            device=self.rows_SD.device,
        )
        start_E = torch.arange(num_experts, device=rows_SD.device) * largest
        layers = []
        for l, layer in enumerate(self.layers):
            first = 2 * l * num_experts * largest
            down_E, up_E = first + start_E, first + num_experts * largest + start_E
            for old_E, new_E in ((layer.down_row_E, down_E), (layer.up_row_E, up_E)):
                for r in range(largest):
                    has_E = self.rank_E > r
                    rows_SD[new_E[has_E] + r] = self.rows_SD[old_E[has_E] + r]
            layers.append(replace(layer, down_row_E=down_E, up_row_E=up_E))
        return replace(self, rows_SD=rows_SD, rank_E=torch.full_like(self.rank_E, largest), layers=layers)


def make(mix: Mix, shape: Shape, batch: int, num_layers: int, dtype: torch.dtype, device: torch.device) -> Setup:
    """Random adapters, a random batch."""
    g = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device, dtype=torch.float32).to(dtype)

    ranks_A = torch.tensor([mix.ranks[a % len(mix.ranks)] for a in range(batch)], device=device)
    rank_E = ranks_A.repeat_interleave(mix.num_experts)
    end_E = rank_E.cumsum(0)
    per_layer = 2 * int(end_E[-1]) + batch * mix.gates
    rows_SD = torch.empty(per_layer * num_layers, shape.hidden_size, dtype=dtype, device=device)
    for start in range(0, rows_SD.shape[0], 1 << 16):  # a bounded float32 copy at a time
        rows = rows_SD[start : start + (1 << 16)]
        rows.copy_(normal(*rows.shape) / shape.hidden_size**0.5)
    adapters_A = torch.arange(batch, device=device)
    kind = KIND_EMBEDDED if mix.is_embedded else KIND_ROUTED
    rules = [[kind, mix.num_experts, mix.top_k, 0, 0, a * mix.num_experts] for a in range(batch)]
    setup = Setup(
        mix=mix,
        adapter_B=adapters_A,
        rows_SD=rows_SD,
        rule_A6=torch.tensor(rules, device=device),
        rank_E=rank_E,
        scale_E=torch.full((rank_E.numel(),), 2.0, device=device),
        silu_E=torch.zeros(rank_E.numel(), dtype=torch.bool, device=device),
        largest_rank=max(mix.ranks[:batch]),
        layers=[],
    )
    for l in range(num_layers):
        first = l * per_layer
        probs_BN = torch.softmax(normal(batch, shape.num_base).float(), -1)
        weights_BK, ids_BK = probs_BN.topk(shape.base_top_k)
        layer = Layer(
            y_BD=normal(batch, shape.hidden_size),
            h_BD=normal(batch, shape.hidden_size),
            base_ids_BK=ids_BK,
            base_weights_BK=weights_BK,
            gate_row_A=first + 2 * end_E[-1] + adapters_A * mix.gates if mix.gates else adapters_A * 0 - 1,
            down_row_E=first + end_E - rank_E,
            up_row_E=first + end_E[-1] + end_E - rank_E,
            ids_BX=ids_BK,
            weights_BX=weights_BK,
        )
        ids_BX, weights_BX = adapter_router_reference(*setup.router_args(layer))
        setup.layers.append(replace(layer, ids_BX=ids_BX, weights_BX=weights_BX))
    return setup


def gathered(setup: Setup, layer: Layer) -> Tensor:
    """(a): `routed_units` in plain PyTorch without a look at the ranks by the host, so that a graph can hold it."""
    r_R = torch.arange(setup.largest_rank, device=layer.h_BD.device)
    ids_BX, last = layer.ids_BX, setup.rows_SD.shape[0] - 1
    is_there_BXR = r_R < setup.rank_E[ids_BX].unsqueeze(2)
    down_BXRD = setup.rows_SD[(layer.down_row_E[ids_BX].unsqueeze(2) + r_R).clamp_(max=last)]
    up_BXRD = setup.rows_SD[(layer.up_row_E[ids_BX].unsqueeze(2) + r_R).clamp_(max=last)]
    batch, hidden_size = layer.h_BD.shape
    z_BXR = torch.bmm(down_BXRD.view(batch, -1, hidden_size), layer.h_BD.unsqueeze(2)).view(is_there_BXR.shape)
    factor_BX = layer.weights_BX * setup.scale_E[ids_BX]
    a_BXR = torch.where(is_there_BXR, z_BXR * factor_BX.unsqueeze(2), 0.0).to(z_BXR.dtype)
    return layer.y_BD + torch.bmm(a_BXR.view(batch, 1, -1), up_BXRD.view(batch, -1, hidden_size)).squeeze(1)


@contextmanager
def sorting() -> Iterator[None]:
    """Pairs are sorted and aligned, however few they are."""
    before, unit_kernels.MAX_DECODE_TOKENS = unit_kernels.MAX_DECODE_TOKENS, 0
    try:
        yield
    finally:
        unit_kernels.MAX_DECODE_TOKENS = before


def check(setup: Setup, padded: Setup) -> dict[str, float]:
    """Errors relative to the references, of one layer.

    Raises:
        SystemExit: something that would be timed is wrong.
    """
    layer, padded_layer = setup.layers[-1], padded.layers[-1]
    y_BD, h_BD, *rest = setup.unit_args(layer)
    want_BD = routed_units_reference(y_BD.float(), h_BD.float(), *rest) - y_BD.float()
    with sorting():
        got_padded_BD = routed_units(*padded.unit_args(padded_layer))
    found = {
        "units": routed_units(*setup.unit_args(layer)),
        "gather": gathered(setup, layer),
        "padded": got_padded_BD,
    }
    size = float(layer.y_BD.float().square().mean().sqrt())
    errors = {
        name: float((out_BD.float() - layer.y_BD.float() - want_BD).square().mean().sqrt()) / size
        for name, out_BD in found.items()
    }
    _, weights_BX = adapter_router(*setup.router_args(layer))
    # by their weights: where two experts are as good as equal, either may be taken
    errors["router"] = float((weights_BX - layer.weights_BX).abs().max())
    limit = MAX_RMS_ERROR[setup.rows_SD.dtype]
    if wrong := {name: error for name, error in errors.items() if not error < limit}:
        raise SystemExit(f"{setup.mix.name}, batch {len(setup.adapter_B)}: wrong by {wrong}, more than {limit}")
    return errors


def seconds(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Of one run, the median; on a GPU as a CUDA graph, with nothing in the L2 cache."""
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return median(times)
    run()  # what is compiled on first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    times = []
    for r in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.fill_(r)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times[3:])


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), 5, device)


def measure(mix: Mix, shape: Shape, batch: int, rounds: int, bandwidth: float, device: torch.device) -> dict[str, Any]:
    """One line of the table."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    num_layers = shape.num_layers
    if device.type == "cuda":
        # the pool and its padded copy
        largest = 2 * max(mix.ranks) + sum(mix.ranks) * 2 // len(mix.ranks)
        layer_bytes = batch * mix.num_experts * largest * shape.hidden_size * dtype.itemsize
        free = torch.cuda.mem_get_info(device)[0] * 3 // 4
        num_layers = max(1, min(num_layers, free // layer_bytes))
    setup = make(mix, shape, batch, num_layers, dtype, device)
    padded = setup.padded()
    errors = check(setup, padded)

    def each(function: Callable[[Layer], object], layers: list[Layer]) -> Callable[[], object]:
        return lambda: [function(layer) for layer in layers]

    def microseconds(run: Callable[[], object]) -> float:
        return seconds(run, rounds, device) * 1e6 / num_layers

    with sorting():
        padded_time = microseconds(each(lambda l: routed_units(*padded.unit_args(l)), padded.layers))
    return {
        "adapters": mix.name,
        "batch": batch,
        "layers": num_layers,
        "errors": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "us_per_layer": {
            "floor": round(setup.floor_bytes() / bandwidth * 1e6, 2),
            "units": round(microseconds(each(lambda l: routed_units(*setup.unit_args(l)), setup.layers)), 2),
            "router": round(microseconds(each(lambda l: adapter_router(*setup.router_args(l)), setup.layers)), 2),
            "gather": round(microseconds(each(lambda l: gathered(setup, l), setup.layers)), 2),
            "padded": round(padded_time, 2),
        },
    }


@torch.inference_mode()
def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,16,64,256", help="batch sizes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="little tensors: only to see that this file works")
    parser.add_argument("--results", type=Path, default=RESULTS / "adapter_kernels.jsonl")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        if not args.tiny:
            parser.error("there is no GPU here; --tiny runs without one")
        perft_kernels.gpu.takes = lambda *_tensors: True
    shape = TINY if args.tiny else OLMOE
    around = surroundings(os.getloadavg()[0])
    bandwidth = copy_bandwidth(device, (1 << 20) if args.tiny else (1 << 30))
    lines = []
    columns = ("floor", "units", "router", "gather", "padded")
    print(f"copy: {bandwidth / 1e9:.0f} GB/s; microseconds a layer")
    print(f"{'adapters':<22}{'batch':>6}{'layers':>8}" + "".join(f"{name:>10}" for name in columns), flush=True)
    for mix in mixes(shape):
        for batch in map(int, comma_separated(args.batches)):
            line = measure(mix, shape, batch, args.rounds, bandwidth, device)
            lines.append(line)
            numbers = "".join(f"{line['us_per_layer'][name]:>10.1f}" for name in columns)
            print(f"{mix.name:<22}{batch:>6}{line['layers']:>8}{numbers}", flush=True)
    write_result(
        args.results,
        {
            "bench": "adapter_kernels",
            **around,
            "settings": {"tiny": args.tiny, "rounds": args.rounds, "seed": 0},
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "lines": lines,
        },
    )


if __name__ == "__main__":
    main()
