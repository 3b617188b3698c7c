"""Decode steps as CUDA graphs: captured once for each bucket of batch sizes, without adapters, with them, and with LoRAs among
them, then replayed.

What is captured is not the model as it stands but its operations with neighbours put together (`perft_kernels.fusion`).

In: batches in host memory. Out: their logits, if every sequence of the batch has one token; else `None`, and the model is run
as it is. A graph knows no adapter, no rank and no name: adapters are rows and tables of the arena, which stay where they
are, so that loading, evicting and reloading leave every graph valid. What cannot be captured runs as it is, and the log
says so once.

What captures is given, so that a test on a CPU can put another in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from perft_kernels.fusion import fuse
from perft_serve.adapters.arena import AdapterArena
from perft_serve.engine.batch import Batch
from perft_serve.engine.decode_inputs import DecodeInputs, StepKind, Tables, width_class

logger = logging.getLogger(__name__)

# A batch with any adapter has room for so many adapter experts a token, or for the base's top-k; only adapters that take still
# more, such as PERFT-D with many, have graphs of their own.
MIN_WIDTH = 8


class Capture(Protocol):
    """Captures a step: calls it, and returns what repeats its work on the device, out of the same memory into the same memory.

    Raises:
        RuntimeError: the step does something that cannot be repeated so, such as reading a value back.
    """

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the step's output, which each replay writes anew)."""


class CudaCapture:
    """Capture as a CUDA graph. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """As `Capture`."""
        # once as it is: kernels are compiled, and libraries take the memory that they keep
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # other threads may read adapters into pinned memory meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = step()
        return graph.replay, output


class DecodeGraphs:
    """The graphs of one model.

    Args:
        forward: the model: logits `[N, V]` of a batch's tokens (given as a tensor of rows).
        arena: the adapters' memory; where its tables are made anew, so are the graphs that read them.
        capture: what captures a step.
        fuse: puts a step's operations together before it is captured.
        device: where the model is.
        base_top_k: base experts that a token takes, and so the adapter experts of PERFT-E.
        max_num_seqs: the most sequences in a batch.
        max_pages: the most pages of one sequence.

    Attributes:
        num_captured: how many steps have been captured so far.
    """

    def __init__(
        self,
        forward: Callable[[Batch, Tensor], Tensor],
        arena: AdapterArena,
        capture: Capture,
        device: torch.device,
        *,
        fuse: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = fuse,
        base_top_k: int,
        max_num_seqs: int,
        max_pages: int,
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._fuse = fuse
        self._buckets = buckets(max_num_seqs)
        self._width = width_class(max(MIN_WIDTH, base_top_k))
        self._tables = Tables(arena)
        self._inputs = DecodeInputs(self._buckets[-1], max_pages, device)
        self._graphs: dict[StepKind, tuple[Callable[[], None], Tensor]] = {}
        self._refused = False
        self.num_captured = 0

    def run(self, batch: Batch) -> Tensor | None:
        """Logits `[B, V]` in float32, good until the next call; `None` if the batch has to be run as it is."""
        if not batch.is_decode or self._refused:
            return None
        self._tables.drop_stale(self._graphs)
        num_seqs = len(batch.num_queries)
        bucket = next(size for size in self._buckets if size >= num_seqs)
        has_adapters = bool(batch.width) or batch.has_lora
        kind = StepKind(bucket, max(width_class(batch.width), self._width) if has_adapters else 0, batch.has_lora)
        if kind not in self._graphs and not self._add(kind):
            return None
        self._inputs.fill(batch, bucket)
        replay, logits_NV = self._graphs[kind]
        replay()
        return logits_NV[:num_seqs]

    def capture_all(self) -> None:
        """Capture all that batches without LoRAs need, the largest first: the others find room in what it has taken."""
        for bucket in reversed(self._buckets):
            for width in (self._width, 0):
                kind = StepKind(bucket, width, False)
                if not self._refused and kind not in self._graphs:
                    self._add(kind)

    def _add(self, kind: StepKind) -> bool:
        """Capture a step of padding only, so that it writes to nobody's pages; false if it cannot be."""
        inputs = self._inputs
        inputs.fill(inputs.batch(kind._replace(num_rows=0)), kind.num_rows)
        batch, rows_T = inputs.batch(kind), inputs.rows_T[: kind.num_rows]
        try:
            self._graphs[kind] = self._captured(lambda: self._forward(batch, rows_T))
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning("decode steps run without CUDA graphs, which is slower: cannot capture them: %s", reason)
            self._refused = True
            self._graphs.clear()
            return False
        self.num_captured += 1
        return True

    def _captured(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """The step, captured with neighbouring operations put together; as it is, if that cannot be."""
        fused = self._fuse(step)
        try:
            return self._capture(fused)
        except RuntimeError as error:
            logger.info("decode steps are captured as they are, which is slower: %s", error)
        return self._capture(step)


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes for which steps are captured: from 4 on, each is at most a quarter more than the one before."""
    sizes = [1]
    while sizes[-1] < max_num_seqs:
        step = max(1, (1 << (sizes[-1].bit_length() - 1)) // 4)
        sizes.append(min(sizes[-1] + step, max_num_seqs))
    return tuple(sizes)
