"""Device memory of adapters: one pool of rows of width D, and tables that say whose rows lie where.

No slots of a maximum rank, no padding: an adapter takes exactly the rows it has (for each layer M*R down rows, M*R up
rows, M gate rows for variant R), in one contiguous run. Ranks, M, variants and unit kinds mix freely. Loading and unloading
write rows and edit tables, never shapes that a running batch depends on. In: checked adapters (`perft.adapter`). Out: a slot
number per adapter, and the tables that `perft_kernels` reads. It knows no names, no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perft.adapter import Adapter
from perft.config import PerftConfig
from perft.errors import AdapterError
from perft.moe import MoeBlock
from perft_kernels.adapter_router import KIND_ALL, KIND_EMBEDDED, KIND_ROUTED

_KINDS = {"S": KIND_ALL, "D": KIND_ALL, "R": KIND_ROUTED, "E": KIND_EMBEDDED}


class OutOfArenaError(AdapterError):
    """An adapter does not fit into what is left of the arena."""


@dataclass(slots=True)
class RangeAllocator:
    """First-fit allocation of runs in `[0, size)`; neighbouring free runs are joined."""

    size: int
    _free: list[tuple[int, int]] = field(default_factory=list)  # (start, length), by start

    def __post_init__(self) -> None:
        self._free = [(0, self.size)] if self.size else []

    @property
    def num_free(self) -> int:
        """How much is free, in all runs together."""
        return sum(length for _, length in self._free)

    def take(self, length: int) -> int | None:
        """Start of a run of `length`, or `None` if there is none so long."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Take a run back."""
        runs = sorted([*self._free, (start, length)])
        self._free = []
        for run_start, run_length in runs:
            if self._free and sum(self._free[-1]) == run_start:
                self._free[-1] = (self._free[-1][0], self._free[-1][1] + run_length)
            else:
                self._free.append((run_start, run_length))

    def grow(self, size: int) -> None:
        """Make the range longer."""
        old, self.size = self.size, size
        self.give(old, size - old)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Resident:
    first_row: int
    num_rows: int
    first_expert: int
    num_experts: int


class AdapterArena:
    """The adapters on one device.

    Args:
        blocks: MoE blocks of the base, in layer order; `l` below counts them.
        num_bytes: size of the pool.
        dtype: of the pool; adapters are converted to it when they are loaded.
        device: where it lies.

    Attributes:
        rows_SD: the pool `[S, D]`.
        rule_A6, gate_row_LA, down_row_LE, up_row_LE, rank_LE, scale_E, silu_E: the tables of
            `perft_kernels.adapter_router` and `perft_kernels.routed_units`, with a leading layer axis where they differ by
            layer.

    Raises:
        AdapterError: `num_bytes` does not hold a single row.
    """

    def __init__(self, blocks: Sequence[MoeBlock], num_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks = tuple(blocks)
        hidden_size = self.blocks[0].hidden_size
        num_rows = num_bytes // (hidden_size * dtype.itemsize)
        if num_rows < 1:
            raise AdapterError(f"adapter memory of {num_bytes} bytes does not hold one row of width {hidden_size}")
        # not zeroed: nobody reads a row that no adapter has, and on a CPU untouched memory costs nothing
        self.rows_SD = torch.empty(num_rows, hidden_size, dtype=dtype, device=device)
        self._rows = RangeAllocator(num_rows)
        self._experts = RangeAllocator(0)
        self._residents: dict[int, _Resident] = {}
        num_layers = len(self.blocks)
        self.rule_A6 = torch.zeros(0, 6, dtype=torch.int64, device=device)
        self.gate_row_LA = torch.full((num_layers, 0), -1, dtype=torch.int64, device=device)
        self.down_row_LE = torch.zeros(num_layers, 0, dtype=torch.int64, device=device)
        self.up_row_LE = torch.zeros_like(self.down_row_LE)
        self.rank_LE = torch.zeros_like(self.down_row_LE)
        self.scale_E = torch.zeros(0, dtype=torch.float32, device=device)
        self.silu_E = torch.zeros(0, dtype=torch.bool, device=device)

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self.rows_SD.nbytes

    @property
    def num_free_bytes(self) -> int:
        """How much of the pool is free."""
        return self._rows.num_free * self.rows_SD.shape[1] * self.rows_SD.dtype.itemsize

    def num_bytes_of(self, adapter: Adapter) -> int:
        """What `adapter` takes in the pool: its parameters in the pool's dtype."""
        return adapter.num_parameters * self.rows_SD.dtype.itemsize

    def load(self, adapter: Adapter) -> int:
        """Copy an adapter in; returns its slot.

        Raises:
            OutOfArenaError: there is no run of rows long enough.
            AdapterError: its values overflow the pool's dtype.
        """
        num_rows = adapter.num_parameters // adapter.hidden_size
        first_row = self._rows.take(num_rows)
        if first_row is None:
            raise OutOfArenaError(
                f"the adapter needs {self.num_bytes_of(adapter):,} bytes, but of the {self.num_bytes:,} bytes of adapter "
                f"memory {self.num_free_bytes:,} are free; start with a larger --adapter-memory"
            )
        try:
            self._copy_rows(adapter, first_row)
        except AdapterError:
            self._clear_rows(first_row, num_rows)
            raise
        first_expert = self._take_experts(adapter.num_experts)
        slot = self._free_slot()
        self._residents[slot] = _Resident(
            first_row=first_row, num_rows=num_rows, first_expert=first_expert, num_experts=adapter.num_experts
        )
        self._write_tables(adapter, slot, first_row, first_expert)
        return slot

    def unload(self, slot: int) -> None:
        """Free an adapter's rows, zeroed, and its entries in the tables."""
        resident = self._residents.pop(slot)
        experts = slice(resident.first_expert, resident.first_expert + resident.num_experts)
        self.rank_LE[:, experts] = 0
        self.rule_A6[slot] = 0
        self.gate_row_LA[:, slot] = -1
        self._clear_rows(resident.first_row, resident.num_rows)
        self._experts.give(resident.first_expert, resident.num_experts)

    def _copy_rows(self, adapter: Adapter, first_row: int) -> None:
        rows_SD = torch.cat([t.reshape(-1, t.shape[-1]) for t in _in_row_order(adapter)])
        target_SD = self.rows_SD[first_row : first_row + rows_SD.shape[0]]
        target_SD.copy_(rows_SD)
        if rows_SD.dtype != target_SD.dtype and not bool(torch.isfinite(target_SD).all()):
            raise AdapterError(f"its values do not fit into {target_SD.dtype}")

    def _clear_rows(self, first_row: int, num_rows: int) -> None:
        self.rows_SD[first_row : first_row + num_rows] = 0
        self._rows.give(first_row, num_rows)

    def _write_tables(self, adapter: Adapter, slot: int, first_row: int, first_expert: int) -> None:
        config, num_experts = adapter.config, adapter.num_experts
        experts = slice(first_expert, first_expert + num_experts)
        self.scale_E[experts] = config.scale
        self.silu_E[experts] = config.unit == "parallel"
        self.rank_LE[:, experts] = 0  # layers that the adapter leaves alone
        self.gate_row_LA[:, slot] = -1
        self.rule_A6[slot] = torch.tensor(_rule(config, num_experts, first_expert))
        local_E = torch.arange(num_experts, device=self.rows_SD.device) * config.r
        row = first_row
        for l, block in enumerate(self.blocks):
            if block.layer not in adapter.layers:
                continue
            self.down_row_LE[l, experts] = row + local_E
            row += num_experts * config.r
            self.up_row_LE[l, experts] = row + local_E
            row += num_experts * config.r
            self.rank_LE[l, experts] = config.r
            if adapter.layers[block.layer].gate_MD is not None:
                self.gate_row_LA[l, slot] = row
                row += num_experts

    def _take_experts(self, num_experts: int) -> int:
        first = self._experts.take(num_experts)
        if first is None:
            self._experts.grow(max(2 * self._experts.size, self._experts.size + num_experts, 64))
            for name in ("down_row_LE", "up_row_LE", "rank_LE", "scale_E", "silu_E"):
                setattr(self, name, _grown(getattr(self, name), -1, self._experts.size, 0))
            first = self._experts.take(num_experts)
        assert first is not None
        return first

    def _free_slot(self) -> int:
        slot = next(slot for slot in range(len(self._residents) + 1) if slot not in self._residents)
        if slot >= self.rule_A6.shape[0]:
            size = max(2 * slot, 16)
            self.rule_A6 = _grown(self.rule_A6, 0, size, 0)
            self.gate_row_LA = _grown(self.gate_row_LA, 1, size, -1)
        return slot


def _in_row_order(adapter: Adapter) -> list[Tensor]:
    """An adapter's tensors as they follow one another in the pool: by layer, down, up, gate."""
    tensors = []
    for layer in sorted(adapter.layers):
        rows = adapter.layers[layer]
        tensors += [rows.down_MRD, rows.up_MRD] + ([] if rows.gate_MD is None else [rows.gate_MD])
    return tensors


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
