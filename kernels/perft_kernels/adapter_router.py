"""`adapter_router`: which adapter experts each token of a mixed batch takes, and with what weights.

Contract
    For each token t with adapter a = adapter[t] (outside [0, A): base only, nothing is emitted) the rule of a's variant:

    | kind          | adapter experts                       | weights                                                    |
    |---------------|---------------------------------------|------------------------------------------------------------|
    | ALL (S, D)    | 0 .. M-1                              | 1                                                          |
    | ROUTED (R)    | top-k of softmax(gate_a @ h), float32 | own: those probabilities, divided by their sum if `norm`;  |
    |               |                                       | base rank: the base's q-th largest weight for the q-th one |
    | EMBEDDED (E)  | the base's ids                        | the base's weights                                         |

    | tensor           | shape  | dtype   | meaning                                                                 |
    |------------------|--------|---------|-------------------------------------------------------------------------|
    | h_TD             | [T, D] | float   | input of the MoE block                                                  |
    | base_ids_TK      | [T, K] | int     | the base router's choice                                                |
    | base_weights_TK  | [T, K] | float   | its weights, as the base uses them                                      |
    | adapter_T        | [T]    | int64   | adapter of each token                                                   |
    | gate_SD          | [S, D] | float   | pool that holds the gate rows                                           |
    | rule_A6          | [A, 6] | int64   | kind, M, k, norm, base rank, first adapter expert (columns `RULE_*`)    |
    | gate_row_A       | [A]    | int64   | first of the M gate rows in this layer; < 0: the layer is not adapted   |
    | width            | int    |         | X: at least the most pairs that any token of this batch has             |

    Out: ids_TX int64 (first adapter expert + local id; -1: none) and weights_TX float32 (0 where none). Every local id is
    checked against that adapter's own M. Sources: arXiv 2411.08212 equations 6 to 9; `base rank` is what the authors'
    released OLMoE code does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels._rows import block_scores
from perft_kernels.native import element_type, native

KIND_ALL, KIND_ROUTED, KIND_EMBEDDED = 0, 1, 2
RULE_KIND, RULE_NUM_EXPERTS, RULE_TOP_K, RULE_NORM, RULE_BASE_RANK, RULE_FIRST_EXPERT = range(6)
_RULE_CODE = (1, 1 << 4, 1 << 20, 1 << 2, 1 << 3, 0)  # factors that make one number of a rule's columns (M, k < 2^16)


def route(logits_TM: Tensor, top_k: int, *, norm: bool, base_weights_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rule of a router of an adapter's own. Differentiable: training uses it as it stands.

    Args:
        logits_TM: gate logits.
        top_k: adapter experts per token, at most M.
        norm: divide the chosen weights by their sum.
        base_weights_TK: if given, these combine instead, by rank position (K >= top_k).

    Returns:
        (local ids_Tk int64, weights_Tk float32), likeliest first.
    """
    probs_TM = torch.softmax(logits_TM.float(), dim=-1)
    weights_Tk, ids_Tk = torch.topk(probs_TM, top_k, dim=-1)
    if base_weights_TK is not None:
        return ids_Tk, base_weights_TK.float().sort(dim=-1, descending=True).values[:, :top_k]
    if norm:
        weights_Tk = weights_Tk / weights_Tk.sum(dim=-1, keepdim=True)
    return ids_Tk, weights_Tk


def adapter_router_reference(
    h_TD: Tensor,
    base_ids_TK: Tensor,
    base_weights_TK: Tensor,
    adapter_T: Tensor,
    gate_SD: Tensor,
    rule_A6: Tensor,
    gate_row_A: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The contract above in plain torch, without a loop over tokens: the specification."""
    num_tokens, num_adapters = h_TD.shape[0], rule_A6.shape[0]
    ids_TX = torch.full((num_tokens, width), -1, dtype=torch.int64, device=h_TD.device)
    weights_TX = torch.zeros(num_tokens, width, dtype=torch.float32, device=h_TD.device)
    has_adapter_T = (adapter_T >= 0) & (adapter_T < num_adapters)
    token_P = has_adapter_T.nonzero().squeeze(1)
    if token_P.numel() == 0:
        return ids_TX, weights_TX
    rule_P6 = rule_A6[adapter_T[token_P]]
    # adapters that follow one rule are taken together; the rule as one number is quicker to tell apart than as a row
    code_P = (rule_P6 * rule_P6.new_tensor(_RULE_CODE)).sum(1)
    _, group_P = torch.unique(code_P, return_inverse=True)
    num_groups = int(group_P.max()) + 1
    everyone_p = torch.arange(token_P.numel(), device=token_P.device)
    for group in range(num_groups):
        sel_p = (group_P == group).nonzero().squeeze(1) if num_groups > 1 else everyone_p
        token_p = token_P[sel_p]
        kind, num_experts, top_k, norm, base_rank, _ = rule_P6[sel_p[0]].tolist()
        if kind == KIND_ALL:
            local_px = torch.arange(num_experts, device=h_TD.device).expand(token_p.numel(), -1)
            weights_px = torch.ones_like(local_px, dtype=torch.float32)
        elif kind == KIND_EMBEDDED:
            local_px, weights_px = base_ids_TK[token_p].long(), base_weights_TK[token_p].float()
        else:
            gate_row_p = gate_row_A[adapter_T[token_p]]
            if int(gate_row_p.min()) < 0:
                adapted_p = gate_row_p >= 0
                sel_p, token_p, gate_row_p = sel_p[adapted_p], token_p[adapted_p], gate_row_p[adapted_p]
            if token_p.numel() == 0:
                continue
            logits_pM = block_scores(h_TD, token_p, gate_SD, gate_row_p, num_experts)
            local_px, weights_px = route(
                logits_pM,
                top_k,
                norm=bool(norm),
                base_weights_TK=base_weights_TK[token_p] if base_rank else None,
            )
        first_p = rule_P6[sel_p, RULE_FIRST_EXPERT].unsqueeze(1)
        valid_px = (local_px >= 0) & (local_px < num_experts)
        ids_TX[token_p, : local_px.shape[1]] = torch.where(valid_px, first_p + local_px, -1)
        weights_TX[token_p, : local_px.shape[1]] = torch.where(valid_px, weights_px, 0.0)
    return ids_TX, weights_TX


def _adapter_router(
    h_TD: Tensor,
    base_ids_TK: Tensor,
    base_weights_TK: Tensor,
    adapter_T: Tensor,
    gate_SD: Tensor,
    rule_A6: Tensor,
    gate_row_A: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    if gpu.takes(h_TD):
        from perft_kernels.gpu import adapter_router as on_gpu

        return on_gpu.adapter_router(h_TD, base_ids_TK, base_weights_TK, adapter_T, gate_SD, rule_A6, gate_row_A, width)
    kernels = native(h_TD, gate_SD)
    if kernels is None:
        return adapter_router_reference(
            h_TD, base_ids_TK, base_weights_TK, adapter_T, gate_SD, rule_A6, gate_row_A, width
        )
    num_tokens, hidden_size = h_TD.shape
    ids_TX = torch.empty(num_tokens, width, dtype=torch.int64)
    weights_TX = torch.empty(num_tokens, width, dtype=torch.float32)
    h_TD, gate_row_A = h_TD.contiguous(), gate_row_A.contiguous()
    base_ids_TK, base_weights_TK = base_ids_TK.long().contiguous(), base_weights_TK.float().contiguous()
    kernels(
        "perft_adapter_router",
        *(h_TD, element_type(h_TD), base_ids_TK, base_weights_TK, adapter_T, gate_SD, element_type(gate_SD)),
        *(rule_A6, gate_row_A, ids_TX, weights_TX),
        *(num_tokens, hidden_size, base_ids_TK.shape[1], rule_A6.shape[0], width),
    )
    return ids_TX, weights_TX


adapter_router = Op("adapter_router", _adapter_router)


@adapter_router.register_fake
def _(h_TD, base_ids_TK, base_weights_TK, adapter_T, gate_SD, rule_A6, gate_row_A, width):  # type: ignore[no-untyped-def]
    return h_TD.new_empty((h_TD.shape[0], width), dtype=torch.int64), h_TD.new_empty(
        (h_TD.shape[0], width), dtype=torch.float32
    )
