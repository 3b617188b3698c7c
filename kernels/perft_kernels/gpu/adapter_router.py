"""`adapter_router` on a GPU. Contract: perft_kernels/adapter_router.py.

One launch for a batch of all variants: one program a token, which looks up its own adapter's rule and does what that says.
Nothing but tile sizes is fixed at compile time, and no size comes from the tables: M and k are read on the device, so
loading an adapter compiles nothing and leaves a captured graph valid. A token's sums run in one order, whoever is beside it.

What takes time is one load that waits for another: all of an adapter's rule is read at once, and of its gates what a row of
h meets is on its way before the first sum. A router's M gates are read in blocks of `BLOCK_M` rows; the chosen experts and the
softmax's denominator are carried from block to block, so M has no bound. Logits are compared as 64-bit keys (value, then the
smaller id), in which a NaN has its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.launch import options, take_turn

# As the columns and kinds of the contract.
_ALL, _EMBEDDED = tl.constexpr(0), tl.constexpr(2)
_KIND, _NUM_EXPERTS, _TOP_K, _NORM, _BASE_RANK, _FIRST_EXPERT, _COLUMNS = (tl.constexpr(i) for i in range(7))
NONE = tl.constexpr(-(2**63))  # less than every key
_LOW_BITS = tl.constexpr(2**32 - 1)
_SIGNED_BITS = tl.constexpr(2**31 - 1)


@triton.jit
def key(logit_M, m_M):  # type: ignore[no-untyped-def]
    """A number that orders by logit, then by the smaller id."""
    bits_M = logit_M.to(tl.int32, bitcast=True)
    ordered_M = bits_M ^ ((bits_M >> 31) & _SIGNED_BITS)
    return (ordered_M.to(tl.int64) << 32) | (m_M ^ _SIGNED_BITS).to(tl.int64)


@triton.jit
def logit_and_id(key_X):  # type: ignore[no-untyped-def]
    """What `key` was made of."""
    ordered_X = (key_X >> 32).to(tl.int32)
    bits_X = ordered_X ^ ((ordered_X >> 31) & _SIGNED_BITS)
    return bits_X.to(tl.float32, bitcast=True), (key_X & _LOW_BITS) ^ _SIGNED_BITS


@triton.jit
def _ranked(weights_K, K, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights in descending order, equal ones in their own."""
    k_K = tl.arange(0, BLOCK_K)
    ones_K = tl.load(weights_K + k_K, mask=k_K < K, other=float("-inf")).to(tl.float32)
    others_K = ones_K
    is_before_KK = (others_K[:, None] > ones_K[None, :]) | (
        (others_K[:, None] == ones_K[None, :]) & (k_K[:, None] < k_K[None, :])
    )
    rank_K = tl.sum(is_before_KK.to(tl.int32), axis=0)
    x_X = tl.arange(0, BLOCK_X)
    is_it_XK = (x_X[:, None] == rank_K[None, :]) & (k_K < K)[None, :]
    return tl.sum(tl.where(is_it_XK, ones_K[None, :], 0.0), axis=1)


@triton.jit(do_not_specialize=["K", "A", "width"], do_not_specialize_on_alignment=["gate_row_A"])
def _adapter_router(  # type: ignore[no-untyped-def]
    h_TD,
    base_ids_TK,
    base_weights_TK,
    adapter_T,
    gate_SD,
    rule_A6,
    gate_row_A,
    ids_TX,
    weights_TX,
    D,
    K,
    A,
    width,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T,)."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    x_X = tl.arange(0, BLOCK_X)
    local_X = tl.full([BLOCK_X], -1, dtype=tl.int64)
    weight_X = tl.zeros([BLOCK_X], dtype=tl.float32)
    num_experts = tl.zeros([], dtype=tl.int64)
    first_expert = tl.zeros([], dtype=tl.int64)
    a = tl.load(adapter_T + t)
    base_id_X = tl.load(base_ids_TK + t * K + x_X, mask=x_X < K, other=-1)
    base_weight_X = tl.load(base_weights_TK + t * K + x_X, mask=x_X < K, other=0.0)
    if (a >= 0) & (a < A):
        rule_A6 += a * _COLUMNS
        kind = tl.load(rule_A6 + _KIND)
        num_experts = tl.load(rule_A6 + _NUM_EXPERTS)
        first_expert = tl.load(rule_A6 + _FIRST_EXPERT)
        top_k = tl.minimum(tl.load(rule_A6 + _TOP_K), width).to(tl.int32)
        norm = tl.load(rule_A6 + _NORM)
        base_rank = tl.load(rule_A6 + _BASE_RANK)
        gate_row = tl.load(gate_row_A + a)
        if (kind != _ALL) & (kind != _EMBEDDED) & (gate_row >= 0):
            chosen_X = tl.full([BLOCK_X], NONE, dtype=tl.int64)
            largest = tl.full([], float("-inf"), dtype=tl.float32)
            total = tl.zeros([], dtype=tl.float32)
            for m0 in range(0, num_experts.to(tl.int32), BLOCK_M):
                m_M = m0 + tl.arange(0, BLOCK_M)
                is_gate_M = m_M < num_experts
                products_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
                # without num_stages only what tl.dot takes would be loaded ahead
                for d0 in tl.range(0, D, BLOCK_D, num_stages=5):
                    d_D = d0 + tl.arange(0, BLOCK_D)
                    h_D = tl.load(h_TD + t * D + d_D, mask=d_D < D, other=0.0).to(tl.float32)
                    gate_MD = tl.load(
                        gate_SD + (gate_row + m_M)[:, None] * D + d_D[None, :],
                        mask=is_gate_M[:, None] & (d_D < D)[None, :],
                        other=0.0,
                    )
                    products_MD += gate_MD.to(tl.float32) * h_D[None, :]
                logit_M = tl.where(is_gate_M, tl.sum(products_MD, axis=1), float("-inf"))
                now_largest = tl.maximum(largest, tl.max(logit_M, axis=0))
                total = total * tl.exp(largest - now_largest) + tl.sum(tl.exp(logit_M - now_largest), axis=0)
                largest = now_largest
                # the best so far against this block's, one after the other
                key_M = tl.where(is_gate_M, key(logit_M, m_M), NONE)
                left_X = chosen_X
                for q in range(top_k):
                    best = tl.maximum(tl.max(left_X, axis=0), tl.max(key_M, axis=0))
                    chosen_X = tl.where(x_X == q, best, chosen_X)
                    left_X = tl.where(left_X == best, NONE, left_X)
                    key_M = tl.where(key_M == best, NONE, key_M)
            logit_X, id_X = logit_and_id(chosen_X)
            local_X = tl.where(chosen_X != NONE, id_X, -1)
            if base_rank != 0:
                weight_X = _ranked(base_weights_TK + t * K, K, BLOCK_X, BLOCK_K)
            else:
                weight_X = tl.where(chosen_X != NONE, tl.exp(logit_X - largest) / total, 0.0)
                if norm != 0:
                    weight_X = weight_X / tl.sum(weight_X, axis=0)
        elif kind == _ALL:
            local_X = x_X.to(tl.int64)
            weight_X = tl.full([BLOCK_X], 1.0, dtype=tl.float32)
        elif kind == _EMBEDDED:
            local_X = base_id_X.to(tl.int64)
            weight_X = base_weight_X.to(tl.float32)
    is_valid_X = (local_X >= 0) & (local_X < num_experts)
    tl.store(ids_TX + t * width + x_X, tl.where(is_valid_X, first_expert + local_X, -1), mask=x_X < width)
    tl.store(weights_TX + t * width + x_X, tl.where(is_valid_X, weight_X, 0.0), mask=x_X < width)


def adapter_router(
    h_TD: Tensor,
    base_ids_TK: Tensor,
    base_weights_TK: Tensor,
    adapter_T: Tensor,
    gate_SD: Tensor,
    rule_A6: Tensor,
    gate_row_A: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """As `adapter_router_reference`."""
    num_tokens, hidden_size = h_TD.shape
    ids_TX = torch.empty(num_tokens, width, dtype=torch.int64, device=h_TD.device)
    weights_TX = torch.empty(num_tokens, width, dtype=torch.float32, device=h_TD.device)
    if ids_TX.numel() == 0:
        return ids_TX, weights_TX
    with gpu.on_device_of(h_TD):
        _adapter_router[(num_tokens,)](
            *(h_TD.contiguous(), base_ids_TK.contiguous(), base_weights_TK.contiguous(), adapter_T.contiguous()),
            *(gate_SD.contiguous(), rule_A6.contiguous(), gate_row_A.contiguous(), ids_TX, weights_TX),
            *(hidden_size, base_ids_TK.shape[1], rule_A6.shape[0], width),
            BLOCK_X=triton.next_power_of_2(width),
            BLOCK_K=triton.next_power_of_2(max(base_ids_TK.shape[1], 1)),
            BLOCK_M=16,
            BLOCK_D=min(512, triton.next_power_of_2(hidden_size)),
            num_warps=8,
            **options(),
        )
    return ids_TX, weights_TX
