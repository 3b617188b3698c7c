"""The base's weights in the layout of the CPU kernels (`perft_kernels.linear`, `perft_kernels.moe_experts`).

In: a bfloat16 model on a CPU. Out: the same model, whose linear layers and experts hold panels instead of their weights,
whose routers and norms are one operation each, whose rotary embeddings are looked up, and whose head has its weight in
8 bits besides, for greedy decoding. Experts, routers and norms are
recognised by what they compute: a replacement is tried on random input beside the original, and what does not agree (another
activation, biases, another rule) stays as Transformers has it. It knows no family of models.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from perft.moe import MoeBlock
from perft_kernels.adapter_router import route
from perft_kernels.base_router import base_router
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import linear, to_panels
from perft_kernels.linear_argmax import coarsen, linear_argmax
from perft_kernels.moe_experts import expert_panels, moe_experts
from perft_kernels.native import library
from perft_kernels.rms_norm import rms_norm

logger = logging.getLogger(__name__)

# As relative error against the original; bfloat16 rounds the original's intermediate results at other places.
_TOLERANCE = 0.02
# A table of rotary embeddings for so many positions takes 16 to 64 MB; for more they are computed.
_MAX_POSITIONS = 1 << 17
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


class OneOpRouter(nn.Module):
    """A softmax router of the base: logits, weights and ids of each token's base experts."""

    def __init__(self, router: nn.Module, norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = router.weight
        self.top_k, self.num_experts = router.top_k, router.num_experts
        self._norm = norm
        self._dtype = dtype

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, weights, ids), as the routers of Transformers 5 return them."""
        h_TD = h.reshape(-1, h.shape[-1])
        logits_TN, weights_TK, ids_TK = base_router(h_TD, self.weight, int(self.top_k), self._norm)  # type: ignore[arg-type]
        return logits_TN, weights_TK.to(self._dtype), ids_TK


class OneOpNorm(nn.Module):
    """A root-mean-square norm."""

    def __init__(self, norm: nn.Module, epsilon: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        return rms_norm(x, self.weight, self._epsilon)  # type: ignore[arg-type]


class RotaryTable(nn.Module):
    """Rotary embeddings, looked up rather than computed: the original's own, for every position that there can be."""

    def __init__(self, cos_PC: Tensor, sin_PC: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos_PC, persistent=False)
        self.register_buffer("sin", sin_PC, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), `[1, T, C]` each, as the original."""
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)  # type: ignore[arg-type]


@torch.no_grad()
def pack(model: PreTrainedModel, blocks: Sequence[MoeBlock]) -> None:
    """Replace what the CPU kernels can compute, in place; does nothing to a model that they are not for."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or library() is None:
        return
    memory = HugePages()
    kept = [block.name for block in blocks if not _replace_experts(model, block, memory)]
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and _fits(module.weight) and module.out_features >= _MIN_ROWS:
            is_head = module is head and module.bias is None
            _set(model, name, (PanelHead if is_head else PanelLinear)(module, memory))
        elif (other := _one_op_norm(module) or _one_op_router(module) or _rotary_table(module, model)) is not None:
            _set(model, name, other)
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
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and _fits(gate_up) and _fits(down)):
        return False
    num_experts, hidden_size, inner_size = down.shape if down.dim() == 3 else (0, 0, 0)
    if gate_up.shape != (num_experts, 2 * inner_size, hidden_size) or hidden_size != block.hidden_size:
        return False
    packed = PanelExperts(experts, memory)
    weights_TK, ids_TK = torch.rand(8, num_experts, generator=torch.Generator().manual_seed(1)).topk(
        min(2, num_experts)
    )
    inputs = (_random(8, hidden_size), ids_TK, weights_TK.to(model.dtype))
    if not _agree(packed(*inputs), experts(*inputs)):
        return False
    _set(model, block.name, packed)
    return True


def _one_op_norm(module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(epsilon, float)
    if not is_norm or weight.dim() != 1 or not _fits(weight):  # type: ignore[union-attr, arg-type]
        return None
    one_op = OneOpNorm(module, epsilon)  # type: ignore[arg-type]
    x = _random(8, weight.shape[0])  # type: ignore[union-attr]
    return one_op if _agree(one_op(x), module(x)) else None


def _one_op_router(module: nn.Module) -> nn.Module | None:
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    is_router = type(module).__name__.endswith("TopKRouter") and isinstance(weight, Tensor) and isinstance(top_k, int)
    if not is_router or weight.dim() != 2 or not _fits(weight):  # type: ignore[union-attr, arg-type]
        return None
    if {name for name, _ in module.named_parameters()} != {"weight"} or list(module.buffers()):
        return None  # biases or corrections, which random weights may hide
    h_TD = _random(64, weight.shape[1])  # type: ignore[union-attr]
    wanted = module(h_TD)
    if not (isinstance(wanted, tuple) and len(wanted) == 3 and wanted[1].shape == (64, top_k)):
        return None
    logits_TN, weights_TK, ids_TK = wanted
    probs_TN = torch.softmax(logits_TN.float(), dim=-1)
    assert isinstance(top_k, int)
    for norm in (False, True):
        one_op = OneOpRouter(module, norm, weights_TK.dtype)
        # The rule is tried on the original's own logits: of two that are equal after rounding, either may be chosen
        _, rule_TK = route(logits_TN, top_k, norm=norm)
        follows_rule = _agree(weights_TK, rule_TK) and bool(
            (probs_TN.gather(1, ids_TK) == probs_TN.topk(top_k)[0]).all()
        )
        found = one_op(h_TD)
        if follows_rule and found[0].dtype == logits_TN.dtype and _agree(found[0], logits_TN):
            return one_op
    return None


def _rotary_table(module: nn.Module, model: PreTrainedModel) -> nn.Module | None:
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not type(module).__name__.endswith("RotaryEmbedding") or not isinstance(num_positions, int):
        return None
    takes_positions = [*inspect.signature(module.forward).parameters] == ["x", "position_ids"]
    if not takes_positions or num_positions > _MAX_POSITIONS:
        return None
    found = module(torch.zeros(1, 1, 1, dtype=model.dtype), torch.arange(num_positions).unsqueeze(0))
    if not (isinstance(found, tuple) and len(found) == 2):
        return None
    if not all(isinstance(t, Tensor) and t.dim() == 3 and t.dtype == model.dtype for t in found):
        return None
    return RotaryTable(found[0][0].contiguous(), found[1][0].contiguous())


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _agree(got: Tensor, want: Tensor) -> bool:
    return bool((got.float() - want.float()).norm() <= _TOLERANCE * want.float().norm())


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[-1] % 16 == 0


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
