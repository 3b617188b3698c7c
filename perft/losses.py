"""An adapter's own router over all its layers at once: the load-balancing loss, and how healthy the router is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def router_load_balancing_loss(logits_TM: Sequence[Tensor], top_k: int, mask_T: Tensor | None = None) -> Tensor:
    """M * sum over adapter experts e of (share of the choices that fell on e) * (mean probability of e).

    Switch Transformers (arXiv 2101.03961) equations 4 to 6, summed over the top-k and averaged over all layers' tokens, as
    Transformers does for base routers and the PERFT authors for theirs. A perfectly balanced router gives `top_k`.

    Args:
        logits_TM: gate logits of each layer, all `[T, M]`.
        top_k: adapter experts per token.
        mask_T: true where a token is real; padding does not count. At least one must be.

    Returns:
        A scalar in float32. Gradients flow through the probabilities only.
    """
    num_experts = logits_TM[0].shape[-1]
    chosen_M = torch.zeros(num_experts, dtype=torch.float32, device=logits_TM[0].device)
    probs_M = torch.zeros_like(chosen_M)
    for layer_TM in logits_TM:
        probs_TM = torch.softmax(layer_TM.float(), dim=-1)
        ids_Tk = torch.topk(probs_TM.detach(), top_k, dim=-1).indices
        picked_TM = torch.zeros_like(probs_TM).scatter_(1, ids_Tk, 1.0)
        if mask_T is not None:
            weight_T1 = mask_T.to(probs_TM).unsqueeze(1)
            probs_TM, picked_TM = probs_TM * weight_T1, picked_TM * weight_T1
        chosen_M = chosen_M + picked_TM.sum(0)
        probs_M = probs_M + probs_TM.sum(0)
    tokens = logits_TM[0].shape[0] if mask_T is None else mask_T.sum()
    total = len(logits_TM) * tokens
    return num_experts * ((chosen_M / total) * (probs_M / total)).sum()


class RouterHealth:
    """What an adapter's router did since it was last asked. Sums stay on the device until then."""

    def __init__(self) -> None:
        self._chosen_LM: Tensor | None = None
        self._entropy: Tensor | None = None
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def add(self, logits_TM: Sequence[Tensor], top_k: int, mask_T: Tensor | None = None) -> None:
        """Counts one forward pass: gate logits of each layer, as in `router_load_balancing_loss`."""
        chosen, entropy = [], torch.zeros((), device=logits_TM[0].device)
        real_T = torch.ones_like(logits_TM[0][:, 0], dtype=torch.float32) if mask_T is None else mask_T.float()
        for layer_TM in logits_TM:
            log_TM = torch.log_softmax(layer_TM.float(), dim=-1)
            picked_TM = torch.zeros_like(log_TM).scatter_(1, log_TM.topk(top_k, dim=-1).indices, 1.0)
            chosen.append((picked_TM * real_T.unsqueeze(1)).sum(0))
            entropy = entropy - ((log_TM.exp() * log_TM).sum(-1) * real_T).sum() / len(logits_TM)
        chosen_LM = torch.stack(chosen)
        self._chosen_LM = chosen_LM if self._chosen_LM is None else self._chosen_LM + chosen_LM
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self._tokens = real_T.sum() if self._tokens is None else self._tokens + real_T.sum()

    def take(self) -> dict[str, float]:
        """The measures, and starts anew; empty if there was nothing.

        router_entropy: mean entropy of the router's probabilities as a share of the most it can be (1: it prefers nobody).
        router_peak_load: the busiest adapter expert's choices over the mean, averaged over layers (1: balanced).
        router_dead: adapter experts, of all layers, that no token chose.
        """
        if self._chosen_LM is None or self._entropy is None or self._tokens is None:
            return {}
        chosen_LM, num_experts = self._chosen_LM, self._chosen_LM.shape[1]
        mean_entropy = float(self._entropy / self._tokens)
        measures = {
            "router_entropy": mean_entropy / math.log(num_experts) if num_experts > 1 else 1.0,
            "router_peak_load": float((chosen_LM.amax(1) / chosen_LM.mean(1)).mean()),
            "router_dead": float((chosen_LM == 0).sum()),
        }
        self._chosen_LM = self._entropy = self._tokens = None
        return measures
