"""`paged_attention` and `kv_write` in Triton. In: what their contract says. Out: the same. Nothing is read back to the host.

Short rows (decoding, and prefill chunks of up to `MAX_SHORT_QUERIES` tokens): each token's context is cut into splits of
`SPLIT` keys, counted from position 0, so that a split does not depend on the batch; one program works through a split (or
several, one after the other), a second kernel adds a token's splits up in their order. Long chunks: one program a tile of
queries and head. Keys that are masked are not loaded, so nothing that lies in them can do harm.

Weights of the softmax are powers of two inside: scores are scaled by log2(e).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels.gpu.launch import options, take_turn

# Keys of a split. Shorter ones occupy more of the GPU when few sequences decode; longer ones have fewer results to add up.
SPLIT = 128
# Splits that are added up at once.
_SPLIT_TILE = 16
# Programs that are enough to occupy a GPU: where there are more splits than that, a program takes several.
_MANY_PROGRAMS = 2048
_LOG2_E = 1.4426950408889634


def tile_sizes(head_width: int, itemsize: int) -> tuple[int, int]:
    """(queries, keys) of a tile for heads of this width (a power of two): what keeps both in shared memory."""
    row_bytes = head_width * itemsize
    return (64, 64) if row_bytes <= 256 else (64, 32) if row_bytes <= 512 else (16, 16)


@triton.jit
def _kv_write(
    k_TGC,
    v_TGC,
    k_pages,
    v_pages,
    slot_T,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    G,
    C,
    CV,
    C_TILE: tl.constexpr,
    CV_TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, G): one token's key and value of one head."""
    take_turn(PDL)
    token = tl.program_id(0)
    group = tl.program_id(1)
    slot = tl.load(slot_T + token)
    c = tl.arange(0, C_TILE)
    k = tl.load(k_TGC + token.to(tl.int64) * k_stride_t + group * k_stride_g + c, mask=c < C)
    tl.store(k_pages + (slot * G + group) * C + c, k, mask=c < C)
    cv = tl.arange(0, CV_TILE)
    v = tl.load(v_TGC + token.to(tl.int64) * v_stride_t + group * v_stride_g + cv, mask=cv < CV)
    tl.store(v_pages + (slot * G + group) * CV + cv, v, mask=cv < CV)


@triton.jit
def _attend_block(
    q, m, l, acc, k_pages, v_pages, table, n0, first, last, group, scale,
    PAGE: tl.constexpr, G, C: tl.constexpr, CV: tl.constexpr, N_TILE: tl.constexpr, C_TILE: tl.constexpr,
    CV_TILE: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: keys [n0, n0 + N_TILE) of one head against the rows of q, each of which sees the
    positions [first, last] (a column each).

    `m`: the rows' largest score, `l`: the sum of their weights, `acc`: the weighted values, both relative to `m`.
    """
    n = n0 + tl.arange(0, N_TILE)
    c = tl.arange(0, C_TILE)
    cv = tl.arange(0, CV_TILE)
    wanted = (n >= tl.min(first)) & (n <= tl.max(last))
    page = tl.load(table + n // PAGE, mask=wanted, other=0)
    row = (page * PAGE + n % PAGE) * G + group
    k = tl.load(k_pages + row[None, :] * C + c[:, None], mask=wanted[None, :] & (c[:, None] < C), other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    seen = (n[None, :] >= first) & (n[None, :] <= last)
    scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    # rows that have seen nothing yet: -inf - -inf is not a number
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(m - base)
    v = tl.load(v_pages + row[:, None] * CV + cv[None, :], mask=wanted[:, None] & (cv[None, :] < CV), other=0.0)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return m_new, l * shrink + tl.sum(weights, 1), acc


# What changes from step to step is not specialised: a divisible width of the page table must not cost a compilation.
@triton.jit(do_not_specialize=["N", "NUM_SPLITS", "STRIDE"])
def _attend_splits(
    q_THC, k_pages, v_pages, pages_BN, short_T, position_T, m_THS, l_THS, acc_THSC,
    scale, window, q_stride_t, q_stride_h, N, H, G, NUM_SPLITS, STRIDE,
    PAGE: tl.constexpr, C: tl.constexpr, CV: tl.constexpr, HEADS: tl.constexpr, H_TILE: tl.constexpr,
    N_TILE: tl.constexpr, C_TILE: tl.constexpr, CV_TILE: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T * G, STRIDE): one short token, the `HEADS` heads of one key head, every STRIDE-th split of the context. The tiles
    of all its splits go through one loop, so that the keys of the next are on their way; the key heads of a token, which lie
    side by side in memory, are read side by side."""
    take_turn(PDL)
    token = tl.program_id(0) // G
    group = tl.program_id(0) % G
    seq = tl.load(short_T + token)
    position = tl.load(position_T + token).to(tl.int32)
    if seq >= 0:
        first = tl.maximum(position - window + 1, 0)
        h = tl.arange(0, H_TILE)
        c = tl.arange(0, C_TILE)
        cv = tl.arange(0, CV_TILE)
        head = group * HEADS + h
        q_at = q_THC + token.to(tl.int64) * q_stride_t + head[:, None] * q_stride_h + c[None, :]
        q = tl.load(q_at, mask=(h[:, None] < HEADS) & (c[None, :] < C), other=0.0)
        first_h = first + tl.zeros([H_TILE, 1], tl.int32)
        last_h = position + tl.zeros([H_TILE, 1], tl.int32)
        m = tl.full([H_TILE], float("-inf"), tl.float32)
        l = tl.zeros([H_TILE], tl.float32)
        acc = tl.zeros([H_TILE, CV_TILE], tl.float32)
        TILES: tl.constexpr = SPLIT_KEYS // N_TILE
        begin = first // SPLIT_KEYS + tl.program_id(1)
        num_splits = tl.maximum(tl.cdiv(position // SPLIT_KEYS + 1 - begin, STRIDE), 0)
        for tile in range(num_splits * TILES):
            split = begin + tile // TILES * STRIDE
            m, l, acc = _attend_block(
                q, m, l, acc, k_pages, v_pages, pages_BN + seq * N, split * SPLIT_KEYS + tile % TILES * N_TILE, first_h,
                last_h, group, scale, PAGE, G, C, CV, N_TILE, C_TILE, CV_TILE,
            )  # fmt: skip
            if tile % TILES == TILES - 1:
                at = (token.to(tl.int64) * H + head) * NUM_SPLITS + split
                tl.store(m_THS + at, m, mask=h < HEADS)
                tl.store(l_THS + at, l, mask=h < HEADS)
                inside = (h[:, None] < HEADS) & (cv[None, :] < CV)
                tl.store(acc_THSC + at[:, None] * CV + cv[None, :], acc, mask=inside)
                m = tl.full([H_TILE], float("-inf"), tl.float32)
                l = tl.zeros([H_TILE], tl.float32)
                acc = tl.zeros([H_TILE, CV_TILE], tl.float32)


@triton.jit(do_not_specialize=["NUM_SPLITS"])
def _add_splits(
    m_THS, l_THS, acc_THSC, short_T, position_T, sinks_H, out_THC, window, H, NUM_SPLITS,
    CV: tl.constexpr, HAS_SINKS: tl.constexpr, CV_TILE: tl.constexpr, SPLIT_KEYS: tl.constexpr, S_TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, H): one short token and head; its splits in their order, S_TILE of them at once, counted from position 0. Rows
    that are not short become zero."""
    take_turn(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1)
    cv = tl.arange(0, CV_TILE)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        m = tl.zeros([1], tl.float32) + tl.load(sinks_H + head) * 1.4426950408889634
        l += 1.0
    acc = tl.zeros([CV_TILE], tl.float32)
    seq = tl.load(short_T + token)
    position = tl.load(position_T + token).to(tl.int32)
    if seq >= 0:
        begin = tl.maximum(position - window + 1, 0) // SPLIT_KEYS
        end = position // SPLIT_KEYS + 1
        for split in range(begin // S_TILE * S_TILE, end, S_TILE):
            s = split + tl.arange(0, S_TILE)
            is_there = (s >= begin) & (s < end)
            at = (token.to(tl.int64) * H + head) * NUM_SPLITS + s
            m_S = tl.load(m_THS + at, mask=is_there, other=float("-inf"))
            l_S = tl.load(l_THS + at, mask=is_there, other=0.0)
            acc_at = acc_THSC + at[:, None] * CV + cv[None, :]
            acc_SC = tl.load(acc_at, mask=is_there[:, None] & (cv[None, :] < CV), other=0.0)
            m_new = tl.maximum(m, tl.max(m_S, 0))
            old = tl.exp2(m - m_new)
            new_S = tl.exp2(m_S - m_new)
            l = l * old + tl.sum(l_S * new_S, 0)
            acc = acc * old + tl.sum(acc_SC * new_S[:, None], 0)
            m = m_new
        acc = acc / l
    out = out_THC + (token.to(tl.int64) * H + head) * CV + cv
    tl.store(out, acc.to(out_THC.dtype.element_ty), mask=cv < CV)


@triton.jit(do_not_specialize=["N"])
def _attend_tiles(
    q_THC, k_pages, v_pages, pages_BN, long_Q3, position_T, sinks_H, out_THC,
    scale, window, q_stride_t, q_stride_h, N, H, G, PAGE: tl.constexpr,
    C: tl.constexpr, CV: tl.constexpr, HEADS: tl.constexpr, HAS_SINKS: tl.constexpr, PER_ROW: tl.constexpr,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, C_TILE: tl.constexpr, CV_TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Q * PER_ROW, H): M_TILE queries of a long prefill chunk; PER_ROW tiles for each row of `long_Q3`."""
    take_turn(PDL)
    row = tl.program_id(0) // PER_ROW
    head = tl.program_id(1)
    seq = tl.load(long_Q3 + row * 3)
    begin = tl.load(long_Q3 + row * 3 + 1)
    count = tl.load(long_Q3 + row * 3 + 2).to(tl.int32)
    i = tl.program_id(0) % PER_ROW * M_TILE + tl.arange(0, M_TILE)
    if tl.program_id(0) % PER_ROW * M_TILE < count:
        inside = i < count
        token = begin + tl.minimum(i, count - 1)  # rows beyond the last are the last once more, and not stored
        last = tl.load(position_T + token).to(tl.int32)
        first = tl.maximum(last - window + 1, 0)
        c = tl.arange(0, C_TILE)
        cv = tl.arange(0, CV_TILE)
        q_at = q_THC + token[:, None] * q_stride_t + head * q_stride_h + c[None, :]
        q = tl.load(q_at, mask=c[None, :] < C, other=0.0)
        m = tl.full([M_TILE], float("-inf"), tl.float32)
        l = tl.zeros([M_TILE], tl.float32)
        if HAS_SINKS:
            m = tl.zeros([M_TILE], tl.float32) + tl.load(sinks_H + head) * 1.4426950408889634
            l += 1.0
        acc = tl.zeros([M_TILE, CV_TILE], tl.float32)
        n0 = tl.min(first) // N_TILE * N_TILE
        end = tl.max(last) + 1
        for n in range(n0, end, N_TILE):
            m, l, acc = _attend_block(
                q, m, l, acc, k_pages, v_pages, pages_BN + seq * N, n, first[:, None], last[:, None], head // HEADS,
                scale, PAGE, G, C, CV, N_TILE, C_TILE, CV_TILE,
            )  # fmt: skip
        out = out_THC + (token[:, None] * H + head) * CV + cv[None, :]
        tl.store(out, (acc / l[:, None]).to(out_THC.dtype.element_ty), mask=inside[:, None] & (cv[None, :] < CV))


def kv_write(k_TGC: Tensor, v_TGC: Tensor, k_pages: Tensor, v_pages: Tensor, slot_T: Tensor) -> None:
    """As `perft_kernels.paged_attention.kv_write`; the tensors' last axes lie in one piece."""
    num_tokens, num_groups, width = k_TGC.shape
    if num_tokens == 0:
        return
    value_width = v_TGC.shape[2]
    _kv_write[num_tokens, num_groups](
        k_TGC,
        v_TGC,
        k_pages,
        v_pages,
        slot_T,
        *(k_TGC.stride(0), k_TGC.stride(1), v_TGC.stride(0), v_TGC.stride(1)),
        *(num_groups, width, value_width),
        C_TILE=triton.next_power_of_2(width),
        CV_TILE=triton.next_power_of_2(value_width),
        num_warps=1,
        **options(),
    )


def paged_attention(
    q_THC: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages_BN: Tensor,
    short_T: Tensor,
    position_T: Tensor,
    long_Q3: Tensor,
    tile_queries: int,
    has_short: bool,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None,
    out_THC: Tensor,
) -> None:
    """Fills `out_THC`. The last axes of queries and pages lie in one piece.

    Args:
        long_Q3: pieces of long prefill chunks: sequence, first token, number of tokens, at most `tile_queries` of them.
        has_short: whether there are other tokens.
    """
    (num_tokens, num_heads, width), (_, page_size, num_groups, value_width) = q_THC.shape, v_pages.shape
    width_tile = max(16, triton.next_power_of_2(width))
    value_tile = max(16, triton.next_power_of_2(value_width))
    query_tile, key_tile = tile_sizes(max(width_tile, value_tile), q_THC.element_size())
    table_width = pages_BN.shape[1]
    widest = window or 1 << 30
    shape = {
        "PAGE": page_size,
        "C": width,
        "CV": value_width,
        "N_TILE": key_tile,
        "C_TILE": width_tile,
        "CV_TILE": value_tile,
        "num_warps": 4,
        **options(),
    }
    heads = num_heads // num_groups
    scale *= _LOG2_E
    sinks = q_THC if sinks_H is None else sinks_H.float().contiguous()
    if has_short:
        num_splits = -(-table_width * page_size // SPLIT)
        stride = max(1, min(num_splits, _MANY_PROGRAMS // (num_tokens * num_groups)))
        m_THS = torch.empty(num_tokens, num_heads, num_splits, dtype=torch.float32, device=q_THC.device)
        l_THS = torch.empty_like(m_THS)
        acc_THSC = torch.empty(*m_THS.shape, value_width, dtype=torch.float32, device=q_THC.device)
        _attend_splits[num_tokens * num_groups, stride](
            *(q_THC, k_pages, v_pages, pages_BN, short_T, position_T, m_THS, l_THS, acc_THSC),
            *(scale, widest, q_THC.stride(0), q_THC.stride(1)),
            *(table_width, num_heads, num_groups, num_splits, stride),
            HEADS=heads,
            H_TILE=max(16, triton.next_power_of_2(heads)),
            SPLIT_KEYS=SPLIT,
            num_stages=5,
            **shape,
        )
        _add_splits[num_tokens, num_heads](
            *(m_THS, l_THS, acc_THSC, short_T, position_T, sinks, out_THC, widest, num_heads, num_splits),
            CV=value_width,
            HAS_SINKS=sinks_H is not None,
            CV_TILE=value_tile,
            SPLIT_KEYS=SPLIT,
            S_TILE=_SPLIT_TILE,
            num_warps=1,
            **options(),
        )
    if long_Q3.shape[0]:
        per_row = -(-tile_queries // query_tile)
        _attend_tiles[long_Q3.shape[0] * per_row, num_heads](
            *(q_THC, k_pages, v_pages, pages_BN, long_Q3, position_T, sinks, out_THC),
            *(scale, widest, q_THC.stride(0), q_THC.stride(1), table_width, num_heads, num_groups),
            HEADS=heads,
            HAS_SINKS=sinks_H is not None,
            PER_ROW=per_row,
            M_TILE=query_tile,
            **shape,
        )
