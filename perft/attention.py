"""Finding the linear maps of a base model's attention: where a LoRA can be served.

In: a model (weights are not read). Out: an `AttentionBlock` for each decoder layer whose attention has linear maps of the usual
names, in layer order. It knows nothing of adapters, nor of families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBlock:
    """The attention of one decoder layer.

    Args:
        layer: number of the decoder layer.
        name: path of the attention module inside the model, such as `model.layers.0.self_attn`.
        widths: (input, output) of each linear map, by its name; those of `ATTENTION` that there are, in that order.
    """

    layer: int
    name: str
    widths: Mapping[str, tuple[int, int]]


def find_attention_blocks(model: nn.Module) -> list[AttentionBlock]:
    """The attention of `model`, in layer order; empty if its linear maps have other names, or cannot be told apart by layer."""
    blocks = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        widths = {
            target: (children[target].in_features, children[target].out_features)
            for target in ATTENTION
            if isinstance(children.get(target), nn.Linear)
        }
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if widths and number is not None:
            blocks.append(AttentionBlock(layer=int(number[1]), name=name, widths=widths))
    if len({block.layer for block in blocks}) != len(blocks):
        return []
    return sorted(blocks, key=lambda block: block.layer)
