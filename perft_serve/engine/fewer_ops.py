"""Modules of the base that are one or two operations of ours instead of many: norms, routers, rotary embeddings.

In: a module of a model on a CPU or a GPU. Out: what takes its place, or `None`. Norms and routers are recognised by what they
compute: a replacement is tried on random input beside the original, and what does not agree (another rule) stays as
Transformers has it. It knows no family of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from perft_kernels import gpu
from perft_kernels.adapter_router import route
from perft_kernels.base_router import base_router, router_top_k
from perft_kernels.linear import stored_linear
from perft_kernels.rms_norm import rms_norm

# As relative error against the original; 16-bit dtypes round the original's intermediate results at other places.
TOLERANCE = 0.02
# A table of rotary embeddings for so many positions takes 16 to 64 MB; for more they are computed.
_MAX_POSITIONS = 1 << 17


class OneOpRouter(nn.Module):
    """A softmax router of the base on a CPU: logits, weights and ids of each token's base experts."""

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


class TwoOpRouter(OneOpRouter):
    """The same on a GPU.

    Args:
        batch_invariant: the logits' bits depend on no other token; see `StoredLinear`.
    """

    def __init__(self, router: nn.Module, norm: bool, dtype: torch.dtype, batch_invariant: bool) -> None:
        super().__init__(router, norm, dtype)
        self.bias = getattr(router, "bias", None)
        self._linear: Callable[..., Tensor] = stored_linear if batch_invariant else F.linear

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, weights, ids), as the routers of Transformers 5 return them."""
        logits_TN = self._linear(h.reshape(-1, h.shape[-1]), self.weight, self.bias)
        weights_TK, ids_TK = router_top_k(logits_TN, int(self.top_k), self._norm, self._dtype)  # type: ignore[arg-type]
        return logits_TN, weights_TK, ids_TK


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
def fewer_ops(module: nn.Module, model: PreTrainedModel, *, batch_invariant: bool = False) -> nn.Module | None:
    """What takes the place of a norm, a router or rotary embeddings of `model`; `None` for all else."""
    return _norm(module) or _router(module, batch_invariant) or _rotary_table(module, model)


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    return bool((got.float() - want.float()).norm() <= TOLERANCE * want.float().norm())


def random_for(weight: Tensor, *shape: int) -> Tensor:
    """Random input for what has this weight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)


def fits(weight: Tensor) -> bool:
    """Whether there are kernels for a weight like this."""
    on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[-1] % 16 == 0
    return on_cpu or (gpu.takes(weight) and weight.is_floating_point())


def _norm(module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(epsilon, float)
    if not is_norm or weight.dim() != 1 or not fits(weight):  # type: ignore[union-attr, arg-type]
        return None
    assert isinstance(weight, Tensor)
    one_op = OneOpNorm(module, epsilon)  # type: ignore[arg-type]
    x = random_for(weight, 8, weight.shape[0])
    return one_op if agree(one_op(x), module(x)) else None


def _router(module: nn.Module, batch_invariant: bool) -> nn.Module | None:
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    is_router = type(module).__name__.endswith("TopKRouter") and isinstance(weight, Tensor) and isinstance(top_k, int)
    if not is_router or weight.dim() != 2 or not fits(weight):  # type: ignore[union-attr, arg-type]
        return None
    assert isinstance(weight, Tensor)
    assert isinstance(top_k, int)
    on_gpu = gpu.takes(weight)
    known = {"weight", "bias"} if on_gpu else {"weight"}
    if {name for name, _ in module.named_parameters()} - known or list(module.buffers()):
        return None  # corrections, which random weights may hide
    h_TD = random_for(weight, 64, weight.shape[1])
    wanted = module(h_TD)
    if not (isinstance(wanted, tuple) and len(wanted) == 3 and wanted[1].shape == (64, top_k)):
        return None
    logits_TN, weights_TK, ids_TK = wanted
    probs_TN = torch.softmax(logits_TN.float(), dim=-1)
    for norm in (False, True):
        dtype = weights_TK.dtype
        ours = TwoOpRouter(module, norm, dtype, batch_invariant) if on_gpu else OneOpRouter(module, norm, dtype)
        # The rule is tried on the original's own logits: of two that are equal after rounding, either may be chosen
        _, rule_TK = route(logits_TN, top_k, norm=norm)
        follows_rule = agree(weights_TK, rule_TK) and bool(
            (probs_TN.gather(1, ids_TK) == probs_TN.topk(top_k)[0]).all()
        )
        found = ours(h_TD)
        if follows_rule and found[0].dtype == logits_TN.dtype and agree(found[0], logits_TN):
            return ours
    return None


def _rotary_table(module: nn.Module, model: PreTrainedModel) -> nn.Module | None:
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not type(module).__name__.endswith("RotaryEmbedding") or not isinstance(num_positions, int):
        return None
    takes_positions = [*inspect.signature(module.forward).parameters] == ["x", "position_ids"]
    if not takes_positions or num_positions > _MAX_POSITIONS:
        return None
    positions = torch.arange(num_positions, device=model.device).unsqueeze(0)
    found = module(torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device), positions)
    if not (isinstance(found, tuple) and len(found) == 2):
        return None
    if not all(isinstance(t, Tensor) and t.dim() == 3 and t.dtype == model.dtype for t in found):
        return None
    return RotaryTable(found[0][0].contiguous(), found[1][0].contiguous())
