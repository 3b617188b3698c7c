"""Device memory of adapters: one pool of rows of width D, and tables that say whose rows lie where.

No slots of a maximum rank, no padding: an adapter takes exactly the rows it has (for each layer M*R down rows, M*R up
rows, M gate rows for variant R). They lie in one run if there is one, else wherever an adapter expert's R rows or a layer's
M gate rows find room, so free memory in pieces is still free memory. Ranks, M, variants and unit kinds mix freely. Loading
and evicting write rows and edit tables, never shapes that a running batch depends on.

A LoRA on attention projections lies in the same pool. Its rows have the projections' widths, which need not be D: those of a
layer follow one another in pool rows of their own, of which the last may be filled in part, and are found by *cells*, the same
memory as rows of a width that divides all of these.

In: checked adapters (`perft.adapter`), staged by any thread. Out: a slot number per adapter, and the tables that
`perft_kernels` reads. Rows are copied and wiped in steps as large as the caller allows; the tables name an adapter only when
all of it is there. It knows no names, no requests, and no policy: who is evicted is the store's matter.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from perft.adapter import Adapter, is_finite
from perft.attention import ATTENTION, AttentionBlock
from perft.config import PerftConfig
from perft.errors import AdapterError
from perft.lora import LoraAdapter, LoraPair
from perft.moe import MoeBlock
from perft_kernels import huge_pages
from perft_kernels.adapter_router import KIND_ALL, KIND_EMBEDDED, KIND_ROUTED

_KINDS = {"S": KIND_ALL, "D": KIND_ALL, "R": KIND_ROUTED, "E": KIND_EMBEDDED}
# The tables have room for as many adapter experts as rows of rank 1 could make, but at the start for at most so many.
_MAX_FIRST_EXPERTS = 1 << 16
# The tables of LoRAs have room for so many slots at first.
_MIN_LORA_SLOTS = 1024

Pieces: TypeAlias = "list[tuple[int, int]]"
"""What must lie together: rows, and how many runs of so many there are; in the order of the staged rows."""


class RangeAllocator:
    """Runs in `[0, size)`, the smallest that is long enough first; neighbouring free runs are joined. Time is O(log n)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_free = size
        self._starts = [0] if size else []  # of the free runs, ascending
        self._length = {0: size} if size else {}  # by start
        self._by_length = [(size, 0)] if size else []  # (length, start), ascending

    def take(self, length: int) -> int | None:
        """Start of a run of `length`, or `None` if there is none so long."""
        assert length > 0
        i = bisect_left(self._by_length, (length, 0))
        if i == len(self._by_length):
            return None
        start = self._by_length[i][1]
        self._cut(start, length)
        return start

    def take_pieces(self, pieces: Sequence[tuple[int, int]]) -> list[list[int]] | None:
        """Runs for `count` pieces of `length` each, for every (length, count).

        Returns:
            The starts, for each entry of `pieces`; or `None`, and nothing taken, if they do not all fit.
        """
        if sum(length * count for length, count in pieces) > self.num_free:
            return None
        starts: list[list[int]] = [[] for _ in pieces]
        taken: list[tuple[int, int]] = []
        for i in sorted(range(len(pieces)), key=lambda i: -pieces[i][0]):  # long ones first: short ones fit anywhere
            length, count = pieces[i]
            while count:
                longest, start = self._by_length[-1] if self._by_length else (0, 0)
                fit = min(longest // length, count)
                if not fit:
                    for run in taken:
                        self.give(*run)
                    return None
                self._cut(start, fit * length)
                taken.append((start, fit * length))
                starts[i] += range(start, start + fit * length, length)
                count -= fit
        return starts

    def give(self, start: int, length: int) -> None:
        """Take a run back."""
        self.num_free += length
        i = bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == start + length:
            length += self._remove(self._starts[i])
        if i and self._starts[i - 1] + self._length[self._starts[i - 1]] == start:
            start = self._starts[i - 1]
            length += self._remove(start)
        self._insert(start, length)

    def grow(self, size: int) -> None:
        """Make the range longer."""
        old, self.size = self.size, size
        self.give(old, size - old)

    def _cut(self, start: int, length: int) -> None:
        """Take the first `length` of the free run at `start`."""
        run = self._remove(start)
        if run > length:
            self._insert(start + length, run - length)
        self.num_free -= length

    def _insert(self, start: int, length: int) -> None:
        insort(self._starts, start)
        self._length[start] = length
        insort(self._by_length, (length, start))

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        return length


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedAdapter:
    """An adapter in host memory as the arena will hold it.

    Args:
        rows_SD: its rows in the arena's dtype, one contiguous tensor (pinned if the arena is on a GPU).
        ordinals: which blocks of the base it adapts, ascending.
        digest: as read.
        width: the most adapter experts that one token takes.
        num_parameters: how many numbers it holds.
        pieces: how its rows may be taken apart.
    """

    rows_SD: Tensor
    ordinals: tuple[int, ...]
    digest: str
    width: int
    num_parameters: int
    pieces: Pieces

    @property
    def num_rows(self) -> int:
        """What it takes in the arena, in rows."""
        return int(self.rows_SD.shape[0])

    @property
    def num_bytes(self) -> int:
        """What it takes in the arena, and in host memory as it is."""
        return int(self.rows_SD.nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPerft(StagedAdapter):
    """A PERFT adapter: by layer the down rows, then the up rows; behind all these, by layer, the gate rows.

    Args:
        config, num_experts: as read.
    """

    config: PerftConfig
    num_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedLora(StagedAdapter):
    """A LoRA on attention projections: by layer a piece; in it, by projection, the down rows, then the up rows.

    Args:
        rank: the LoRA's, where no pattern says otherwise.
        targets: names of the projections.
        maps: by layer, its projections.
    """

    rank: int
    targets: tuple[str, ...]
    maps: tuple[tuple[LoraMap, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraMap:
    """A LoRA on one linear map.

    Args:
        projection: its place in `ATTENTION`.
        rank, scale: as read.
        down_cell, up_cell: where its rows begin, in cells from the beginning of the layer's piece.
    """

    projection: int
    rank: int
    scale: float
    down_cell: int
    up_cell: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraTables:
    """The tables of LoRAs for `perft_kernels.routed_units`: on projection J of attention block L, the LoRA of slot A is adapter
    expert number A.

    Args:
        down_cell_LJA, up_cell_LJA, rank_LJA, scale_LJA: of the contract, rows of the pool being cells.
        silu_A: no LoRA has it.
    """

    down_cell_LJA: Tensor
    up_cell_LJA: Tensor
    rank_LJA: Tensor
    scale_LJA: Tensor
    silu_A: Tensor

    @property
    def num_slots(self) -> int:
        """A."""
        return self.silu_A.shape[0]


class Placement:
    """Rows of the arena that one adapter has: reserved, being filled, in use, or being wiped. The arena's own book-keeping.

    Attributes:
        runs: (first row in the arena, number of rows), in the order of the staged rows.
        starts: first row of each run of each of the adapter's `pieces`.
        num_done: rows that have been copied, or wiped.
    """

    def __init__(self, runs: list[tuple[int, int]], starts: list[Tensor]) -> None:
        self.runs = runs
        self.starts = starts
        self.num_done = 0
        self.slot = -1
        self.first_expert = -1
        self.num_experts = 0
        self.copied: torch.cuda.Event | None = None

    @property
    def num_rows(self) -> int:
        """In all runs together."""
        return sum(length for _, length in self.runs)

    def next_runs(self, num_rows: int) -> list[tuple[int, int, int]]:
        """The next `num_rows` that are not done, as (row among the staged ones, row in the arena, number of rows)."""
        found = []
        begin, end, at = self.num_done, self.num_done + num_rows, 0
        for start, length in self.runs:
            first, last = max(begin, at), min(end, at + length)
            if first < last:
                found.append((first, start + first - at, last - first))
            at += length
        return found


class AdapterArena:
    """The adapters on one device.

    The tables are made with room for every adapter expert that the pool can hold if it adapts all layers (about 6 / D of the
    pool's size, 65536 adapter experts at the most), so their addresses stay the same; only a crowd of adapters that adapt
    few layers each makes them grow, and then they are new tensors. Readers fetch the attributes at every step.

    Args:
        blocks: MoE blocks of the base, in layer order; `l` below counts them.
        num_bytes: size of the pool.
        dtype: of the pool; adapters are converted to it when they are staged.
        device: where it lies.
        attention: the base's attention, in layer order, if LoRAs are to be put on it.

    Attributes:
        rows_SD: the pool `[S, D]`.
        rule_A6, gate_row_LA, down_row_LE, up_row_LE, rank_LE, scale_E, silu_E: the tables of
            `perft_kernels.adapter_router` and `perft_kernels.routed_units`, with a leading layer axis where they differ by
            layer.
        cells_SV: the pool as rows of a width that divides those of all projections.
        lora: the tables of LoRAs, made when the first one comes, and anew when there are more than they have room for.

    Raises:
        AdapterError: `num_bytes` does not hold a single row.
    """

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        attention: Sequence[AttentionBlock] = (),
    ) -> None:
        self.blocks = tuple(blocks)
        self.attention = tuple(attention)
        self.device = device
        hidden_size = self.blocks[0].hidden_size
        self.row_bytes = hidden_size * dtype.itemsize
        num_rows = num_bytes // self.row_bytes
        if num_rows < 1:
            raise AdapterError(f"adapter memory of {num_bytes} bytes does not hold one row of width {hidden_size}")
        num_layers = len(self.blocks)
        num_experts = min(max(num_rows // (2 * num_layers), 1), _MAX_FIRST_EXPERTS)
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            # not zeroed: nobody reads a row that no adapter has, and on a CPU untouched memory costs nothing
            self.rows_SD = huge_pages.empty((num_rows, hidden_size), dtype, device)
            self.rule_A6 = torch.zeros(num_experts, 6, dtype=torch.int64, device=device)
            self.gate_row_LA = torch.full((num_layers, num_experts), -1, dtype=torch.int64, device=device)
            self.down_row_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
            self.up_row_LE = torch.zeros_like(self.down_row_LE)
            self.rank_LE = torch.zeros_like(self.down_row_LE)
            self.scale_E = torch.zeros(num_experts, dtype=torch.float32, device=device)
            self.silu_E = torch.zeros(num_experts, dtype=torch.bool, device=device)
        widths = {width for block in self.attention for each in block.widths.values() for width in each}
        self.cells_SV = self.rows_SD.view(-1, math.gcd(hidden_size, *widths))
        self.lora: LoraTables | None = None
        self._rows = RangeAllocator(num_rows)
        self._experts = RangeAllocator(num_experts)
        self._residents: dict[int, Placement] = {}
        self._free_slots: list[int] = []  # a heap of slots below the highest that was ever used
        self._num_slots = 0
        self._wiping: deque[Placement] = deque()
        self._num_wiping_rows = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self.rows_SD.nbytes

    @property
    def num_rows(self) -> int:
        """Size of the pool in rows."""
        return self._rows.size

    @property
    def num_free_rows(self) -> int:
        """Rows that can be placed in now."""
        return self._rows.num_free

    @property
    def num_wiping_rows(self) -> int:
        """Rows of evicted adapters that will be free once they are wiped."""
        return self._num_wiping_rows

    @property
    def num_free_bytes(self) -> int:
        """How much of the pool no adapter has, wiped or not."""
        return (self.num_free_rows + self.num_wiping_rows) * self.row_bytes

    def stage(self, adapter: Adapter | LoraAdapter) -> StagedAdapter:
        """An adapter's rows as the arena will hold them. Reads nothing that changes: any thread may call it.

        Raises:
            AdapterError: its values overflow the arena's dtype.
        """
        return self._stage_lora(adapter) if isinstance(adapter, LoraAdapter) else self._stage_perft(adapter)

    def _stage_perft(self, adapter: Adapter) -> StagedPerft:
        ordinals = tuple(l for l, block in enumerate(self.blocks) if block.layer in adapter.layers)
        hidden_size, dtype = self.rows_SD.shape[1], self.rows_SD.dtype
        pieces = adapter.pieces
        with torch.inference_mode(False):
            if len(pieces) == 1 and pieces[0].dtype == dtype and self.device.type != "cuda":
                rows_SD = pieces[0].view(-1, hidden_size)
            else:
                rows_SD = torch.empty(
                    sum(piece.numel() for piece in pieces) // hidden_size,
                    hidden_size,
                    dtype=dtype,
                    pin_memory=self.device.type == "cuda",
                )
                row = 0
                for piece in pieces:
                    rows = piece.view(-1, hidden_size)
                    rows_SD[row : row + rows.shape[0]] = rows
                    row += rows.shape[0]
        if any(piece.dtype != dtype for piece in pieces) and not is_finite(rows_SD):
            raise AdapterError(f"its values do not fit into {dtype}")
        # where nobody knows the base's top-k, a token could at the most take all
        width = adapter.config.experts_per_token(adapter.num_experts, self.blocks[0].top_k) or adapter.num_experts
        num_layers, num_experts = len(ordinals), adapter.num_experts
        num_gates = num_layers if adapter.config.variant == "R" else 0
        return StagedPerft(
            rows_SD=rows_SD,
            ordinals=ordinals,
            config=adapter.config,
            num_experts=num_experts,
            digest=adapter.digest,
            width=width,
            num_parameters=adapter.num_parameters,
            pieces=[(adapter.config.r, 2 * num_layers * num_experts), (num_experts, num_gates)],
        )

    def _stage_lora(self, adapter: LoraAdapter) -> StagedLora:
        hidden_size, cell = self.rows_SD.shape[1], self.cells_SV.shape[1]
        of_layer: dict[int, list[LoraPair]] = {}
        for pair in adapter.pairs:
            assert pair.layer is not None
            of_layer.setdefault(pair.layer, []).append(pair)
        ordinals = tuple(l for l, block in enumerate(self.attention) if block.layer in of_layer)
        pairs_L = [
            sorted(of_layer[self.attention[l].layer], key=lambda pair: ATTENTION.index(pair.target)) for l in ordinals
        ]
        sizes_L = [-(-sum(pair.num_parameters for pair in pairs) // hidden_size) for pairs in pairs_L]
        with torch.inference_mode(False):
            # zeroed, for what is left of a layer's last row
            rows_SD = torch.zeros(
                sum(sizes_L), hidden_size, dtype=self.rows_SD.dtype, pin_memory=self.device.type == "cuda"
            )
            maps_L = []
            for pairs, piece in zip(pairs_L, rows_SD.split(sizes_L), strict=True):
                numbers, at, maps = piece.view(-1), 0, []
                for pair in pairs:
                    cells = []
                    for rows in (pair.down_RI, pair.up_OR.mT):
                        cells.append(at // cell)
                        numbers[at : at + rows.numel()].view(rows.shape).copy_(rows)
                        at += rows.numel()
                    maps.append(
                        LoraMap(
                            projection=ATTENTION.index(pair.target),
                            rank=pair.down_RI.shape[0],
                            scale=pair.scale,
                            down_cell=cells[0],
                            up_cell=cells[1],
                        )
                    )
                maps_L.append(tuple(maps))
        if any(tensor.dtype != rows_SD.dtype for tensor in adapter.tensors) and not is_finite(rows_SD):
            raise AdapterError(f"its values do not fit into {rows_SD.dtype}")
        return StagedLora(
            rows_SD=rows_SD,
            ordinals=ordinals,
            digest=adapter.digest,
            width=0,
            num_parameters=adapter.num_parameters,
            pieces=[(size, 1) for size in sizes_L],
            rank=adapter.config.r,
            targets=tuple(adapter.targets),
            maps=tuple(maps_L),
        )

    def would_fit(self, staged: StagedAdapter, kept: Iterable[Sequence[tuple[int, int]]]) -> bool:
        """Whether `place` would find room for an adapter if only these had their rows.

        Args:
            kept: runs (first row, number of rows) of each; none of them overlap.
        """
        rows = RangeAllocator(0)
        end = 0
        for start, length in sorted(run for runs in kept for run in runs):
            if start > end:
                rows.give(end, start - end)
            end = start + length
        if end < self.num_rows:
            rows.give(end, self.num_rows - end)
        return rows.take(staged.num_rows) is not None or rows.take_pieces(staged.pieces) is not None

    def place(self, staged: StagedAdapter) -> Placement | None:
        """Reserve rows for an adapter, in one run or in pieces; `None` if the free rows do not hold it."""
        pieces = staged.pieces
        assert staged.num_rows == sum(length * count for length, count in pieces)
        first_row = self._rows.take(staged.num_rows)
        if first_row is not None:
            starts = []
            end = first_row
            for length, count in pieces:
                starts.append(torch.arange(end, end + length * count, length))
                end += length * count
            runs = [(first_row, staged.num_rows)]
        else:
            found = self._rows.take_pieces(pieces)
            if found is None:
                return None
            starts = [torch.tensor(each, dtype=torch.int64) for each in found]
            runs = _joined([(start, length) for (length, _), each in zip(pieces, found, strict=True) for start in each])
        return Placement(runs, starts)

    def copy(self, staged: StagedAdapter, placement: Placement, max_bytes: int) -> int:
        """Copy the next rows of an adapter to where it was placed; on a GPU, on a stream of their own.

        Args:
            max_bytes: at most so many, but never less than one row.

        Returns:
            How many bytes that were; 0 when all are on their way.
        """
        num_rows = min(max(max_bytes // self.row_bytes, 1), staged.num_rows - placement.num_done)
        if not num_rows:
            return 0
        if self._stream is None:
            self._copy_rows(staged, placement, num_rows)
        else:
            # behind the kernels that read the rows' former owner, and behind their wiping
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._copy_rows(staged, placement, num_rows)
                placement.copied = torch.cuda.Event()
                placement.copied.record(self._stream)
        placement.num_done += num_rows
        return num_rows * self.row_bytes

    def is_copied(self, staged: StagedAdapter, placement: Placement) -> bool:
        """Whether every row is there."""
        return placement.num_done == staged.num_rows and (placement.copied is None or placement.copied.query())

    def publish(self, staged: StagedAdapter, placement: Placement) -> int:
        """Enter an adapter that is copied into the tables; returns its slot."""
        assert self.is_copied(staged, placement)
        with torch.inference_mode(False):
            placement.slot = self._take_slot()
            if isinstance(staged, StagedLora):
                self._write_lora_tables(staged, placement)
            else:
                assert isinstance(staged, StagedPerft)
                placement.num_experts = staged.num_experts
                placement.first_expert = self._take_experts(staged.num_experts)
                self._write_tables(staged, placement)
        self._residents[placement.slot] = placement
        return placement.slot

    def load(self, staged: StagedAdapter) -> int | None:
        """`place`, `copy` and `publish` at once; returns the slot, or `None` if there is no room."""
        placement = self.place(staged)
        if placement is None:
            return None
        while self.copy(staged, placement, staged.num_bytes):
            pass
        if placement.copied is not None:
            placement.copied.synchronize()
        return self.publish(staged, placement)

    def runs_of(self, slot: int) -> list[tuple[int, int]]:
        """Where a published adapter lies: (first row, number of rows) of each run."""
        return list(self._residents[slot].runs)

    def evict(self, slot: int) -> None:
        """Take an adapter out of the tables; its rows are free when `wipe` has zeroed them."""
        placement = self._residents.pop(slot)
        if placement.num_experts:
            experts = slice(placement.first_expert, placement.first_expert + placement.num_experts)
            self.rank_LE[:, experts] = 0
            self.rule_A6[slot] = 0
            self.gate_row_LA[:, slot] = -1
            self._experts.give(placement.first_expert, placement.num_experts)
        else:
            assert self.lora is not None
            self.lora.rank_LJA[:, :, slot] = 0
        heapq.heappush(self._free_slots, slot)
        self.abandon(placement)

    def abandon(self, placement: Placement) -> None:
        """Give up an adapter that is placed, but not published; its rows are free when `wipe` has zeroed them."""
        if placement.copied is not None:  # the rows are wiped behind what is still being copied into them
            torch.cuda.current_stream(self.device).wait_event(placement.copied)
        placement.num_done = 0
        self._wiping.append(placement)
        self._num_wiping_rows += placement.num_rows

    def wipe(self, max_bytes: int | None = None) -> int:
        """Zero rows of evicted adapters, and free them.

        Args:
            max_bytes: at most so many, but never less than one row.

        Returns:
            How many bytes that were.
        """
        left = self._num_wiping_rows if max_bytes is None else max(max_bytes // self.row_bytes, 1)
        num_wiped = 0
        while self._wiping and left:
            placement = self._wiping[0]
            runs = placement.next_runs(left)
            for _, row, length in runs:
                self.rows_SD[row : row + length] = 0
                self._rows.give(row, length)
                placement.num_done += length
                left -= length
                num_wiped += length
            if placement.num_done == placement.num_rows:
                self._wiping.popleft()
        self._num_wiping_rows -= num_wiped
        return num_wiped * self.row_bytes

    def _copy_rows(self, staged: StagedAdapter, placement: Placement, num_rows: int) -> None:
        for source, row, length in placement.next_runs(num_rows):
            self.rows_SD[row : row + length].copy_(staged.rows_SD[source : source + length], non_blocking=True)

    def _write_tables(self, staged: StagedPerft, placement: Placement) -> None:
        config, slot = staged.config, placement.slot
        rank_starts = placement.starts[0].view(len(staged.ordinals), 2, staged.num_experts)
        gate_starts = placement.starts[1]
        experts = slice(placement.first_expert, placement.first_expert + staged.num_experts)
        self.scale_E[experts] = config.scale
        self.silu_E[experts] = config.unit == "parallel"
        self.rule_A6[slot] = torch.tensor(_rule(config, staged.num_experts, placement.first_expert))
        self.rank_LE[:, experts] = 0  # layers that the adapter leaves alone
        self.gate_row_LA[:, slot] = -1
        layers = torch.tensor(staged.ordinals, device=self.device)
        self.down_row_LE[layers, experts] = rank_starts[:, 0].to(self.device)
        self.up_row_LE[layers, experts] = rank_starts[:, 1].to(self.device)
        self.rank_LE[layers, experts] = config.r
        if gate_starts.numel():
            self.gate_row_LA[layers, slot] = gate_starts.to(self.device)

    def _write_lora_tables(self, staged: StagedLora, placement: Placement) -> None:
        lora, slot = self._lora_tables(placement.slot + 1), placement.slot
        shape = lora.rank_LJA.shape[:2]
        down, up, rank = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        scale = torch.zeros(shape)
        cells_per_row = self.rows_SD.shape[1] // self.cells_SV.shape[1]
        for l, maps, start in zip(staged.ordinals, staged.maps, placement.starts, strict=True):
            first = int(start) * cells_per_row
            for each in maps:
                at = (l, each.projection)
                down[at], up[at] = first + each.down_cell, first + each.up_cell
                rank[at], scale[at] = each.rank, each.scale
        for table, values in (
            *((lora.down_cell_LJA, down), (lora.up_cell_LJA, up)),
            *((lora.rank_LJA, rank), (lora.scale_LJA, scale)),
        ):
            table[:, :, slot] = values.to(self.device)

    def _lora_tables(self, num_slots: int) -> LoraTables:
        """The tables of LoRAs, with room for at least so many slots."""
        old = self.lora
        if old is not None and num_slots <= old.num_slots:
            return old
        size = max(2 * num_slots, _MIN_LORA_SLOTS)
        if old is None:
            shape = (len(self.attention), len(ATTENTION), size)
            rank_LJA = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self.lora = LoraTables(
                down_cell_LJA=torch.zeros_like(rank_LJA),
                up_cell_LJA=torch.zeros_like(rank_LJA),
                rank_LJA=rank_LJA,
                scale_LJA=torch.zeros(shape, dtype=torch.float32, device=self.device),
                silu_A=torch.zeros(size, dtype=torch.bool, device=self.device),
            )
        else:
            self.lora = LoraTables(
                **{item.name: _grown(getattr(old, item.name), -1, size, 0) for item in dataclasses.fields(LoraTables)}
            )
        return self.lora

    def _take_experts(self, num_experts: int) -> int:
        first = self._experts.take(num_experts)
        if first is None:
            self._experts.grow(2 * self._experts.size + num_experts)
            for name in ("down_row_LE", "up_row_LE", "rank_LE", "scale_E", "silu_E"):
                setattr(self, name, _grown(getattr(self, name), -1, self._experts.size, 0))
            first = self._experts.take(num_experts)
        assert first is not None
        return first

    def _take_slot(self) -> int:
        if self._free_slots:
            return heapq.heappop(self._free_slots)
        slot = self._num_slots
        self._num_slots += 1
        if slot == self.rule_A6.shape[0]:
            self.rule_A6 = _grown(self.rule_A6, 0, 2 * slot, 0)
            self.gate_row_LA = _grown(self.gate_row_LA, 1, 2 * slot, -1)
        return slot


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in the same order, those that follow one another without a gap as one."""
    joined: list[tuple[int, int]] = []
    for start, length in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _rule(config: PerftConfig, num_experts: int, first_expert: int) -> list[int]:
    """One row of `rule_A6` (columns `RULE_*` of `perft_kernels.adapter_router`)."""
    return [
        _KINDS[config.variant],
        num_experts,
        config.top_k or 0,
        int(bool(config.norm_topk)),
        int(config.combine == "base-rank"),
        first_expert,
    ]


def _grown(table: Tensor, axis: int, size: int, fill: int) -> Tensor:
    shape = list(table.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([table, table.new_full(shape, fill)], dim=axis)
