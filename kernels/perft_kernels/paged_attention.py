"""`paged_attention`: causal attention of a flattened batch over KV pages, prefill chunks and decode tokens in one call.

Contract
    The batch holds the new tokens of B sequences one after the other. Sequence b has `num_queries[b]` new tokens and, those
    included, `context_len[b]` tokens in all; token j of its context lies in page `pages[b][j // page_size]`, row
    `j % page_size`. New keys and values are in the pages already (`kv_write`). Query i of sequence b stands at position
    p = context_len[b] - num_queries[b] + i and sees the positions (p - window, p].

        out = softmax(scale * q k^T) v,    with one more column `sinks[head]` in the softmax where there are sinks

    | tensor     | shape                | meaning                                                          |
    |------------|----------------------|------------------------------------------------------------------|
    | q_THC      | [T, H, C]            | queries                                                          |
    | k_pages    | [P, page, G, C]      | keys; H is a multiple of G                                       |
    | v_pages    | [P, page, G, Cv]     | values                                                           |
    | pages_BN   | [B, N] int64         | page table; page 0 is nobody's and stands where a row has no more |
    | short_T    | [T] int64            | sequence of each new token, -1 for those of long prefills:       |
    |            |                      | `short_rows`, made once for all layers                           |
    | position_T | [T] int64            | position of each new token                                       |
    | long_Q3    | [Q, 3] int64         | pieces of long prefills, read by the GPU only: sequence, first   |
    |            |                      | token, number of tokens: `long_pieces`                           |
    | sinks_H    | [H] or none          | gpt-oss: a learned logit that takes weight and gives nothing     |

    The first `num_long[b]` new tokens of sequence b are attended as a long prefill, together; the others one by one. Which of
    them is a matter of speed and of the last bits (`num_long_queries` is the fast rule).

    Rows of a page that hold no token must be finite (the engine hands out cleared pages): they are masked, and a masked
    NaN would still poison the product with the values. A sequence reads its own pages only.

    The kernels for GPUs are in `gpu/paged_attention.py`. There a short row's context is summed in splits of fixed length in
    their order, so that its result is the same to the bit whoever is beside it; and so is a long prefill's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from perft_kernels import gpu
from perft_kernels._op import Op
from perft_kernels.native import element_type, native

# A prefill chunk of more tokens than this is a long one.
MAX_SHORT_QUERIES = 16
# Tokens in a piece of a long prefill.
_PIECE = 64


def num_long_queries(num_queries: Sequence[int]) -> list[int]:
    """`num_long` of the contract, for speed."""
    return [n if n > MAX_SHORT_QUERIES else 0 for n in num_queries]


def short_rows(num_queries: Sequence[int], num_long: Sequence[int]) -> list[int]:
    """`short_T` of the contract."""
    rows = []
    for b, (n, long) in enumerate(zip(num_queries, num_long, strict=True)):
        rows += [-1] * long + [b] * (n - long)
    return rows


def long_pieces(num_queries: Sequence[int], num_long: Sequence[int]) -> list[tuple[int, int, int]]:
    """`long_Q3` of the contract."""
    pieces, start = [], 0
    for b, (n, long) in enumerate(zip(num_queries, num_long, strict=True)):
        pieces += [(b, start + i, min(_PIECE, long - i)) for i in range(0, long, _PIECE)]
        start += n
    return pieces


def _kv_write(k_TGC: Tensor, v_TGC: Tensor, k_pages: Tensor, v_pages: Tensor, slot_T: Tensor) -> None:
    if gpu.takes(k_pages) and k_TGC.dtype == v_TGC.dtype == k_pages.dtype:
        from perft_kernels.gpu.paged_attention import kv_write as write  # Triton is there on GPUs only

        write(_with_whole_rows(k_TGC), _with_whole_rows(v_TGC), k_pages, v_pages, slot_T)
        return
    kernels = native(k_pages, v_pages)
    if kernels is not None and k_TGC.dtype == v_TGC.dtype == k_pages.dtype and _rows_whole(k_TGC, v_TGC):
        size = k_pages.itemsize
        kernels(
            "perft_kv_write",
            *(k_TGC, k_TGC.stride(0) * size, k_TGC.stride(1) * size),
            *(v_TGC, v_TGC.stride(0) * size, v_TGC.stride(1) * size),
            *(k_pages, v_pages, slot_T, slot_T.shape[0], k_pages.shape[2]),
            *(k_pages.shape[3] * size, v_pages.shape[3] * size),
        )
        return
    k_pages.flatten(0, 1).index_copy_(0, slot_T, k_TGC)
    v_pages.flatten(0, 1).index_copy_(0, slot_T, v_TGC)


# Stores each new token's key and value at row `slot_T[t]` of the pages seen as `[P * page, G, C]`.
kv_write = Op("kv_write", _kv_write, mutates=("k_pages", "v_pages"))


@kv_write.register_fake
def _(k_TGC, v_TGC, k_pages, v_pages, slot_T):  # type: ignore[no-untyped-def]
    return None


def _paged_attention(
    q_THC: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages_BN: Tensor,
    short_T: Tensor,
    position_T: Tensor,
    num_queries: Sequence[int],
    context_len: Sequence[int],
    num_long: Sequence[int],
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    long_Q3: Tensor | None = None,
) -> Tensor:
    out_THC = q_THC.new_empty(q_THC.shape[0], q_THC.shape[1], v_pages.shape[3])
    if gpu.takes(q_THC, k_pages, v_pages) and q_THC.dtype == k_pages.dtype == v_pages.dtype:
        from perft_kernels.gpu.paged_attention import paged_attention as attend  # Triton is there on GPUs only

        if long_Q3 is None:
            pieces = long_pieces(num_queries, num_long)
            long_Q3 = torch.tensor(pieces, dtype=torch.int64, device=q_THC.device).view(-1, 3)
        has_short = any(n > long for n, long in zip(num_queries, num_long, strict=True))
        q_THC = _with_whole_rows(q_THC)
        attend(
            q_THC,
            k_pages,
            v_pages,
            pages_BN,
            short_T,
            position_T,
            long_Q3,
            _PIECE,
            has_short,
            scale,
            window,
            sinks_H,
            out_THC,
        )
        return out_THC
    kernels = native(q_THC, k_pages, v_pages)
    if kernels is not None and q_THC.dtype == k_pages.dtype and _rows_whole(q_THC):
        kernels(
            "perft_paged_attention",
            *(q_THC, q_THC.stride(0), q_THC.stride(1), k_pages, v_pages, element_type(k_pages)),
            *(pages_BN, short_T, position_T, None if sinks_H is None else sinks_H.float().contiguous(), out_THC),
            *(q_THC.shape[0], q_THC.shape[1], k_pages.shape[2], q_THC.shape[2], v_pages.shape[3]),
            *(k_pages.shape[1], pages_BN.shape[1], scale, window or 0),
        )
        together, one_by_one = list(num_long), []
    else:
        together = [n if n > 1 else 0 for n in num_queries]
        one_by_one = [b for b, n in enumerate(num_queries) if n == 1]
    starts = [0, *itertools.accumulate(num_queries)]
    if one_by_one:
        _decode(q_THC, k_pages, v_pages, pages_BN, one_by_one, starts, context_len, scale, window, sinks_H, out_THC)
    for b, n in enumerate(together):
        if n:
            rows = slice(starts[b], starts[b] + n)
            first = context_len[b] - num_queries[b]
            length = first + n
            position_n = torch.arange(first, length, device=q_THC.device)
            key_S = torch.arange(length, device=q_THC.device)
            mask_nS = None
            if window is not None and window < length:
                mask_nS = (key_S <= position_n[:, None]) & (key_S > position_n[:, None] - window)
            elif first > 0 or sinks_H is not None:
                mask_nS = key_S <= position_n[:, None]
            k_SGC = _gather(k_pages, pages_BN[b], length)
            v_SGC = _gather(v_pages, pages_BN[b], length)
            out_THC[rows] = _attend(
                q_THC[rows].unsqueeze(0),
                k_SGC.unsqueeze(0),
                v_SGC.unsqueeze(0),
                None if mask_nS is None else mask_nS[None, None],
                scale,
                sinks_H,
            )[0]
    return out_THC


# Attention output `[T, H, Cv]`; see the contract at the head of this file. Without `long_Q3`, it is made here.
#
# On a GPU everything at once. In the CPU kernels, all tokens that are attended one by one at once, and long prefills by torch's
# blockwise attention, one at a time. In plain torch, sequences with one query are batched, whatever their lengths; the others
# run one at a time.
paged_attention = Op("paged_attention", _paged_attention)


@paged_attention.register_fake
def _(q_THC, k_pages, v_pages, *_args, **_kwargs):  # type: ignore[no-untyped-def]
    return q_THC.new_empty(*q_THC.shape[:2], v_pages.shape[3])


def _rows_whole(*tensors: Tensor) -> bool:
    """Whether the last axis of each lies in one piece."""
    return all(t.stride(-1) == 1 for t in tensors)


def _with_whole_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _decode(
    q_THC: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages_BN: Tensor,
    decode: list[int],
    starts: list[int],
    context_len: Sequence[int],
    scale: float,
    window: int | None,
    sinks_H: Tensor | None,
    out_THC: Tensor,
) -> None:
    device, page_size = q_THC.device, k_pages.shape[1]
    longest = max(context_len[b] for b in decode)
    num_pages = -(-longest // page_size)
    rows_B = torch.tensor([starts[b] for b in decode], device=device)
    length_B = torch.tensor([context_len[b] for b in decode], device=device)
    table_BN = pages_BN[torch.tensor(decode, device=device), :num_pages]
    key_S = torch.arange(num_pages * page_size, device=device)
    mask_BS = key_S < length_B[:, None]
    if window is not None:
        mask_BS &= key_S >= length_B[:, None] - window
    k_BSGC = k_pages[table_BN].flatten(1, 2)
    v_BSGC = v_pages[table_BN].flatten(1, 2)
    out_THC[rows_B] = _attend(q_THC[rows_B].unsqueeze(1), k_BSGC, v_BSGC, mask_BS[:, None, None], scale, sinks_H)[:, 0]


def _gather(pages: Tensor, table_N: Tensor, length: int) -> Tensor:
    num_pages = -(-length // pages.shape[1])
    return pages[table_N[:num_pages]].flatten(0, 1)[:length]


def _attend(
    q_BnHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention of [B, n, H, C] over [B, S, G, C]; `mask` broadcasts to [B, 1, n, S], `None` means causal with n == S."""
    num_seqs, n, num_heads, _ = q_BnHC.shape
    groups = num_heads // k_BSGC.shape[2]
    if n == 1 and sinks_H is None:
        # the heads of one group are queries of one key head
        q = q_BnHC.view(num_seqs, -1, groups, q_BnHC.shape[-1])
        out = F.scaled_dot_product_attention(
            q, k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2), attn_mask=mask, scale=scale
        )
        return out.reshape(num_seqs, 1, num_heads, -1)
    q_BHnC = q_BnHC.transpose(1, 2)
    k_BHSC = k_BSGC.transpose(1, 2).repeat_interleave(groups, dim=1)
    v_BHSC = v_BSGC.transpose(1, 2).repeat_interleave(groups, dim=1)
    if sinks_H is None:
        out = F.scaled_dot_product_attention(
            q_BHnC, k_BHSC, v_BHSC, attn_mask=mask, is_causal=mask is None and n > 1, scale=scale
        )
    else:
        assert mask is not None
        scores = (q_BHnC.float() @ k_BHSC.float().transpose(2, 3)) * scale
        scores = scores.masked_fill(~mask, float("-inf"))
        sink = sinks_H.float().view(1, -1, 1, 1).expand(num_seqs, -1, n, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        out = (weights @ v_BHSC.float()).to(q_BHnC.dtype)
    return out.transpose(1, 2)
