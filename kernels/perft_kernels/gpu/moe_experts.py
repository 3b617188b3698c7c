"""`stored_experts` in Triton. In: what its contract says. Out: the same. Nothing is read back to the host.

Four launches: pairs (a token and one of its base experts) are sorted by base expert, on the device and in token order; each
tile of one base expert's pairs goes through gate and up, and then through down; each token adds up its own pairs in the
order of its choices. Pairs without a base expert are sorted out. The number of tiles is bounded by shapes alone, and programs
beyond the last one exit. A token alone needs no sorting: three launches.

A step of up to `DECODE_TOKENS` tokens has the smallest tiles, whatever its size, and the same arithmetic in the same order, so
a decoding request's result is the same to the bit alone and among others. A step of more has tiles of 64 pairs, for which
Triton takes another instruction on some GPUs (wgmma), which adds otherwise; where that must not be (`batch_invariant`), of 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels.gpu.launch import options, take_turn

# Steps of more tokens than this have larger tiles.
DECODE_TOKENS = 256
# Pairs that a program of the sort looks at at once.
_SCAN = 1024


def tile_sizes(num_tokens: int, itemsize: int, batch_invariant: bool) -> tuple[int, int, int, int, int]:
    """(pairs, outputs of gate and of up, outputs of down, inputs, stages) of a tile of a product: of shapes only, not of what
    is in them.

    Decoding, both products read 16 KB of weights a step: with one token a multiprocessor has two programs, which have 64 KB or
    more on their way, and with many tokens the pairs, which each program reads again, are few beside the weights.
    """
    inputs = 256 // itemsize
    if num_tokens <= DECODE_TOKENS:
        return 16, 32, 64, inputs, 4
    return 32 if batch_invariant else 64, 64, 64, inputs // 2, 3


@triton.jit
def _sort_pairs(ids_P, order_P, start_N1, P, N, SCAN: tl.constexpr, PDL: tl.constexpr):
    """Grid (N,): the pairs of one base expert, ascending, into `order_P` from `start_N1[expert]` on."""
    take_turn(PDL)
    expert = tl.program_id(0)
    before = tl.zeros([SCAN], tl.int32)
    count = tl.zeros([SCAN], tl.int32)
    p0 = 0
    while p0 < P:
        p = p0 + tl.arange(0, SCAN)
        ids = tl.load(ids_P + p, mask=p < P, other=-1)
        before += ((ids >= 0) & (ids < expert)).to(tl.int32)
        count += (ids == expert).to(tl.int32)
        p0 += SCAN
    start = tl.sum(before)
    total = tl.sum(count)
    tl.store(start_N1 + expert, start)
    tl.store(start_N1 + N, start + total, mask=expert == N - 1)
    if total > 0:
        p0 = 0
        while p0 < P:
            p = p0 + tl.arange(0, SCAN)
            mine = tl.load(ids_P + p, mask=p < P, other=-1) == expert
            rank = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(order_P + start + rank - 1, p, mask=mine)
            start += tl.sum(mine.to(tl.int32))
            p0 += SCAN


@triton.jit
def _tile(start_N1, tile, N, P_TILE: tl.constexpr, N_SCAN: tl.constexpr):
    """Tile number `tile` as (base expert, place of its first pair in `order_P`, place after the expert's last pair); N as base
    expert if there are fewer tiles."""
    e = tl.arange(0, N_SCAN)
    start = tl.load(start_N1 + e, mask=e < N, other=0)
    end = tl.load(start_N1 + e + 1, mask=e < N, other=0)
    num_tiles = (end - start + P_TILE - 1) // P_TILE
    up_to = tl.cumsum(num_tiles, 0)
    passed = ((up_to <= tile) & (e < N)).to(tl.int32)
    expert = tl.sum(passed)
    chosen = e == expert
    first_tile = tl.sum(tl.where(chosen, up_to - num_tiles, 0))
    begin = tl.sum(tl.where(chosen, start, 0)) + (tile - first_tile) * P_TILE
    return expert, begin, tl.sum(tl.where(chosen, end, 0))


@triton.jit
def _pairs(ids_P, order_P, start_N1, N, P_TILE: tl.constexpr, N_SCAN: tl.constexpr, ALONE: tl.constexpr):
    """Of this program's tile: its base expert (N: none), the pairs' places in sorted order, which of them are there, and
    their pair numbers. ALONE: there is one token, and each of its pairs is a tile.
    """
    tile = tl.program_id(0)
    row = tl.arange(0, P_TILE)
    if ALONE:
        expert = tl.load(ids_P + tile)
        expert = tl.where((expert >= 0) & (expert < N), expert, N).to(tl.int32)
        place = row + tile
        inside = row < 1
        pair = place
    else:
        expert, begin, end = _tile(start_N1, tile, N, P_TILE, N_SCAN)
        place = begin + row
        inside = place < end
        pair = tl.load(order_P + place, mask=inside, other=0)
    return expert, place, inside, pair


@triton.jit
def _sigmoid(x):
    """Without an exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _gate_up(
    h_TD, gate_up, bias, ids_P, order_P, start_N1, a_PI,
    K, N, I, D, h_stride, stride_n, stride_o, stride_d, gate_step, up_offset, alpha, limit,
    HAS_BIAS: tl.constexpr, CLAMPED: tl.constexpr,
    P_TILE: tl.constexpr, O_TILE: tl.constexpr, D_TILE: tl.constexpr, N_SCAN: tl.constexpr, ALONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, I / O_TILE): a tile of one base expert's pairs through gate, up and activation, stored in sorted order."""
    take_turn(PDL)
    expert, place, inside, pair = _pairs(ids_P, order_P, start_N1, N, P_TILE, N_SCAN, ALONE)
    if expert < N:
        token = pair // K
        i = tl.program_id(1) * O_TILE + tl.arange(0, O_TILE)
        gate_row = tl.minimum(i, I - 1) * gate_step
        weights = gate_up + expert.to(tl.int64) * stride_n
        gate = tl.zeros([P_TILE, O_TILE], tl.float32)
        up = tl.zeros([P_TILE, O_TILE], tl.float32)
        for d0 in range(0, D, D_TILE):
            d = d0 + tl.arange(0, D_TILE)
            h_at = h_TD + token.to(tl.int64)[:, None] * h_stride + d[None, :]
            h = tl.load(h_at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
            at = weights + gate_row[None, :] * stride_o + d[:, None] * stride_d
            in_d = (d[:, None] < D) & (i[None, :] < I)
            gate += tl.dot(h, tl.load(at, mask=in_d, other=0.0), input_precision="ieee")
            up += tl.dot(h, tl.load(at + up_offset * stride_o, mask=in_d, other=0.0), input_precision="ieee")
        if HAS_BIAS:
            bias_at = bias + expert * 2 * I + gate_row
            gate += tl.load(bias_at).to(tl.float32)[None, :]
            up += tl.load(bias_at + up_offset).to(tl.float32)[None, :]
        if CLAMPED:
            # not tl.minimum alone: what is not a number has to stay so
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
            a = (up + 1.0) * gate * _sigmoid(alpha * gate)
        else:
            a = up * gate * _sigmoid(gate)
        a_at = a_PI + place.to(tl.int64)[:, None] * I + i[None, :]
        tl.store(a_at, a.to(a_PI.dtype.element_ty), mask=inside[:, None] & (i[None, :] < I))


@triton.jit
def _down(
    a_PI, down, bias, ids_P, order_P, start_N1, out_PD,
    N, I, D, stride_n, stride_o, stride_i,
    HAS_BIAS: tl.constexpr, P_TILE: tl.constexpr, O_TILE: tl.constexpr, I_TILE: tl.constexpr, N_SCAN: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, D / O_TILE): a tile of one base expert's pairs through down; stored at each pair's own place."""
    take_turn(PDL)
    expert, place, inside, pair = _pairs(ids_P, order_P, start_N1, N, P_TILE, N_SCAN, ALONE)
    if expert < N:
        o = tl.program_id(1) * O_TILE + tl.arange(0, O_TILE)
        weights = down + expert.to(tl.int64) * stride_n
        out = tl.zeros([P_TILE, O_TILE], tl.float32)
        for i0 in range(0, I, I_TILE):
            i = i0 + tl.arange(0, I_TILE)
            a_at = a_PI + place.to(tl.int64)[:, None] * I + i[None, :]
            a = tl.load(a_at, mask=inside[:, None] & (i[None, :] < I), other=0.0)
            at = weights + o[None, :] * stride_o + i[:, None] * stride_i
            w = tl.load(at, mask=(i[:, None] < I) & (o[None, :] < D), other=0.0)
            out += tl.dot(a, w, input_precision="ieee")
        if HAS_BIAS:
            out += tl.load(bias + expert * D + o, mask=o < D, other=0.0).to(tl.float32)[None, :]
        out_at = out_PD + pair.to(tl.int64)[:, None] * D + o[None, :]
        tl.store(out_at, out, mask=inside[:, None] & (o[None, :] < D))


@triton.jit
def _combine(out_PD, ids_P, weights_P, y_TD, N, D, K: tl.constexpr, D_TILE: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, D / D_TILE): one token's pairs, weighted and added up in the order of its choices."""
    take_turn(PDL)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D_TILE + tl.arange(0, D_TILE)
    y = tl.zeros([D_TILE], tl.float32)
    # without a branch: all loads are under way at once
    for k in tl.static_range(K):
        pair = token * K + k
        expert = tl.load(ids_P + pair)
        is_there = (expert >= 0) & (expert < N)
        weight = tl.load(weights_P + pair, mask=is_there, other=0.0).to(tl.float32)
        y += weight * tl.load(out_PD + pair * D + d, mask=d < tl.where(is_there, D, 0), other=0.0)
    tl.store(y_TD + token * D + d, y.to(y_TD.dtype.element_ty), mask=d < D)


def stored_experts(
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
    batch_invariant: bool,
) -> Tensor:
    """As the contract in `perft_kernels.moe_experts`; the last axis of `h_TD` lies in one piece."""
    (num_tokens, hidden_size), top_k, num_experts = h_TD.shape, ids_TK.shape[1], down.shape[0]
    inner_size = down.shape[1 if transposed else 2]
    y_TD = h_TD.new_empty(num_tokens, hidden_size)
    if num_tokens == 0:
        return y_TD
    num_pairs = num_tokens * top_k
    alone = num_tokens == 1
    ids_P, weights_P = ids_TK.contiguous().view(-1), weights_TK.contiguous().view(-1)
    order_P = torch.empty(num_pairs, dtype=torch.int32, device=h_TD.device)
    start_N1 = torch.empty(num_experts + 1, dtype=torch.int32, device=h_TD.device)
    a_PI = h_TD.new_empty(num_pairs, inner_size)
    pair_tile, inner_tile, out_tile, in_tile, num_stages = tile_sizes(num_tokens, h_TD.element_size(), batch_invariant)
    num_tiles = num_pairs if alone else num_pairs // pair_tile + min(num_experts, num_pairs)
    tiles = {
        "P_TILE": pair_tile,
        "N_SCAN": triton.next_power_of_2(num_experts),
        "num_warps": 4,
        "num_stages": num_stages,
        **options(),
    }
    # strides by (base expert, output, input), however the weights are stored
    gate_up_stride, down_stride = (
        (w.stride(0), w.stride(2), w.stride(1)) if transposed else w.stride() for w in (gate_up, down)
    )
    if not alone:
        _sort_pairs[num_experts,](ids_P, order_P, start_N1, num_pairs, num_experts, SCAN=_SCAN, **options())
    _gate_up[num_tiles, triton.cdiv(inner_size, inner_tile)](
        *(h_TD, gate_up, h_TD if gate_up_bias is None else gate_up_bias, ids_P, order_P, start_N1, a_PI),
        *(top_k, num_experts, inner_size, hidden_size, h_TD.stride(0), *gate_up_stride),
        *((2, 1) if interleaved else (1, inner_size)),
        *(alpha, limit),
        HAS_BIAS=gate_up_bias is not None,
        CLAMPED=limit > 0,
        ALONE=alone,
        O_TILE=inner_tile,
        D_TILE=in_tile,
        **tiles,
    )
    out_PD = torch.empty(num_pairs, hidden_size, dtype=torch.float32, device=h_TD.device)
    _down[num_tiles, triton.cdiv(hidden_size, out_tile)](
        *(a_PI, down, h_TD if down_bias is None else down_bias, ids_P, order_P, start_N1, out_PD),
        *(num_experts, inner_size, hidden_size, *down_stride),
        HAS_BIAS=down_bias is not None,
        ALONE=alone,
        O_TILE=out_tile,
        I_TILE=in_tile,
        **tiles,
    )
    width_tile = min(512, triton.next_power_of_2(hidden_size))
    _combine[num_tokens, triton.cdiv(hidden_size, width_tile)](
        *(out_PD, ids_P, weights_P, y_TD, num_experts, hidden_size), K=top_k, D_TILE=width_tile, **options()
    )
    return y_TD
