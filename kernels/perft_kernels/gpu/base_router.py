"""`router_top_k` in Triton: one launch, one program a token. In: what its contract says. Out: the same.

A token's N probabilities are in registers whole; logits are compared as `gpu/adapter_router.py` does, by value and then by the
smaller id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.adapter_router import NONE, key, logit_and_id
from perft_kernels.gpu.launch import options, take_turn


@triton.jit
def _router_top_k(  # type: ignore[no-untyped-def]
    logits_TN, ids_TK, weights_TK, stride, N, K: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    n_N, k_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    logit_N = tl.load(logits_TN + t * stride + n_N, mask=n_N < N, other=float("-inf")).to(tl.float32)
    largest = tl.max(logit_N, axis=0)
    total = tl.sum(tl.exp(logit_N - largest), axis=0)
    key_N = tl.where(n_N < N, key(logit_N, n_N), NONE)
    chosen_K = tl.full([BLOCK_K], NONE, dtype=tl.int64)
    for k in range(K):
        best = tl.max(key_N, axis=0)
        chosen_K = tl.where(k_K == k, best, chosen_K)
        key_N = tl.where(key_N == best, NONE, key_N)
    logit_K, id_K = logit_and_id(chosen_K)
    weight_K = tl.where(k_K < K, tl.exp(logit_K - largest) / total, 0.0)
    if NORM:
        weight_K = weight_K / tl.sum(weight_K, axis=0)
    tl.store(ids_TK + t * K + k_K, id_K, mask=k_K < K)
    tl.store(weights_TK + t * K + k_K, weight_K.to(weights_TK.dtype.element_ty), mask=k_K < K)


def router_top_k(logits_TN: Tensor, top_k: int, norm: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `router_top_k_reference`; the last axis of the logits lies in one piece."""
    num_tokens, num_experts = logits_TN.shape
    weights_TK = torch.empty(num_tokens, top_k, dtype=dtype, device=logits_TN.device)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TN.device)
    if num_tokens:
        with gpu.on_device_of(logits_TN):
            _router_top_k[(num_tokens,)](
                *(logits_TN, ids_TK, weights_TK, logits_TN.stride(0), num_experts),
                K=top_k,
                NORM=norm,
                BLOCK_N=triton.next_power_of_2(num_experts),
                BLOCK_K=triton.next_power_of_2(top_k),
                num_warps=1 if num_experts <= 128 else 4,
                **options(),
            )
    return weights_TK, ids_TK
