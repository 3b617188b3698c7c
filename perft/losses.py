"""The load-balancing loss of an adapter's own router, over all its layers at once."""

from __future__ import annotations

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
