"""The router of a MoE block of the base, which many models compute in eight small operations: `base_router` on a CPU, whole;
`router_top_k` on a GPU, from the logits on.

Contract of `base_router`
    logits = h W^T, rounded to bfloat16;  p = softmax(logits) in float32;  the `top_k` largest of p, divided by their sum if
    `norm`.  W [N, D], h [T, D], both bfloat16. Out: logits [T, N] bfloat16, weights [T, K] float32, ids [T, K] int64,
    likeliest first; of equals the first.

Contract of `router_top_k`
    The same of given logits [T, N], floating: weights [T, K], rounded to a given dtype, and ids. A token does not depend on the
    others. The kernel is in `gpu/base_router.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import gpu
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


def router_top_k_reference(logits_TN: Tensor, top_k: int, norm: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The contract above in plain torch."""
    ids_TK, weights_TK = route(logits_TN, top_k, norm=norm)
    return weights_TK.to(dtype), ids_TK


def _router_top_k(logits_TN: Tensor, top_k: int, norm: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not gpu.takes(logits_TN):
        return router_top_k_reference(logits_TN, top_k, norm, dtype)
    from perft_kernels.gpu.base_router import router_top_k as kernel  # Triton is there on GPUs only

    return kernel(logits_TN if logits_TN.stride(1) == 1 else logits_TN.contiguous(), top_k, norm, dtype)


router_top_k = Op("router_top_k", _router_top_k)


@router_top_k.register_fake
def _(logits_TN, top_k, norm, dtype):  # type: ignore[no-untyped-def]
    shape = (logits_TN.shape[0], top_k)
    return logits_TN.new_empty(shape, dtype=dtype), logits_TN.new_empty(shape, dtype=torch.int64)
