"""`base_router`: the router of a MoE block of the base, on a CPU: what many models compute in eight small operations.

Contract
    logits = h W^T, rounded to bfloat16;  p = softmax(logits) in float32;  the `top_k` largest of p, divided by their sum if
    `norm`.  W [N, D], h [T, D], both bfloat16. Out: logits [T, N] bfloat16, weights [T, K] float32, ids [T, K] int64,
    likeliest first; of equals the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels._op import Op
from perft_kernels.adapter_router import route
from perft_kernels.native import native


def base_router_reference(h_TD: Tensor, weight_ND: Tensor, top_k: int, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The contract above in plain torch."""
    logits_TN = F.linear(h_TD, weight_ND)
    ids_TK, weights_TK = route(logits_TN, top_k, norm=norm)
    return logits_TN, weights_TK, ids_TK


def _base_router(h_TD: Tensor, weight_ND: Tensor, top_k: int, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native(h_TD, weight_ND)
    if kernels is None or not h_TD.dtype == weight_ND.dtype == torch.bfloat16:
        return base_router_reference(h_TD, weight_ND, top_k, norm)
    (num_tokens, hidden_size), num_experts = h_TD.shape, weight_ND.shape[0]
    logits_TN = h_TD.new_empty(num_tokens, num_experts)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
    tensors = (h_TD.contiguous(), weight_ND, logits_TN, weights_TK, ids_TK)
    kernels("perft_base_router", *tensors, num_tokens, hidden_size, num_experts, top_k, norm)
    return logits_TN, weights_TK, ids_TK


base_router = Op("base_router", _base_router)


@base_router.register_fake
def _(h_TD, weight_ND, top_k, norm):  # type: ignore[no-untyped-def]
    shape = (h_TD.shape[0], top_k)
    ids_TK = h_TD.new_empty(shape, dtype=torch.int64)
    return h_TD.new_empty(h_TD.shape[0], weight_ND.shape[0]), h_TD.new_empty(shape, dtype=torch.float32), ids_TK
