"""`rotary_kv_write`: what stands between an attention's projections and the attention itself, in one operation: the norms of
queries and keys, if there are any, rotary embeddings, and storing the new keys and values.

Contract
    q' = rotate(norm(q, q_weight)),   k' = rotate(norm(k, k_weight))
        norm(x, w) = rms_norm (`perft_kernels.rms_norm`): with w [C], of each head by itself; with w [heads * C], of a token's
        heads together; without a weight, x itself
        rotate(x) = x * cos + (-x2, x1) * sin,    x = (x1, x2), the halves of a head
    row `slot_T[t]` of the pages, seen as [P * page, G, C]:  k'[t] and v[t]
    out: q' [T, H, C]

    | tensor   | shape            | meaning                                                  |
    |----------|------------------|----------------------------------------------------------|
    | q_THC    | [T, H, C]        | what the projections gave; C is even                     |
    | k_TGC    | [T, G, C]        |                                                          |
    | v_TGC    | [T, G, Cv]       |                                                          |
    | cos_TC   | [T, C]           | of each token's position, or [T, C / 2], for both halves |
    |          |                  | the same; sin_TC likewise                                |
    | q_weight | [C], [H C], none | k_weight likewise: [C], [G C] or none                    |
    | k_pages  | [P, page, G, C]  | v_pages [P, page, G, Cv]                                 |
    | slot_T   | [T] int64        | where each token's row is                                |

    All of one dtype, to which every operation's result is rounded, as if they came one after the other: so it gives what the
    separate operations of a model give. A token does not depend on the others. The kernel is in `gpu/rotary.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels.paged_attention import kv_write
from perft_kernels.rms_norm import rms_norm_reference


def rotate(x_TXC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotary embedding of heads."""
    first, second = x_TXC.chunk(2, dim=-1)
    cos_TC, sin_TC = (t if t.shape[1] == x_TXC.shape[2] else t.repeat(1, 2) for t in (cos_TC, sin_TC))
    return x_TXC * cos_TC.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin_TC.unsqueeze(1)


def _norm(x_TXC: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    if weight is None:
        return x_TXC
    if weight.shape[0] == x_TXC.shape[2]:
        return rms_norm_reference(x_TXC, weight, epsilon)
    return rms_norm_reference(x_TXC.flatten(1), weight, epsilon).view(x_TXC.shape)


def _rotary_kv_write(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_epsilon: float,
    k_epsilon: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_T: Tensor,
) -> Tensor:
    if gpu.takes(q_THC, k_TGC, v_TGC, k_pages):
        from perft_kernels.gpu.rotary import rotary_kv_write as kernel  # Triton is there on GPUs only

        return kernel(
            *(q_THC, k_TGC, v_TGC, cos_TC, sin_TC, q_weight, k_weight, q_epsilon, k_epsilon),
            *(k_pages, v_pages, slot_T),
        )
    k_TGC = rotate(_norm(k_TGC, k_weight, k_epsilon), cos_TC, sin_TC)
    kv_write(k_TGC, v_TGC, k_pages, v_pages, slot_T)
    return rotate(_norm(q_THC, q_weight, q_epsilon), cos_TC, sin_TC)


rotary_kv_write = Op("rotary_kv_write", _rotary_kv_write, mutates=("k_pages", "v_pages"))


@rotary_kv_write.register_fake
def _(q_THC, *_args):  # type: ignore[no-untyped-def]
    return q_THC.new_empty(q_THC.shape)
