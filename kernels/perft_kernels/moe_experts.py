"""`moe_experts`: the base experts of a MoE block on a CPU.

Contract
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
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
