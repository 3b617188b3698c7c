"""PERFT's layer: the experts module of one MoE block, with any number of adapters beside it.

In: the call the model makes, `experts(h_TD, base_ids_TK, base_weights_TK)`. Out: what the base experts give, plus the delta
of the active adapters (PERFT equation, arXiv 2411.08212):

    y = MoE(h) + sum over e in route(h) of  w_e * scale * up_e(act(down_e(h)))

The variants differ only in `_route`, where the adapter experts of a token and their weights come from. A tensor of
this layer is laid out in *rank rows*, as serving keeps it: down and up `[M, R, D]`, gate `[M, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from perft.config import PerftConfig
from perft.errors import PerftError
from perft.moe import ExpertsWrapper, MoeBlock
from perft_kernels.adapter_router import route
from perft_kernels.routed_units import routed_units

OFFICIAL_UP_STD = 1e-6
OFFICIAL_GATE_STD = 0.02


@dataclass(slots=True)
class RouterTrace:
    """Gate logits of one forward pass, by adapter, in layer order.

    It is stopped before the backward pass, so that gradient checkpointing's second forward adds nothing.
    """

    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    recording: bool = False

    def start(self, *, recording: bool) -> None:
        """Begin a forward pass; what an earlier, failed one left behind is dropped."""
        self.logits, self.recording = {}, recording

    def add(self, adapter_name: str, logits_TM: Tensor) -> None:
        """Keep one layer's gate logits of one adapter."""
        if self.recording:
            self.logits.setdefault(adapter_name, []).append(logits_TM)

    def stop(self) -> dict[str, list[Tensor]]:
        """End the forward pass and hand over what was kept."""
        logits, self.logits, self.recording = self.logits, {}, False
        return logits


class RandomStream:
    """A state of torch's random generators of its own: inside `with stream:` they are in it, and go on where they stood."""

    def __init__(self, seed: int) -> None:
        self._outer: list[Tensor] = []
        self.states: list[Tensor] = []
        outer = _random_states()
        torch.manual_seed(seed)
        self.states = _random_states()
        _set_random_states(outer)

    def __enter__(self) -> None:
        self._outer = _random_states()
        _set_random_states(self.states)

    def __exit__(self, *exc_info: object) -> None:
        self.states = _random_states()
        _set_random_states(self._outer)


def _random_states() -> list[Tensor]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _set_random_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTokens:
    """The tokens of a batch that one adapter sees, and nobody else.

    Args:
        name: the adapter's.
        tokens_T: their places in the flattened batch.
        stream: where its dropout is drawn from.
    """

    name: str
    tokens_T: Tensor
    stream: RandomStream


@dataclass(slots=True)
class MixedBatch:
    """Whose the tokens of the present batch are, when every row has an adapter of its own; empty: the active adapters'.

    It stays what it is until the backward pass is over, so that gradient checkpointing's second forward sees it too.
    """

    parts: tuple[AdapterTokens, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTable:
    """The adapter experts of one adapter in one layer, as `routed_units` wants them. All tensors are [M]."""

    first_row_E: Tensor
    rank_E: Tensor
    scale_E: Tensor
    silu_E: Tensor

    @classmethod
    def build(cls, config: PerftConfig, num_experts: int, device: torch.device) -> UnitTable:
        """The table of `num_experts` adapter experts of `config.r` rows each, one after the other."""
        with torch.inference_mode(False):  # it outlives the call, and training may be next
            return cls(
                first_row_E=torch.arange(num_experts, device=device) * config.r,
                rank_E=torch.full((num_experts,), config.r, device=device),
                scale_E=torch.full((num_experts,), config.scale, dtype=torch.float32, device=device),
                silu_E=torch.full((num_experts,), config.unit == "parallel", device=device),
            )

    @classmethod
    def joined(cls, tables: Sequence[UnitTable], num_rows: Sequence[int]) -> UnitTable:
        """The tables of several adapters whose rows lie one after the other, `num_rows` of each."""
        starts = [sum(num_rows[:i]) for i in range(len(num_rows))]
        return cls(
            first_row_E=torch.cat([table.first_row_E + start for table, start in zip(tables, starts, strict=True)]),
            rank_E=torch.cat([table.rank_E for table in tables]),
            scale_E=torch.cat([table.scale_E for table in tables]),
            silu_E=torch.cat([table.silu_E for table in tables]),
        )


class PerftLayer(ExpertsWrapper, BaseTunerLayer):
    """An experts module with PERFT adapters.

    Args:
        base_layer: the experts module that is wrapped.
        block: what is known of it.
        trace: where gate logits go for the load-balancing loss.
        mixed: whose the tokens of a batch are, where that differs by row.
    """

    adapter_layer_names = ("perft_down", "perft_up", "perft_gate")
    other_param_names = ("perft_config",)

    def __init__(
        self, base_layer: nn.Module, block: MoeBlock, trace: RouterTrace, mixed: MixedBatch | None = None
    ) -> None:
        super().__init__(base_layer)
        self.block = block
        self._trace = trace
        self._mixed = MixedBatch() if mixed is None else mixed
        self.perft_config: dict[str, PerftConfig] = {}
        self.perft_down = nn.ParameterDict()
        self.perft_up = nn.ParameterDict()
        self.perft_gate = nn.ParameterDict()
        self._tables: dict[tuple[str, torch.device], UnitTable] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: PerftConfig) -> None:
        """Add the adapter `adapter_name`, freshly initialised, in float32 on the base layer's device."""
        num_experts = self.block.num_experts if config.num_experts is None else config.num_experts
        parameter = next(self.base_layer.parameters(), None)
        device = torch.get_default_device() if parameter is None else parameter.device
        units = torch.empty(num_experts, config.r, self.block.hidden_size, device=device)
        self.perft_config[adapter_name] = config
        self.perft_down[adapter_name] = nn.Parameter(units)
        self.perft_up[adapter_name] = nn.Parameter(torch.empty_like(units))
        if config.variant == "R":
            self.perft_gate[adapter_name] = nn.Parameter(
                torch.empty(num_experts, self.block.hidden_size, device=device)
            )
        self.reset_parameters(adapter_name)

    def reset_parameters(self, adapter_name: str) -> None:
        """down ~ N(0, 2/r), gate ~ N(0, 0.02^2); up zero, or ~ N(0, 1e-12) with `init="official"` (the authors' code)."""
        config = self.perft_config[adapter_name]
        nn.init.normal_(self.perft_down[adapter_name], std=math.sqrt(2 / config.r))
        if config.init == "official":
            nn.init.normal_(self.perft_up[adapter_name], std=OFFICIAL_UP_STD)
        else:
            nn.init.zeros_(self.perft_up[adapter_name])
        if adapter_name in self.perft_gate:
            nn.init.normal_(self.perft_gate[adapter_name], std=OFFICIAL_GATE_STD)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, and the cached tables go as well."""
        super().delete_adapter(adapter_name)
        self._tables = {key: table for key, table in self._tables.items() if key[0] != adapter_name}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see `PerftModel`."""
        raise PerftError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Refused: see `PerftModel`."""
        raise PerftError(MERGE_REFUSED)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the delta is not a product of two matrices on one weight."""
        return False

    def forward(self, h: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> Tensor:
        """The base experts' output plus the active adapters' deltas; shapes as the base layer's."""
        y: Tensor = self.base_layer(h, base_ids_TK, base_weights_TK)
        if self.disable_adapters:
            return y
        h_TD, y_TD = h.reshape(-1, h.shape[-1]), y.reshape(-1, y.shape[-1])
        if self._mixed.parts:
            return self._add_own_deltas(y_TD, h_TD, base_ids_TK, base_weights_TK).reshape(y.shape)
        for name in self.active_adapters:
            if name in self.perft_config:
                y_TD = self._add_delta(name, y_TD, h_TD, base_ids_TK, base_weights_TK)
        return y_TD.reshape(y.shape)

    def _add_delta(self, name: str, y_TD: Tensor, h_TD: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> Tensor:
        ids_TX, weights_TX = self._route(name, h_TD, base_ids_TK, base_weights_TK)
        h_TD, mask_TXR = self._drop(name, h_TD, ids_TX)
        table = self._table(name, h_TD.device)
        return _add_units(y_TD, h_TD, ids_TX, weights_TX, self._rows(name), table, mask_TXR)

    def _add_own_deltas(self, y_TD: Tensor, h_TD: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> Tensor:
        """To each token the delta of its own adapter: one call for all adapters, whatever their variants and ranks."""
        parts: list[_Part] = []
        for own in self._mixed.parts:
            if own.name not in self.perft_config:
                continue
            h_own_TD = h_TD[own.tokens_T]
            ids_TX, weights_TX = self._route(
                own.name, h_own_TD, base_ids_TK[own.tokens_T], base_weights_TK[own.tokens_T]
            )
            if self.training and self.perft_config[own.name].dropout > 0:
                with own.stream:
                    h_own_TD, mask_TXR = self._drop(own.name, h_own_TD, ids_TX)
            else:
                mask_TXR = None
            table = self._table(own.name, h_TD.device)
            if mask_TXR is not None:  # a mask has one rank's width, so its adapter goes by itself
                out_TD = _add_units(
                    y_TD[own.tokens_T], h_own_TD, ids_TX, weights_TX, self._rows(own.name), table, mask_TXR
                )
                y_TD = y_TD.index_copy(0, own.tokens_T, out_TD)
                continue
            parts.append(
                _Part(
                    tokens_T=own.tokens_T,
                    h_TD=h_own_TD,
                    ids_TX=ids_TX,
                    weights_TX=weights_TX,
                    rows=self._rows(own.name),
                    table=table,
                )
            )
        if not parts:
            return y_TD
        width = max(part.ids_TX.shape[1] for part in parts)
        first, ids, weights = 0, [], []
        for part in parts:
            num_experts = part.table.rank_E.shape[0]
            inside_TX = (part.ids_TX >= 0) & (part.ids_TX < num_experts)
            free = (0, width - part.ids_TX.shape[1])
            ids.append(F.pad(torch.where(inside_TX, part.ids_TX + first, -1), free, value=-1))
            weights.append(F.pad(part.weights_TX, free))
            first += num_experts
        tokens_T = torch.cat([part.tokens_T for part in parts])
        out_TD = _add_units(
            y_TD[tokens_T],
            torch.cat([part.h_TD for part in parts]),
            torch.cat(ids),
            torch.cat(weights),
            (torch.cat([part.rows[0] for part in parts]), torch.cat([part.rows[1] for part in parts])),
            UnitTable.joined([part.table for part in parts], [part.rows[0].shape[0] for part in parts]),
            None,
        )
        return y_TD.index_copy(0, tokens_T, out_TD)

    def _drop(self, name: str, h_TD: Tensor, ids_TX: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dropout where the authors have it: on the lora unit's input, or (as a mask) in the bottleneck before SiLU."""
        config = self.perft_config[name]
        if not self.training or config.dropout == 0:
            return h_TD, None
        if config.unit == "lora":
            return F.dropout(h_TD, config.dropout), None
        return h_TD, F.dropout(torch.ones(*ids_TX.shape, config.r, device=h_TD.device), config.dropout)

    def _rows(self, name: str) -> tuple[Tensor, Tensor]:
        return self.perft_down[name].flatten(0, 1), self.perft_up[name].flatten(0, 1)

    def _route(self, name: str, h_TD: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Adapter experts of each token and their weights: all that the variants differ in."""
        config = self.perft_config[name]
        if config.variant == "E":
            return base_ids_TK.long(), base_weights_TK.float()
        num_experts = self.perft_down[name].shape[0]
        if config.variant != "R":
            ids_TX = torch.arange(num_experts, device=h_TD.device).repeat(h_TD.shape[0], 1)
            return ids_TX, torch.ones_like(ids_TX, dtype=torch.float32)
        gate_MD = self.perft_gate[name]
        logits_TM = F.linear(h_TD.to(gate_MD.dtype), gate_MD)
        self._trace.add(name, logits_TM)
        assert config.top_k is not None
        if config.combine == "base-rank":
            if config.top_k > base_weights_TK.shape[-1]:
                raise PerftError(
                    f"combine='base-rank' needs top_k <= the base router's top-k, got {config.top_k} > "
                    f"{base_weights_TK.shape[-1]}"
                )
            return route(logits_TM, config.top_k, norm=False, base_weights_TK=base_weights_TK)
        return route(logits_TM, config.top_k, norm=bool(config.norm_topk))

    def _table(self, name: str, device: torch.device) -> UnitTable:
        key = (name, device)
        if key not in self._tables:
            self._tables[key] = UnitTable.build(self.perft_config[name], self.perft_down[name].shape[0], device)
        return self._tables[key]

    def __repr__(self) -> str:
        return f"perft.{super().__repr__()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What one adapter brings to a mixed batch."""

    tokens_T: Tensor
    h_TD: Tensor
    ids_TX: Tensor
    weights_TX: Tensor
    rows: tuple[Tensor, Tensor]
    table: UnitTable


def _add_units(
    y_TD: Tensor,
    h_TD: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    rows: tuple[Tensor, Tensor],
    table: UnitTable,
    mask_TXR: Tensor | None,
) -> Tensor:
    down_SD, up_SD = rows
    return routed_units(
        *(y_TD, h_TD, ids_TX, weights_TX, down_SD, up_SD),
        *(table.first_row_E, table.first_row_E, table.rank_E, table.scale_E, table.silu_E, mask_TXR),
    )


MERGE_REFUSED = (
    "a PERFT adapter cannot be merged into the base: its adapter experts sit beside the base experts and are chosen "
    "token by token, so no change of the base's weights equals them. Serve it beside the base instead "
    "(`perft-serve serve --adapter NAME=PATH`), or call `unload()` to take it off."
)
