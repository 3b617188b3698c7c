"""The base experts of a model on a GPU: `perft_kernels.moe_experts.stored_experts` as an experts implementation of
Transformers, under the name `perft`.

In: a model whose experts modules go through Transformers' experts interface. Out: the same model, whose experts are ours
where an experts module computes what our op computes, which is found out by trying its activation, and Transformers'
`grouped_mm` elsewhere. It knows no family of models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from perft.moe import MoeBlock
from perft_kernels import gpu
from perft_kernels.moe_experts import stored_experts

logger = logging.getLogger(__name__)

EXPERTS = "perft"
# From more tokens on `grouped_mm` is the faster. No GPU has measured it yet (bench/gpu/README.md): until then ours run at
# all sizes, so that a prefill does not depend on how many tokens the step has beside it.
MAX_TOKENS: int | None = None
# As relative error against the original activation, which rounds its intermediate results.
_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How an experts module stores its weights, what its activation is, and how it is to be computed; see `stored_experts`."""

    transposed: bool
    interleaved: bool
    alpha: float
    limit: float
    batch_invariant: bool = False


def runs_ours(form: Form, num_tokens: int) -> bool:
    """Whether our kernels run rather than `grouped_mm`."""
    return form.batch_invariant or MAX_TOKENS is None or num_tokens <= MAX_TOKENS


@torch.no_grad()
def use_kernels(model: PreTrainedModel, blocks: Sequence[MoeBlock], *, batch_invariant: bool = False) -> None:
    """Let our kernels compute the base experts of `model`, where they can; does nothing to one that is not on a GPU.

    Args:
        batch_invariant: in the same arithmetic for any number of tokens, which is slower where they are many.
    """
    found = {block.name: form_of(model.get_submodule(block.name)) for block in blocks}
    found = {name: form and replace(form, batch_invariant=batch_invariant) for name, form in found.items()}
    if not any(found.values()):
        return
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
    for name, form in found.items():
        model.get_submodule(name).perft_form = form  # type: ignore[assignment]
    model.set_experts_implementation(EXPERTS)
    others = [name for name, form in found.items() if form is None]
    if others:
        logger.info("base experts that run as Transformers has them: %s", ", ".join(others))


def form_of(experts: nn.Module) -> Form | None:
    """The form of an experts module that our op can compute; `None` for others."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gpu.takes(gate_up, down)):
        return None
    if gate_up.dim() != 3 or gate_up.dtype != down.dtype or not gate_up.is_floating_point():
        return None
    settings = {name: getattr(experts, name, None) for name in ("is_transposed", "has_bias", "has_gate")}
    if None in settings.values() or not settings["has_gate"] or getattr(experts, "has_post_expert_norm", False):
        return None
    transposed = bool(settings["is_transposed"])
    num_experts, inner_size, hidden_size = (down if transposed else down.mT).shape
    if (gate_up if transposed else gate_up.mT).shape != (num_experts, hidden_size, 2 * inner_size):
        return None
    generator = torch.Generator().manual_seed(0)
    # from where activations are nearly linear to past any limit: each row has to agree by itself
    scale_P1 = torch.logspace(-1, 1.5, 64).unsqueeze(1)
    both = (torch.randn(64, 2 * inner_size, generator=generator) * scale_P1).to(gate_up)
    wanted = experts._apply_gate(both)  # type: ignore[operator]
    alpha, limit = (getattr(experts, name, None) for name in ("alpha", "limit"))
    rules = [(1.0, 0.0)]
    if isinstance(alpha, float) and isinstance(limit, float) and limit > 0:
        rules.append((alpha, limit))
    for interleaved in (False, True):
        for rule in rules:
            got = _activation(both.float(), interleaved, *rule)
            if got.shape == wanted.shape and bool(
                ((got - wanted.float()).norm(dim=1) <= _TOLERANCE * got.norm(dim=1)).all()
            ):
                return Form(transposed=transposed, interleaved=interleaved, alpha=rule[0], limit=rule[1])
    return None


def _activation(both_PO: Tensor, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """The activation of `stored_experts`, for comparison."""
    gate, up = (both_PO[:, ::2], both_PO[:, 1::2]) if interleaved else both_PO.chunk(2, dim=1)
    if limit == 0:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Transformers' experts call."""
    form: Form | None = getattr(self, "perft_form", None)
    if form is None or hidden_states.dtype != self.down_proj.dtype or not runs_ours(form, hidden_states.shape[0]):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    return stored_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        self.gate_up_proj_bias if self.has_bias else None,
        self.down_proj_bias if self.has_bias else None,
        form.transposed,
        form.interleaved,
        form.alpha,
        form.limit,
        form.batch_invariant,
    )
