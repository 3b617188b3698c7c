"""The base's weights in the layout of the CPU kernels (`perft_kernels.linear`, `perft_kernels.moe_experts`).

In: a bfloat16 model on a CPU. Out: the same model, whose linear layers and experts hold panels instead of their weights,
whose routers and norms are one operation each, whose rotary embeddings are looked up (`fewer_ops.py`), and whose head has its
weight in 8 bits besides, for greedy decoding. Experts are
recognised by what they compute: panels are tried on random input beside the original, and what does not agree (another
activation, biases) stays as Transformers has it. It knows no family of models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perft.moe import MoeBlock
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import linear, to_panels
from perft_kernels.linear_argmax import coarsen, linear_argmax
from perft_kernels.moe_experts import expert_panels, moe_experts
from perft_kernels.native import library
from perft_serve.engine.fewer_ops import agree, fewer_ops, fits, random_for

logger = logging.getLogger(__name__)

# Below so many rows a panel of 32 is mostly padding.
_MIN_ROWS = 16


class PanelLinear(nn.Module):
    """An `nn.Linear` whose weight is panels."""

    def __init__(self, layer: nn.Linear, memory: HugePages) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.register_buffer("panels", to_panels(layer.weight.detach(), memory), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        y = linear(x.reshape(-1, self.in_features), self.panels, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)


class PanelHead(PanelLinear):
    """The linear layer that logits come from; it can tell the largest without computing the others."""

    def __init__(self, layer: nn.Linear, memory: HugePages) -> None:
        super().__init__(layer, memory)
        coarse = coarsen(layer.weight.detach(), memory)
        self.register_buffer("q", coarse.q, persistent=False)
        self.register_buffer("bounds", coarse.bounds, persistent=False)

    def argmax(self, x_TK: Tensor) -> Tensor:
        """Of each row of what `forward` would return, `[T]`; -1 if it holds a NaN."""
        return linear_argmax(x_TK, self.panels, self.q, self.bounds, self.out_features)


class PanelExperts(nn.Module):
    """An experts module whose weights are panels; other settings that the model may read are its own copies."""

    def __init__(self, experts: nn.Module, memory: HugePages) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        gate_up, down = expert_panels(experts.gate_up_proj.detach(), experts.down_proj.detach(), memory)  # type: ignore[operator]
        self.register_buffer("gate_up", gate_up, persistent=False)
        self.register_buffer("down", down, persistent=False)

    def forward(self, h_TD: Tensor, base_ids_TK: Tensor, base_weights_TK: Tensor) -> Tensor:
        """As the experts call of every MoE model of Transformers 5."""
        return moe_experts(h_TD, base_ids_TK, base_weights_TK, self.gate_up, self.down)


@torch.no_grad()
def pack(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> None:
    """Replace what the CPU kernels can compute, in place; does nothing to a model that they are not for."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or library() is None:
        return
    memory = HugePages()
    kept = [block.name for block in blocks if not _replace_experts(model, block, memory)]
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and fits(module.weight) and module.out_features >= _MIN_ROWS:
            is_head = module is head and module.bias is None
            model.set_submodule(name, (PanelHead if is_head else PanelLinear)(module, memory))
        elif (other := fewer_ops(module, model)) is not None:
            model.set_submodule(name, other)
    if kept:
        logger.info("base experts that run as Transformers has them: %s", ", ".join(kept))


def greedy_head(model: PreTrainedModel, **inputs: object) -> PanelHead | None:
    """The head, if logits are what it says of the last hidden state and nothing else, which is tried on `inputs`."""
    head = model.get_output_embeddings()
    if not isinstance(head, PanelHead):
        return None
    hidden = model.base_model(**inputs).last_hidden_state
    return head if torch.equal(head(hidden), model(**inputs).logits) else None


def _replace_experts(model: PreTrainedModel, block: MoeBlock, memory: HugePages) -> bool:
    experts = model.get_submodule(block.name)
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and fits(gate_up) and fits(down)):
        return False
    num_experts, hidden_size, inner_size = down.shape if down.dim() == 3 else (0, 0, 0)
    if gate_up.shape != (num_experts, 2 * inner_size, hidden_size) or hidden_size != block.hidden_size:
        return False
    packed = PanelExperts(experts, memory)
    weights_TK, ids_TK = torch.rand(8, num_experts, generator=torch.Generator().manual_seed(1)).topk(
        min(2, num_experts)
    )
    inputs = (random_for(down, 8, hidden_size), ids_TK, weights_TK.to(model.dtype))
    if not agree(packed(*inputs), experts(*inputs)):
        return False
    model.set_submodule(block.name, packed)
    return True
