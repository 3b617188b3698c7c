"""Finding the Mixture-of-Experts blocks of a base model by what they call, not by the family's name.

Every MoE model of Transformers 5 calls one module per block as `experts(h_TD, base_ids_TK, base_weights_TK) -> y_TD`. That
module is where an adapter attaches, in training and in serving. In: a model (weights are not read, so one on the meta
device will do). Out: `MoeBlock`s in layer order. It knows nothing of adapters.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from perft.errors import BaseModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeBlock:
    """One Mixture-of-Experts block of a base model.

    Args:
        layer: number of the decoder layer.
        name: path of the experts module inside the model, such as `model.layers.0.mlp.experts`.
        hidden_size: D.
        num_experts: N, the base experts.
        top_k: K, base experts per token; `None` if the model does not say.
        norm_topk: whether the base router's weights are made to sum to 1.
    """

    layer: int
    name: str
    hidden_size: int
    num_experts: int
    top_k: int | None
    norm_topk: bool


class ExpertsWrapper(nn.Module):
    """Stands in for an experts module, which it keeps as `base_layer`; what it does besides is its subclasses' matter.

    Models read settings of their experts module (`num_experts`, ...): those are answered by the base layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


def is_experts_module(module: nn.Module) -> bool:
    """Whether `module` takes `(hidden states, base ids, base weights)` and holds a known number of base experts."""
    if not isinstance(getattr(module, "num_experts", None), int):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return len(parameters) == 3 and bool(re.search("ind|ids|selected", parameters[1])) and "weights" in parameters[2]


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """The MoE blocks of `model`, in layer order. A block that PERFT has wrapped already is found as well.

    Raises:
        BaseModelError: there are none, or they cannot be told apart by layer.
    """
    blocks = sorted((_describe(model, name, module) for name, module in _experts(model).items()), key=lambda b: b.layer)
    if not blocks:
        raise BaseModelError(
            f"{type(model).__name__} has no Mixture-of-Experts block that PERFT can attach to: it looks for a module "
            "that the model calls as experts(hidden_states, expert_ids, expert_weights), as every MoE causal language "
            "model of Transformers 5 does. Is this a dense model?"
        )
    layers = [block.layer for block in blocks]
    if len(set(layers)) != len(layers):
        raise BaseModelError(
            f"{type(model).__name__} has several experts modules in one layer "
            f"({', '.join(block.name for block in blocks if layers.count(block.layer) > 1)}); PERFT attaches to one a layer"
        )
    return blocks


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    # a wrapper answers for the module it wraps; both go by the wrapper's name
    return {
        name.removesuffix(".base_layer"): module for name, module in model.named_modules() if is_experts_module(module)
    }


def _describe(model: nn.Module, name: str, experts: nn.Module) -> MoeBlock:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    if not numbers:
        raise BaseModelError(f"cannot tell the layer of the experts module {name!r}: its path holds no number")
    config = _text_config(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    owners = [parent, *parent.children(), config]
    hidden_size = _first_int([experts, config], "hidden_dim", "hidden_size")
    num_experts = _first_int([experts], "num_experts")
    if hidden_size is None or num_experts is None:
        raise BaseModelError(f"cannot tell the hidden size and the number of experts of the experts module {name!r}")
    says_norm = [owner for owner in owners if isinstance(getattr(owner, "norm_topk_prob", None), bool)]
    return MoeBlock(
        layer=int(numbers[0]),
        name=name,
        hidden_size=hidden_size,
        num_experts=num_experts,
        top_k=_first_int(owners, "top_k", "num_experts_per_tok"),
        # families without the setting (Mixtral, gpt-oss, Granite) always normalise
        norm_topk=getattr(says_norm[0], "norm_topk_prob") if says_norm else True,  # noqa: B009 - any owner
    )


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config()


def _first_int(owners: list[object], *names: str) -> int | None:
    """The first integer attribute of one of these names among `owners`."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
