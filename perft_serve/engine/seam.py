"""Where the base model calls out: its experts modules and its attention's projections, wrapped so that each token's own adapter
adds its delta, and its attention, replaced by attention over KV pages. All of them read the step's `Batch` from the one `Seam`
they were given when they were made. The model itself is Transformers' own, whatever its family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from perft.attention import ATTENTION, AttentionBlock
from perft.moe import ExpertsWrapper, MoeBlock
from perft_kernels import huge_pages
from perft_kernels.adapter_router import adapter_router
from perft_kernels.paged_attention import kv_write, paged_attention
from perft_kernels.routed_units import routed_units
from perft_serve.adapters.arena import AdapterArena
from perft_serve.engine.batch import Batch
from perft_serve.engine.transfer import to_device

PAGED_ATTENTION = "perft_paged"
# keyword arguments of attention calls that change nothing for a decoder in inference
_HARMLESS = frozenset(
    {
        "dropout",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
    }
)


class KvCache:
    """Pages of keys and values, one pair of tensors per layer: `[P + 1, page, G, C]`; page 0 is nobody's.

    Args:
        shapes: (G, C of keys, C of values) of each layer.
        num_pages: P.
        page_size: tokens in a page.
    """

    def __init__(
        self,
        shapes: dict[int, tuple[int, int, int]],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pools: list[Tensor] = []  # keys, or values, of layers alike, `[layers, P + 1, page, G, C]`
        for shape in dict.fromkeys(shapes.values()):
            heads, *dims = shape
            alike = [layer for layer, other in shapes.items() if other == shape]
            # not zeroed: pages are cleared when they are handed out, and on a CPU untouched memory costs nothing
            keys, values = (
                huge_pages.empty((len(alike), num_pages + 1, page_size, heads, dim), dtype, device) for dim in dims
            )
            self.layers |= {layer: (keys[i], values[i]) for i, layer in enumerate(alike)}
            self._pools += [keys, values]
        self.clear((0,))

    def clear(self, pages: tuple[int, ...]) -> None:
        """Zero pages that change hands: what a former holder left there, NaN included, must not reach the next."""
        if not pages:
            return
        index = to_device(pages, torch.int64, self._pools[0].device)
        for pool in self._pools:
            pool.index_fill_(1, index, 0)


class Seam:
    """What the wrapped modules of one model read during a forward pass; the runner sets `batch` before each.

    Of the tokens `batch.routed_rows`, `routed` holds what each MoE block's router of adapters has chosen in the last pass.

    Without a KV cache it only notes what the model does: the shapes of keys and values of each layer (`kv_shapes`) and how
    many base experts a token takes (`base_top_k`).

    `ones_T1` are the weights of LoRAs, for as many tokens as a batch can have.

    While `routes` is a list, the adapter experts of each MoE block's tokens are added to it: the block's number and ids_TX.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.cache: KvCache | None = None
        self.arena: AdapterArena | None = None
        self.kv_shapes: dict[int, tuple[int, int, int]] = {}
        self.base_top_k = 0
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}  # ids and weights `[R, X]`, by the block's ordinal
        self.routes: list[tuple[int, Tensor]] | None = None
        self.ones_T1 = torch.empty(0, 1)

    def attend(
        self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, scale: float, window: int | None, sinks: Any
    ) -> Tensor:
        """Store the new keys and values, then attend; `[T, H, Cv]`."""
        if self.cache is None:
            self.kv_shapes[layer] = (k_TGC.shape[1], k_TGC.shape[2], v_TGC.shape[2])
            return q_THC.new_zeros(*q_THC.shape[:2], v_TGC.shape[2])
        assert self.batch is not None
        k_pages, v_pages = self.cache.layers[layer]
        kv_write(k_TGC, v_TGC, k_pages, v_pages, self.batch.slot_T)
        return paged_attention(
            q_THC,
            k_pages,
            v_pages,
            self.batch.pages_BN,
            self.batch.short_T,
            self.batch.positions_T,
            self.batch.num_queries,
            self.batch.context_len,
            self.batch.num_long,
            scale=scale,
            window=window,
            sinks_H=sinks,
            long_Q3=self.batch.long_Q3,
        )

    def add_lora(self, ordinal: int, projection: int, y: Tensor, x: Tensor) -> Tensor:
        """A projection's output plus each token's LoRA on it, in attention block number `ordinal`."""
        batch, arena = self.batch, self.arena
        if batch is None or arena is None or not batch.has_lora:
            return y
        lora = arena.lora
        assert lora is not None
        out_TO = routed_units(
            y.view(-1, y.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            batch.adapter_T.unsqueeze(1),
            self.ones_T1[: batch.adapter_T.shape[0]],
            arena.cells_SV,
            arena.cells_SV,
            lora.down_cell_LJA[ordinal, projection],
            lora.up_cell_LJA[ordinal, projection],
            lora.rank_LJA[ordinal, projection],
            lora.scale_LJA[ordinal, projection],
            lora.silu_A,
        )
        return out_TO.view(y.shape)

    def add_delta(self, ordinal: int, y: Tensor, h: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> Tensor:
        """The base experts' output plus each token's adapter's delta, in MoE block number `ordinal`."""
        batch, arena = self.batch, self.arena
        if self.cache is None:
            self.base_top_k = base_ids_TK.shape[1]
        if batch is None or arena is None or batch.width == 0:
            return y
        h_TD = h.view(-1, h.shape[-1])
        ids_TX, weights_TX = adapter_router(
            h_TD,
            base_ids_TK,
            base_weights_TK,
            batch.adapter_T,
            arena.rows_SD,
            arena.rule_A6,
            arena.gate_row_LA[ordinal],
            batch.width,
        )
        if batch.routed_rows:
            rows = to_device(batch.routed_rows, torch.int64, ids_TX.device)
            self.routed[ordinal] = (ids_TX[rows], weights_TX[rows])
        if self.routes is not None:
            self.routes.append((ordinal, ids_TX))
        out_TD = routed_units(
            y.view(-1, y.shape[-1]),
            h_TD,
            ids_TX,
            weights_TX,
            arena.rows_SD,
            arena.rows_SD,
            arena.down_row_LE[ordinal],
            arena.up_row_LE[ordinal],
            arena.rank_LE[ordinal],
            arena.scale_E,
            arena.silu_E,
        )
        return out_TD.view(y.shape)


class ServedExperts(ExpertsWrapper):
    """An experts module with the seam behind it."""

    def __init__(self, base_layer: nn.Module, ordinal: int, seam: Seam) -> None:
        super().__init__(base_layer)
        self._ordinal = ordinal
        self._seam = seam

    def forward(self, h: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> Tensor:
        """As the base layer's, plus the deltas."""
        y: Tensor = self.base_layer(h, base_ids_TK, base_weights_TK)
        return self._seam.add_delta(self._ordinal, y, h, base_ids_TK, base_weights_TK)


class ServedLinear(nn.Module):
    """A projection of attention with the seam behind it."""

    def __init__(self, base_layer: nn.Module, ordinal: int, projection: int, seam: Seam) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._ordinal = ordinal
        self._projection = projection
        self._seam = seam

    def forward(self, x: Tensor) -> Tensor:
        """As the base layer's, plus the LoRAs."""
        return self._seam.add_lora(self._ordinal, self._projection, self.base_layer(x), x)


def install(
    model: PreTrainedModel, blocks: Sequence[MoeBlock], attention: Sequence[AttentionBlock], seam: Seam
) -> None:
    """Put the seam behind the MoE blocks and the projections of `model`, and paged attention into all its layers."""
    for ordinal, block in enumerate(blocks):
        model.set_submodule(block.name, ServedExperts(model.get_submodule(block.name), ordinal, seam))
    for ordinal, layer in enumerate(attention):
        module = model.get_submodule(layer.name)
        for target in layer.widths:
            served = ServedLinear(getattr(module, target), ordinal, ATTENTION.index(target), seam)
            setattr(module, target, served)
    AttentionInterface.register(PAGED_ATTENTION, _attention)
    model.set_attn_implementation(PAGED_ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    perft_seam: Seam | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention call, `[1, H, T, C]` each, handed to the seam that the runner passed to `forward`."""
    if kwargs.pop("is_causal", None) is False:
        raise NotImplementedError(f"{type(module).__name__} attends to later tokens too; paged attention is causal")
    unknown = {name for name, value in kwargs.items() if value is not None} - _HARMLESS
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} asks attention for {sorted(unknown)}, which paged attention does not do"
        )
    assert perft_seam is not None
    out_THC = perft_seam.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        s_aux,
    )
    return out_THC.unsqueeze(0), None
