"""The base experts of a MoE block: `moe_experts` with the weights as the CPU kernels want them, `stored_experts` with the
weights as Transformers stores them, for GPUs.

Contract of `moe_experts`
    y[t] = sum over k of  weights[t, k] * W_down[e] ( silu(W_gate[e] h[t]) * (W_up[e] h[t]) ),     e = ids[t, k]

    | tensor      | shape                         | dtype    | meaning                                            |
    |-------------|-------------------------------|----------|----------------------------------------------------|
    | h_TD        | [T, D]                        | bfloat16 | input of the MoE block; y has its shape and dtype  |
    | ids_TK      | [T, K]                        | int64    | base experts; outside [0, N): no contribution      |
    | weights_TK  | [T, K]                        | float    | combine weights                                    |
    | gate_up     | [N, 2, ceil(I/32), D/2, 32, 2]| bfloat16 | panels (`perft_kernels.linear`) of gate and up     |
    | down        | [N, ceil(D/32), I/2, 32, 2]   | bfloat16 | panels of down                                     |

    Sums are in float32; activations are rounded to bfloat16 between the two products. Only the chosen experts' weights are
    read, each once for up to 12 of its tokens. A token's result does not depend on the other tokens: its own pairs are summed
    in the order of its own choices.

Contract of `stored_experts`
    y[t] = sum over k of  weights[t, k] * (W_down[e] a + b_down[e]),     e = ids[t, k]
        (g, u) = W_gate[e] h[t] + b_gate[e],  W_up[e] h[t] + b_up[e]
        a = silu(g) * u,    or with a limit (gpt-oss)  a = (clamp(u) + 1) * g' * sigmoid(alpha * g'),  g' = min(g, limit)

    | tensor       | shape                       | meaning                                                     |
    |--------------|-----------------------------|-------------------------------------------------------------|
    | h_TD         | [T, D]                      | input of the MoE block; y has its shape and dtype           |
    | ids_TK       | [T, K] int64                | base experts; outside [0, N): no contribution               |
    | weights_TK   | [T, K] floating             | combine weights                                             |
    | gate_up      | [N, 2 I, D] or [N, D, 2 I]  | gate and up: one after the other, or `interleaved` in turns |
    | down         | [N, D, I] or [N, I, D]      | the second of each is `transposed`                          |
    | gate_up_bias | [N, 2 I] or none            | as gate_up                                                  |
    | down_bias    | [N, D] or none              |                                                             |

    Weights and biases have the dtype of h. Sums are in float32; `a` is rounded to the dtype of h. The kernels are in
    `gpu/moe_experts.py`. A token's result does not depend on the other tokens, but may on whether they are many; not so, and
    many are slower, if `batch_invariant`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels.huge_pages import HugePages
from perft_kernels.linear import from_panels, to_panels
from perft_kernels.native import native


def expert_panels(gate_up_NID: Tensor, down_NDI: Tensor, memory: HugePages) -> tuple[Tensor, Tensor]:
    """The op's weights from Transformers' `gate_up_proj` `[N, 2 I, D]` (gate first) and `down_proj` `[N, D, I]`; even D, I."""
    return to_panels(gate_up_NID.unflatten(1, (2, -1)), memory), to_panels(down_NDI, memory)


def moe_experts_reference(h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The contract above in plain torch, one base expert after the other."""
    num_experts, inner = gate_up.shape[0], down.shape[2] * 2
    y_TD = torch.zeros(h_TD.shape, dtype=torch.float32, device=h_TD.device)
    for expert in range(num_experts):
        token_P, slot_P = (ids_TK == expert).nonzero(as_tuple=True)
        if token_P.numel() == 0:
            continue
        gate_ID, up_ID = from_panels(gate_up[expert], inner).float()
        h_PD = h_TD[token_P].float()
        a_PI = (F.silu(h_PD @ gate_ID.T) * (h_PD @ up_ID.T)).to(h_TD.dtype).float()
        out_PD = a_PI @ from_panels(down[expert], h_TD.shape[1]).float().T
        y_TD.index_add_(0, token_P, out_PD * weights_TK[token_P, slot_P, None].float())
    return y_TD.to(h_TD.dtype)


def _moe_experts(h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    kernels = native(h_TD)
    if kernels is None or h_TD.dtype != torch.bfloat16:
        return moe_experts_reference(h_TD, ids_TK, weights_TK, gate_up, down)
    (num_tokens, hidden_size), top_k = h_TD.shape, ids_TK.shape[1]
    h_TD, ids_TK, weights_TK = h_TD.contiguous(), ids_TK.long().contiguous(), weights_TK.float().contiguous()
    y_TD = torch.empty_like(h_TD)
    sizes = (num_tokens, hidden_size, gate_up.shape[0], down.shape[2] * 2, top_k)
    kernels("perft_moe_experts", h_TD, ids_TK, weights_TK, gate_up, down, y_TD, *sizes)
    return y_TD


moe_experts = Op("moe_experts", _moe_experts)


@moe_experts.register_fake
def _(h_TD, *_args):  # type: ignore[no-untyped-def]
    return torch.empty_like(h_TD)


def stored_experts_reference(
    h_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    """The contract above in plain torch, one base expert after the other."""
    y_TD = torch.zeros(h_TD.shape, dtype=torch.float32, device=h_TD.device)
    for expert in range(down.shape[0]):
        token_P, slot_P = (ids_TK == expert).nonzero(as_tuple=True)
        if token_P.numel() == 0:
            continue
        gate_up_OD, down_DI = gate_up[expert].float(), down[expert].float()
        if transposed:
            gate_up_OD, down_DI = gate_up_OD.T, down_DI.T
        both_PO = h_TD[token_P].float() @ gate_up_OD.T
        if gate_up_bias is not None:
            both_PO = both_PO + gate_up_bias[expert].float()
        gate_PI, up_PI = (both_PO[:, ::2], both_PO[:, 1::2]) if interleaved else both_PO.chunk(2, dim=1)
        if limit > 0:
            gate_PI, up_PI = gate_PI.clamp(max=limit), up_PI.clamp(-limit, limit)
            a_PI = (up_PI + 1) * gate_PI * torch.sigmoid(alpha * gate_PI)
        else:
            a_PI = F.silu(gate_PI) * up_PI
        out_PD = a_PI.to(h_TD.dtype).float() @ down_DI.T
        if down_bias is not None:
            out_PD = out_PD + down_bias[expert].float()
        y_TD.index_add_(0, token_P, out_PD * weights_TK[token_P, slot_P, None].float())
    return y_TD.to(h_TD.dtype)


def _stored_experts(
    h_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    batch_invariant: bool = False,
) -> Tensor:
    arguments = (ids_TK, weights_TK, gate_up, down, gate_up_bias, down_bias, transposed, interleaved, alpha, limit)
    if not gpu.takes(h_TD, gate_up, down):
        return stored_experts_reference(h_TD, *arguments)
    from perft_kernels.gpu.moe_experts import stored_experts as kernels  # Triton is there on GPUs only

    return kernels(h_TD if h_TD.stride(1) == 1 else h_TD.contiguous(), *arguments, batch_invariant)


# (..., transposed, interleaved, alpha, limit, batch_invariant): how the weights are stored; a limit of 0 is none.
stored_experts = Op("stored_experts", _stored_experts)


@stored_experts.register_fake
def _(h_TD, *_args):  # type: ignore[no-untyped-def]
    return h_TD.new_empty(h_TD.shape)
