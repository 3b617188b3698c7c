"""`routed_units` on a GPU, forward and backward. Contract: perft_kernels/routed_units.py.

A *pair* (t, x) is token t's slot x; there are P = T * X of them, and its number is t * X + x. All work is done on *tiles*: up
to 16 pairs of one adapter expert, times 16 of its ranks. Three kernels make the forward pass:

1. `_shrink_...`: h of a tile's pairs times down rows, into `z`.
2. `_expand_...`: z through mask, SiLU and weights, times up rows.
3. `_combine`, only where pairs were sorted: a token's pairs added up.

Decoding (`..._tokens`), a tile is one pair (padded to 16: reading the rows is what takes time, and they are read once), nothing
is sorted, and one program of `_expand_tokens` owns some columns of a token and adds its pairs itself: two launches. A program
looks up all slots of its token at once and goes through the blocks of ranks that they have in one loop, which loads ahead; a
slot without an adapter expert costs nothing. In longer batches (`..._tiles`) the pairs are sorted by adapter expert on the
device, so that 16 of them share the reading of its rows, and each leaves its own output behind for `_combine`.

Both ways do the same arithmetic in the same order, to the bit: the same tiles of the same tensor-core instruction, `SPLIT_D`
columns of h at a time, 16 ranks at a time, a token's pairs in the order of its slots. So a token's result depends neither on
its neighbours nor on how many they are. There are no atomics.

No size comes from the tables and nothing is read back by the host: ranks, ids and the number of tiles stay on the device, and
programs beyond them end at once or take the next tile. `z` holds `RANKS` ranks of a pair, whatever they are; what
an adapter expert has beyond, `_expand_...` computes for itself (slower, since each of its programs does).

| array        | shape       | dtype | meaning                                                                        |
|--------------|-------------|-------|--------------------------------------------------------------------------------|
| key_P        | [P]         | int32 | adapter expert of the pairs in sorted order; E: they add nothing               |
| order_P      | [P]         | int64 | their pair numbers; pairs of one adapter expert in ascending order             |
| tile_P       | [P + 1]     | int32 | first place in that order of each tile; the last entry is how many tiles there |
|              |             |       | are. A tile ends at the next multiple of 16, or with its adapter expert        |
| z_CPR        | [C, P, R]   | fp32  | bottlenecks; their sum over C is one (C: splits of D, or 1)                    |
| delta_PN     | [P, N]      | fp32  | what each pair adds, N columns of it; written for active pairs only            |

Products are in the pool's dtype with float32 sums if h has that dtype too and it has 16 bits, otherwise in float32 throughout.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.launch import options, take_turn

# Up to so many tokens, sorting the pairs takes longer than reading rows twice.
MAX_DECODE_TOKENS = 256
# Of the pairs' outputs, at most so many bytes wait for `_combine`: about what a GPU's L2 cache holds.
MAX_DELTA_BYTES = 64 << 20

_RANKS = 128
_PAIRS = tl.constexpr(16)  # of a tile; and its ranks: the least that tl.dot takes
_SORT_BLOCK = 1024


@triton.jit
def _keys(ids_P, rank_E, key_P, P, E, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (ceil(P / BLOCK),): the sort's key of each pair."""
    p_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id_B = tl.load(ids_P + p_B, mask=p_B < P, other=-1)
    is_inside_B = (id_B >= 0) & (id_B < E)
    rank_B = tl.load(rank_E + id_B, mask=is_inside_B, other=0)
    tl.store(key_P + p_B, tl.where(rank_B > 0, id_B, E).to(tl.int32), mask=p_B < P)


@triton.jit
def _tiles(key_P, tile_P, P, E, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (1,): where the tiles begin, and how many there are."""
    count = tl.zeros([], dtype=tl.int32)
    for p0 in range(0, P, BLOCK):
        p_B = p0 + tl.arange(0, BLOCK)
        key_B = tl.load(key_P + p_B, mask=p_B < P, other=E)
        before_B = tl.load(key_P + p_B - 1, mask=(p_B > 0) & (p_B < P), other=-1)
        begins_B = (key_B < E) & ((key_B != before_B) | (p_B % _PAIRS == 0))
        number_B = begins_B.to(tl.int32)
        tl.store(tile_P + count + tl.cumsum(number_B, axis=0) - number_B, p_B, mask=begins_B)
        count += tl.sum(number_B, axis=0)
    tl.store(tile_P + P, count)


@triton.jit
def _tile(i, key_P, order_P, tile_P, P, E):  # type: ignore[no-untyped-def]
    """Tile number i of sorted pairs: its adapter expert, its pairs, and which of the 16 are there."""
    first = tl.load(tile_P + i)
    place_p = first + tl.arange(0, _PAIRS)
    expert = tl.load(key_P + first).to(tl.int64)
    is_near_p = (place_p < P) & (place_p // _PAIRS == first // _PAIRS)
    is_pair_p = is_near_p & (tl.load(key_P + place_p, mask=is_near_p, other=E) == expert)
    return expert, tl.load(order_P + place_p, mask=is_pair_p, other=0), is_pair_p


@triton.jit
def _experts(t, ids_P, rank_E, X, E, RANKS, BLOCK_X: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's slots: their adapter experts (0: none), whether there is one, its rank, and where the slot's blocks of 16 of
    the first `RANKS` ranks begin and end among those of all its slots."""
    x_X = tl.arange(0, BLOCK_X)
    expert_X = tl.load(ids_P + t * X + x_X, mask=x_X < X, other=-1)
    is_inside_X = (expert_X >= 0) & (expert_X < E)
    expert_X = tl.where(is_inside_X, expert_X, 0)
    rank_X = tl.load(rank_E + expert_X, mask=is_inside_X, other=0).to(tl.int32)
    num_blocks_X = tl.cdiv(tl.minimum(rank_X, RANKS), _PAIRS)
    end_X = tl.cumsum(num_blocks_X, axis=0)
    return expert_X, is_inside_X, rank_X, end_X - num_blocks_X, end_X


@triton.jit
def _slot(block, end_X, BLOCK_X: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slot that a token's block of ranks is of."""
    x = tl.sum((end_X <= block).to(tl.int32), axis=0)
    return x, tl.arange(0, BLOCK_X) == x


@triton.jit
def _of(value_X, is_it_X):  # type: ignore[no-untyped-def]
    """One slot's value. They are in registers: looking it up in memory again would take longer."""
    return tl.sum(tl.where(is_it_X, value_X, 0), axis=0)


@triton.jit
def _bottlenecks(  # type: ignore[no-untyped-def]
    x_TD, rows_RD, token_p, is_pair_p, r0, rank, D, DTYPE: tl.constexpr, SPLIT_D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """16 pairs' tokens times 16 of an adapter expert's rows, from `r0` on: the sums of each split of the columns, added up."""
    r_R = tl.arange(0, _PAIRS)
    z_pR = tl.zeros([_PAIRS, _PAIRS], dtype=tl.float32)
    sum_pR = tl.zeros([_PAIRS, _PAIRS], dtype=tl.float32)
    for d0 in range(0, tl.cdiv(D, SPLIT_D) * SPLIT_D, BLOCK_D):
        d_D = d0 + tl.arange(0, BLOCK_D)
        x_pD = tl.load(
            x_TD + token_p[:, None] * D + d_D[None, :], mask=is_pair_p[:, None] & (d_D < D)[None, :], other=0.0
        )
        rows_DR = tl.load(
            rows_RD + (r0 + r_R)[None, :] * D + d_D[:, None],
            mask=(r0 + r_R < rank)[None, :] & (d_D < D)[:, None],
            other=0.0,
        )
        sum_pR = tl.dot(x_pD.to(DTYPE), rows_DR.to(DTYPE), acc=sum_pR, input_precision="ieee")
        is_last = (d0 + BLOCK_D) % SPLIT_D == 0
        z_pR += tl.where(is_last, sum_pR, 0.0)
        sum_pR = tl.where(is_last, 0.0, sum_pR)
    return z_pR


@triton.jit(do_not_specialize=["X", "P", "E"], do_not_specialize_on_alignment=["first_row_E", "rank_E"])
def _shrink_tokens(  # type: ignore[no-untyped-def]
    x_TD, rows_SV, ids_P, first_row_E, rank_E, z_CPR, P, X, E, D, V, RANKS, DTYPE: tl.constexpr, SPLIT_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, C, blocks or fewer): of one token and split, every so manieth block of 16 ranks of all its pairs. They go
    through one loop, so that the rows of the next pair are on their way while this one's are multiplied."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * SPLIT_D
    row_p = tl.arange(0, _PAIRS)
    r_R = tl.arange(0, _PAIRS)
    expert_X, is_inside_X, rank_X, first_X, end_X = _experts(t, ids_P, rank_E, X, E, RANKS, BLOCK_X)
    first_row_X = tl.load(first_row_E + expert_X, mask=is_inside_X, other=0)
    STEPS: tl.constexpr = SPLIT_D // BLOCK_D
    num_blocks = tl.max(end_X, axis=0)
    num_mine = tl.maximum(tl.cdiv(num_blocks - tl.program_id(2), tl.num_programs(2)), 0)
    sum_pR = tl.zeros([_PAIRS, _PAIRS], dtype=tl.float32)
    for step in range(num_mine * STEPS):
        block = tl.program_id(2) + step // STEPS * tl.num_programs(2)
        x, is_it_X = _slot(block, end_X, BLOCK_X)
        r0 = (block - _of(first_X, is_it_X)) * _PAIRS
        is_row_R = r0 + r_R < tl.minimum(_of(rank_X, is_it_X), RANKS)
        d_D = begin + step % STEPS * BLOCK_D + tl.arange(0, BLOCK_D)
        x_pD = tl.load(
            x_TD + t * D + row_p[:, None] * 0 + d_D[None, :], mask=(row_p == 0)[:, None] & (d_D < D)[None, :], other=0.0
        )
        rows_DR = tl.load(
            rows_SV + _of(first_row_X, is_it_X) * V + (r0 + r_R)[None, :] * D + d_D[:, None],
            mask=is_row_R[None, :] & (d_D < D)[:, None],
            other=0.0,
        )
        sum_pR = tl.dot(x_pD.to(DTYPE), rows_DR.to(DTYPE), acc=sum_pR, input_precision="ieee")
        is_last = step % STEPS == STEPS - 1
        at_R = (tl.program_id(1).to(tl.int64) * P + t * X + x) * RANKS + r0 + r_R
        is_stored_R = r_R < tl.where(is_last, _PAIRS, 0)
        tl.store(
            z_CPR + at_R[None, :] + row_p[:, None] * 0,
            sum_pR,
            mask=(row_p == 0)[:, None] & (is_row_R & is_stored_R)[None, :],
        )
        sum_pR = tl.where(is_last, 0.0, sum_pR)


@triton.jit(do_not_specialize=["P", "X", "E"], do_not_specialize_on_alignment=["first_row_E", "rank_E"])
def _shrink_tiles(  # type: ignore[no-untyped-def]
    x_TD, rows_SV, key_P, order_P, tile_P, first_row_E, rank_E, z_PR, P, X, E, D, V, RANKS, DTYPE: tl.constexpr,
    SPLIT_D: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles or fewer, blocks of ranks or fewer). Each program takes every so manieth tile and rank block."""
    take_turn(PDL)
    num_tiles = tl.load(tile_P + P)
    r_R = tl.arange(0, _PAIRS)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, pair_p, is_pair_p = _tile(i, key_P, order_P, tile_P, P, E)
        token_p = pair_p // X
        rows_RD = rows_SV + tl.load(first_row_E + expert) * V
        rank = tl.minimum(tl.load(rank_E + expert), RANKS).to(tl.int32)
        for r0 in range(tl.program_id(1) * _PAIRS, rank, tl.num_programs(1) * _PAIRS):
            z_pR = _bottlenecks(x_TD, rows_RD, token_p, is_pair_p, r0, rank, D, DTYPE, SPLIT_D, BLOCK_D)
            at_pR = pair_p[:, None] * RANKS + (r0 + r_R)[None, :]
            tl.store(z_PR + at_pR, z_pR, mask=is_pair_p[:, None] & (r0 + r_R < rank)[None, :])


@triton.jit
def _coefficients(z_pR, mask_PR, pair_p, is_there_pR, r_R, MASK_R, factor_p, silu, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a tile's bottlenecks become before they meet the up rows; 0 where nothing is."""
    if HAS_MASK:
        z_pR *= tl.load(mask_PR + pair_p[:, None] * MASK_R + r_R[None, :], mask=is_there_pR, other=0.0)
    if silu:
        z_pR = z_pR / (1.0 + tl.exp(-z_pR))
    return tl.where(is_there_pR, z_pR * factor_p[:, None], 0.0)


@triton.jit
def _times_rows(coefficient_pR, rows_RO, r0, rank, n_N, O, sum_pN, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`sum_pN`, and the columns `n_N` of 16 of an adapter expert's rows, from `r0` on, times their coefficients."""
    r_R = tl.arange(0, _PAIRS)
    rows_RN = tl.load(
        rows_RO + (r0 + r_R)[:, None] * O + n_N[None, :],
        mask=(r0 + r_R < rank)[:, None] & (n_N < O)[None, :],
        other=0.0,
    )
    return tl.dot(coefficient_pR.to(DTYPE), rows_RN.to(DTYPE), acc=sum_pN, input_precision="ieee")


@triton.jit
def _delta(  # type: ignore[no-untyped-def]
    expert, pair_p, is_pair_p, n_N, x_TI, down_SV, up_SV, weights_P, down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_PR,
    z_CPR, P, X, I, O, DOWN_V, UP_V, C, RANKS, MASK_R, ACTIVATE: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr,
    SPLIT_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns `n_N` of what an adapter expert adds to up to 16 of its pairs."""
    up_RO = up_SV + tl.load(up_row_E + expert) * UP_V
    rank = tl.load(rank_E + expert).to(tl.int32)
    if ACTIVATE:
        silu = tl.load(silu_E + expert) != 0
        factor_p = tl.load(weights_P + pair_p, mask=is_pair_p, other=0.0).to(tl.float32) * tl.load(scale_E + expert)
    sum_pN = tl.zeros([_PAIRS, BLOCK_N], dtype=tl.float32)
    for r0 in range(0, tl.minimum(rank, RANKS), _PAIRS):
        r_R = r0 + tl.arange(0, _PAIRS)
        is_there_pR = is_pair_p[:, None] & (r_R < rank)[None, :]
        z_pR = tl.zeros([_PAIRS, _PAIRS], dtype=tl.float32)
        for c in range(C):
            at_pR = (pair_p + c * P)[:, None] * RANKS + r_R[None, :]
            z_pR += tl.load(z_CPR + at_pR, mask=is_there_pR, other=0.0)
        if ACTIVATE:
            z_pR = _coefficients(z_pR, mask_PR, pair_p, is_there_pR, r_R, MASK_R, factor_p, silu, HAS_MASK)
        sum_pN = _times_rows(z_pR, up_RO, r0, rank, n_N, O, sum_pN, DTYPE)
    if ACTIVATE:  # ranks that z has no room for
        down_RI = down_SV + tl.load(down_row_E + expert) * DOWN_V
        for r0 in range(RANKS, rank, _PAIRS):
            r_R = r0 + tl.arange(0, _PAIRS)
            is_there_pR = is_pair_p[:, None] & (r_R < rank)[None, :]
            z_pR = _bottlenecks(x_TI, down_RI, pair_p // X, is_pair_p, r0, rank, I, DTYPE, SPLIT_D, BLOCK_D)
            z_pR = _coefficients(z_pR, mask_PR, pair_p, is_there_pR, r_R, MASK_R, factor_p, silu, HAS_MASK)
            sum_pN = _times_rows(z_pR, up_RO, r0, rank, n_N, O, sum_pN, DTYPE)
    return sum_pN


@triton.jit(
    do_not_specialize=["P", "X", "E", "MASK_R"],
    do_not_specialize_on_alignment=["down_row_E", "up_row_E", "rank_E", "scale_E", "silu_E"],
)
def _expand_tokens(  # type: ignore[no-untyped-def]
    y_TO, x_TI, down_SV, up_SV, ids_P, weights_P, down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_PR, z_CPR, out_TO,
    P, X, E, I, O, DOWN_V, UP_V, RANKS, MASK_R, C: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr,
    SPLIT_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, ceil(O / BLOCK_N)): y and what a token's pairs add, one after the other. The blocks of ranks of all of them
    go through one loop, so that the rows of the next pair are on their way while this one's are multiplied."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    o_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_p = tl.arange(0, _PAIRS)
    expert_X, is_inside_X, rank_X, first_X, end_X = _experts(t, ids_P, rank_E, X, E, RANKS, BLOCK_X)
    y_N = tl.load(y_TO + t * O + o_N, mask=o_N < O, other=0.0).to(tl.float32)
    sum_pN = tl.zeros([_PAIRS, BLOCK_N], dtype=tl.float32)
    if tl.max(rank_X, axis=0) <= RANKS:
        up_row_X = tl.load(up_row_E + expert_X, mask=is_inside_X, other=0)
        silu_X = tl.load(silu_E + expert_X, mask=is_inside_X, other=0).to(tl.int32)
        factor_X = tl.load(weights_P + t * X + tl.arange(0, BLOCK_X), mask=is_inside_X, other=0.0).to(tl.float32)
        factor_X *= tl.load(scale_E + expert_X, mask=is_inside_X, other=0.0)
        delta_pN = tl.zeros([_PAIRS, BLOCK_N], dtype=tl.float32)
        for block in range(tl.max(end_X, axis=0)):
            x, is_it_X = _slot(block, end_X, BLOCK_X)
            r0 = (block - _of(first_X, is_it_X)) * _PAIRS
            rank = _of(rank_X, is_it_X)
            r_R = r0 + tl.arange(0, _PAIRS)
            # the one pair that there is, padded to 16 when its coefficients are ready
            pair_1 = t * X + x + tl.arange(0, 1)
            is_there_1R = (r_R < rank)[None, :]
            z_1R = tl.zeros([1, _PAIRS], dtype=tl.float32)
            for c in tl.static_range(C):
                z_1R += tl.load(z_CPR + (pair_1 + c * P)[:, None] * RANKS + r_R[None, :], mask=is_there_1R, other=0.0)
            factor_1 = _of(factor_X, is_it_X) + tl.zeros([1], dtype=tl.float32)
            silu = _of(silu_X, is_it_X) != 0
            z_1R = _coefficients(z_1R, mask_PR, pair_1, is_there_1R, r_R, MASK_R, factor_1, silu, HAS_MASK)
            z_pR = tl.where((row_p == 0)[:, None], z_1R, 0.0)
            delta_pN = _times_rows(z_pR, up_SV + _of(up_row_X, is_it_X) * UP_V, r0, rank, o_N, O, delta_pN, DTYPE)
            is_last = block + 1 == _of(end_X, is_it_X)
            sum_pN += tl.where(is_last, delta_pN, 0.0)
            delta_pN = tl.where(is_last, 0.0, delta_pN)
    else:
        for x in range(X):
            expert = tl.load(ids_P + t * X + x)
            if (expert >= 0) & (expert < E):
                sum_pN += _delta(
                    expert, (row_p * 0 + x).to(tl.int64) + t * X, row_p == 0, o_N, x_TI, down_SV, up_SV, weights_P,
                    down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_PR, z_CPR, P, X, I, O, DOWN_V, UP_V, C, RANKS,
                    MASK_R, True, HAS_MASK, DTYPE, SPLIT_D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
    delta_N = tl.sum(tl.where((row_p == 0)[:, None], sum_pN, 0.0), axis=0)
    tl.store(out_TO + t * O + o_N, (y_N + delta_N).to(out_TO.dtype.element_ty), mask=o_N < O)


@triton.jit(
    do_not_specialize=["P", "X", "E", "MASK_R", "first_column"],
    do_not_specialize_on_alignment=["down_row_E", "up_row_E", "rank_E", "scale_E", "silu_E"],
)
def _expand_tiles(  # type: ignore[no-untyped-def]
    x_TI, down_SV, up_SV, key_P, order_P, tile_P, weights_P, down_row_E, up_row_E, rank_E, scale_E, silu_E, mask_PR, z_PR,
    delta_PN, P, X, E, I, O, DOWN_V, UP_V, RANKS, MASK_R, first_column, N, ACTIVATE: tl.constexpr, HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr, SPLIT_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles or fewer, ceil(N / BLOCK_N)): the delta of each pair from column `first_column` on. Without ACTIVATE, z holds
    the coefficients themselves.
    """
    take_turn(PDL)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in range(tl.program_id(0), tl.load(tile_P + P), tl.num_programs(0)):
        expert, pair_p, is_pair_p = _tile(i, key_P, order_P, tile_P, P, E)
        sum_pN = _delta(
            expert, pair_p, is_pair_p, first_column + n_N, x_TI, down_SV, up_SV, weights_P, down_row_E, up_row_E, rank_E,
            scale_E, silu_E, mask_PR, z_PR, P, X, I, O, DOWN_V, UP_V, 1, RANKS, MASK_R, ACTIVATE, HAS_MASK, DTYPE, SPLIT_D,
            BLOCK_D, BLOCK_N,
        )  # fmt: skip
        tl.store(delta_PN + pair_p[:, None] * N + n_N[None, :], sum_pN, mask=is_pair_p[:, None] & (n_N < N)[None, :])


@triton.jit(do_not_specialize=["X", "E", "first_column"], do_not_specialize_on_alignment=["rank_E"])
def _combine(  # type: ignore[no-untyped-def]
    y_TO, ids_P, rank_E, delta_PN, out_TO, X, E, O, first_column, N, HAS_Y: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Grid (T, ceil(N / BLOCK_N)): y, if there is one, and the deltas of a token's pairs in the order of its slots."""
    t = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    delta_N = tl.zeros([BLOCK_N], dtype=tl.float32)
    for x in range(X):
        pair = t * X + x
        expert = tl.load(ids_P + pair)
        is_active = (expert >= 0) & (expert < E)
        is_active = tl.load(rank_E + expert, mask=is_active, other=0) > 0
        delta_N += tl.load(delta_PN + pair * N + n_N, mask=n_N < tl.where(is_active, N, 0), other=0.0)
    at_N = t * O + first_column + n_N
    if HAS_Y:
        delta_N = tl.load(y_TO + at_N, mask=n_N < N, other=0.0).to(tl.float32) + delta_N
    tl.store(out_TO + at_N, delta_N.to(out_TO.dtype.element_ty), mask=n_N < N)


@triton.jit(do_not_specialize=["P", "E", "RANKS", "MASK_R"])
def _bottleneck_gradients(  # type: ignore[no-untyped-def]
    ids_P,
    weights_P,
    rank_E,
    scale_E,
    silu_E,
    mask_PR,
    z_PR,
    b_PR,
    grad_weights_P,
    P,
    E,
    RANKS,
    MASK_R,
    HAS_MASK: tl.constexpr,
):
    """Grid (ceil(P / 16),). `z`: the bottlenecks; `b`: the gradient seen through up, before the weight. In their places come
    the gradient of the bottlenecks as down has made them, and the coefficients that up was multiplied with.
    """
    pair_p = tl.program_id(0).to(tl.int64) * _PAIRS + tl.arange(0, _PAIRS)
    expert_p = tl.load(ids_P + pair_p, mask=pair_p < P, other=-1)
    is_inside_p = (expert_p >= 0) & (expert_p < E)
    rank_p = tl.load(rank_E + expert_p, mask=is_inside_p, other=0)
    scale_p = tl.load(scale_E + expert_p, mask=is_inside_p, other=0.0)
    is_silu_p = tl.load(silu_E + expert_p, mask=is_inside_p, other=0) != 0
    factor_p = tl.load(weights_P + pair_p, mask=is_inside_p, other=0.0).to(tl.float32) * scale_p
    sum_p = tl.zeros([_PAIRS], dtype=tl.float32)
    for r0 in range(0, tl.max(rank_p, axis=0).to(tl.int32), _PAIRS):
        r_R = r0 + tl.arange(0, _PAIRS)
        is_there_pR = r_R[None, :] < rank_p[:, None]
        at_pR = pair_p[:, None] * RANKS + r_R[None, :]
        z_pR = tl.load(z_PR + at_pR, mask=is_there_pR, other=0.0)
        b_pR = tl.load(b_PR + at_pR, mask=is_there_pR, other=0.0)
        kept_pR = tl.full([_PAIRS, _PAIRS], 1.0, dtype=tl.float32)
        if HAS_MASK:
            kept_pR = tl.load(mask_PR + pair_p[:, None] * MASK_R + r_R[None, :], mask=is_there_pR, other=0.0)
        z_pR *= kept_pR
        sigmoid_pR = 1.0 / (1.0 + tl.exp(-z_pR))
        a_pR = tl.where(is_silu_p[:, None], z_pR * sigmoid_pR, z_pR)
        slope_pR = tl.where(is_silu_p[:, None], sigmoid_pR * (1.0 + z_pR * (1.0 - sigmoid_pR)), 1.0)
        sum_p += tl.sum(a_pR * b_pR, axis=1)
        tl.store(z_PR + at_pR, b_pR * factor_p[:, None] * slope_pR * kept_pR, mask=is_there_pR)
        tl.store(b_PR + at_pR, a_pR * factor_p[:, None], mask=is_there_pR)
    tl.store(grad_weights_P + pair_p, (sum_p * scale_p).to(grad_weights_P.dtype.element_ty), mask=pair_p < P)


@triton.jit(do_not_specialize=["X", "RANKS"])
def _row_gradients(  # type: ignore[no-untyped-def]
    x_TD,
    coefficient_PR,
    order_P,
    end_E,
    first_row_E,
    rank_E,
    grad_SV,
    X,
    D,
    V,
    RANKS,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (E, ceil(RANKS / 16), ceil(D / BLOCK_N)): one program owns 16 rows' columns and goes through the pairs of their
    adapter expert in sorted order. `end_E`: where in that order each adapter expert's pairs end.
    """
    expert = tl.program_id(0).to(tl.int64)
    rank = tl.load(rank_E + expert)
    r_R = tl.program_id(1) * _PAIRS + tl.arange(0, _PAIRS)
    d_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(end_E + expert)
    begin = tl.load(end_E + expert - 1, mask=expert > 0, other=0)
    if tl.program_id(1) * _PAIRS < rank:
        sum_RN = tl.zeros([_PAIRS, BLOCK_N], dtype=tl.float32)
        for place in range(begin, end, BLOCK_P):
            place_p = place + tl.arange(0, BLOCK_P)
            is_pair_p = place_p < end
            pair_p = tl.load(order_P + place_p, mask=is_pair_p, other=0)
            coefficient_Rp = tl.load(
                coefficient_PR + pair_p[None, :] * RANKS + r_R[:, None],
                mask=(r_R < rank)[:, None] & is_pair_p[None, :],
                other=0.0,
            )
            x_pN = tl.load(
                x_TD + (pair_p // X)[:, None] * D + d_N[None, :],
                mask=is_pair_p[:, None] & (d_N < D)[None, :],
                other=0.0,
            )
            sum_RN = tl.dot(coefficient_Rp.to(DTYPE), x_pN.to(DTYPE), acc=sum_RN, input_precision="ieee")
        grad_RD = grad_SV + tl.load(first_row_E + expert) * V
        tl.store(
            grad_RD + r_R[:, None] * D + d_N[None, :],
            sum_RN.to(grad_SV.dtype.element_ty),
            mask=(r_R < rank)[:, None] & (d_N < D)[None, :],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """Tile sizes. They depend on I, O and the device only: a token's sums must not change with the batch.

    Attributes:
        split_D: columns of h that one program of `_shrink_tokens` takes: an eighth or more, which is unrolled after it.
        block_D: columns of h at a time.
        block_N: columns of the output that one program has.
        num_programs: how many programs a launch may have along its first axis where they take tiles in turn.
    """

    split_D: int
    block_D: int
    block_N: int
    num_programs: int

    @classmethod
    def of(cls, in_width: int, out_width: int, device: torch.device) -> _Blocks:
        """The sizes for rank rows of these widths on a device."""
        whole_in, whole_out = (max(triton.next_power_of_2(width), 16) for width in (in_width, out_width))
        return cls(
            split_D=max(min(whole_in, 512), whole_in // 8),
            block_D=min(whole_in, 256),
            block_N=min(whole_out, 128),
            num_programs=8 * _num_processors(device),
        )


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """Who does what: the pairs, and in longer batches their order. See the table above.

    Attributes:
        num_tiles: how many programs have tiles to take; all tiles, if the pairs are not sorted.
    """

    ids_TX: Tensor
    num_tiles: int
    key_P: Tensor | None = None
    order_P: Tensor | None = None
    tile_P: Tensor | None = None

    @property
    def number(self) -> int:
        """P."""
        return self.ids_TX.numel()

    @property
    def arrays(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As the kernels take them."""
        return self.ids_TX, self.key_P, self.order_P, self.tile_P

    @classmethod
    def in_order(cls, ids_TX: Tensor) -> _Pairs:
        """As they come."""
        return cls(ids_TX=ids_TX, num_tiles=ids_TX.numel())

    @classmethod
    def by_expert(cls, ids_TX: Tensor, rank_E: Tensor, blocks: _Blocks) -> _Pairs:
        """Sorted, on the device."""
        num_pairs, num_experts = ids_TX.numel(), rank_E.numel()
        key_P = torch.empty(num_pairs, dtype=torch.int32, device=ids_TX.device)
        _keys[(triton.cdiv(num_pairs, _SORT_BLOCK),)](
            ids_TX, rank_E, key_P, num_pairs, num_experts, BLOCK=_SORT_BLOCK, **gpu.OPTIONS
        )
        key_P, order_P = key_P.sort(stable=True)
        tile_P = torch.empty(num_pairs + 1, dtype=torch.int32, device=ids_TX.device)
        _tiles[(1,)](key_P, tile_P, num_pairs, num_experts, BLOCK=_SORT_BLOCK, **gpu.OPTIONS)
        most = triton.cdiv(num_pairs, _PAIRS.value) + min(num_pairs, num_experts)
        return cls(ids_TX=ids_TX, num_tiles=min(most, blocks.num_programs), key_P=key_P, order_P=order_P, tile_P=tile_P)


class Tables(NamedTuple):
    """The adapter experts' tables, as in the contract."""

    down_row_E: Tensor
    up_row_E: Tensor
    rank_E: Tensor
    scale_E: Tensor
    silu_E: Tensor

    def for_kernels(self) -> Tables:
        """Contiguous, and without a type that has less than a byte."""
        return Tables(
            self.down_row_E.contiguous(),
            self.up_row_E.contiguous(),
            self.rank_E.contiguous(),
            self.scale_E.contiguous(),
            self.silu_E.contiguous().view(torch.uint8),
        )


def _product_dtype(x_TD: Tensor, rows_SV: Tensor) -> tl.dtype:
    if x_TD.dtype == rows_SV.dtype:
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x_TD.dtype, tl.float32)
    return tl.float32


def _shrunk(
    x_TD: Tensor, rows_SV: Tensor, first_row_E: Tensor, rank_E: Tensor, pairs: _Pairs, ranks: int, blocks: _Blocks,
    dtype: tl.dtype,
) -> Tensor:  # fmt: skip
    """z_CPR: each pair's token times the first `ranks` rows of its adapter expert."""
    (num_tokens, hidden_size), width = x_TD.shape, pairs.ids_TX.shape[1]
    rank_blocks = triton.cdiv(ranks, _PAIRS.value)
    num_splits = triton.cdiv(hidden_size, blocks.split_D) if pairs.key_P is None else 1
    z_CPR = torch.empty(num_splits, pairs.number, ranks, dtype=torch.float32, device=x_TD.device)
    sizes = (pairs.number, width, rank_E.numel(), hidden_size, rows_SV.shape[1], ranks)
    settings = {"DTYPE": dtype, "SPLIT_D": blocks.split_D, "BLOCK_D": blocks.block_D, "num_warps": 2, **options()}
    if pairs.key_P is None:
        # a program for each block of few tokens; of many, no more than are resident, so that none has but one to load
        per_token = max(1, min(width * rank_blocks, blocks.num_programs // 2 // (num_tokens * num_splits)))
        _shrink_tokens[(num_tokens, num_splits, per_token)](
            *(x_TD, rows_SV, pairs.ids_TX, first_row_E, rank_E, z_CPR, *sizes),
            BLOCK_X=triton.next_power_of_2(width),
            num_stages=3,
            **settings,
        )
    else:
        _shrink_tiles[(pairs.num_tiles, min(4, rank_blocks))](
            *(x_TD, rows_SV, pairs.key_P, pairs.order_P, pairs.tile_P, first_row_E, rank_E, z_CPR, *sizes),
            num_stages=3,
            **settings,
        )
    return z_CPR


def _expanded(
    y_TO: Tensor | None, x_TI: Tensor, weights_TX: Tensor | None, down_SV: Tensor, up_SV: Tensor, tables: Tables,
    mask_TXR: Tensor | None, pairs: _Pairs, z_CPR: Tensor, blocks: _Blocks, dtype: tl.dtype, out_width: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y and what the pairs add. Without weights, z holds the coefficients themselves."""
    num_tokens, in_width = x_TI.shape
    width, num_experts = pairs.ids_TX.shape[1], tables.rank_E.numel()
    out_TO = torch.empty(num_tokens, out_width, dtype=out_dtype, device=x_TI.device)
    sizes = (
        *(pairs.number, width, num_experts, in_width, out_width, down_SV.shape[1], up_SV.shape[1], z_CPR.shape[2]),
        0 if mask_TXR is None else mask_TXR.shape[2],
    )
    settings = {
        "HAS_MASK": mask_TXR is not None,
        "DTYPE": dtype,
        "SPLIT_D": blocks.split_D,
        "BLOCK_D": min(blocks.block_D, 64),  # only for ranks beyond what z holds: not to take room from the others
        "BLOCK_N": blocks.block_N,
        **options(),
    }
    if pairs.key_P is None:
        _expand_tokens[(num_tokens, triton.cdiv(out_width, blocks.block_N))](
            *(y_TO, x_TI, down_SV, up_SV, pairs.ids_TX, weights_TX, *tables, mask_TXR, z_CPR, out_TO, *sizes),
            C=z_CPR.shape[0],
            BLOCK_X=triton.next_power_of_2(width),
            num_warps=2,
            num_stages=4,
            **settings,
        )
        return out_TO
    per_panel = MAX_DELTA_BYTES // (4 * pairs.number * blocks.block_N) * blocks.block_N
    panel = min(out_width, max(per_panel, blocks.block_N))
    delta_PN = torch.empty(pairs.number * panel, dtype=torch.float32, device=x_TI.device)
    for first_column in range(0, out_width, panel):
        num_columns = min(panel, out_width - first_column)
        _expand_tiles[(pairs.num_tiles, triton.cdiv(num_columns, blocks.block_N))](
            *(x_TI, down_SV, up_SV, pairs.key_P, pairs.order_P, pairs.tile_P, weights_TX, *tables, mask_TXR, z_CPR),
            *(delta_PN, *sizes, first_column, num_columns),
            ACTIVATE=weights_TX is not None,
            num_warps=4,
            num_stages=2,
            **settings,
        )
        _combine[(num_tokens, triton.cdiv(num_columns, 512))](
            *(y_TO, pairs.ids_TX, tables.rank_E, delta_PN, out_TO),
            *(width, num_experts, out_width, first_column, num_columns),
            HAS_Y=y_TO is not None,
            BLOCK_N=512,
            **gpu.OPTIONS,
        )
    return out_TO


def routed_units(
    y_TO: Tensor,
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SV: Tensor,
    up_SV: Tensor,
    down_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None = None,
) -> Tensor:
    """As `routed_units_reference`."""
    if ids_TX.numel() == 0 or rank_E.numel() == 0:
        return y_TO.clone()
    tables = Tables(down_row_E, up_row_E, rank_E, scale_E, silu_E).for_kernels()
    y_TO, h_TI, ids_TX, weights_TX = y_TO.contiguous(), h_TI.contiguous(), ids_TX.contiguous(), weights_TX.contiguous()
    down_SV, up_SV = down_SV.contiguous(), up_SV.contiguous()
    mask_TXR = None if mask_TXR is None else mask_TXR.contiguous()
    blocks = _Blocks.of(h_TI.shape[1], y_TO.shape[1], h_TI.device)
    dtype = _product_dtype(h_TI, down_SV)
    largest = min(_RANKS, down_SV.shape[0] if mask_TXR is None else mask_TXR.shape[2])
    with gpu.on_device_of(h_TI):
        is_decode = h_TI.shape[0] <= MAX_DECODE_TOKENS
        pairs = _Pairs.in_order(ids_TX) if is_decode else _Pairs.by_expert(ids_TX, tables.rank_E, blocks)
        z_CPR = _shrunk(h_TI, down_SV, tables.down_row_E, tables.rank_E, pairs, _whole(largest), blocks, dtype)
        return _expanded(
            *(y_TO, h_TI, weights_TX, down_SV, up_SV, tables, mask_TXR, pairs, z_CPR, blocks, dtype),
            *(y_TO.shape[1], y_TO.dtype),
        )


def routed_units_backward(
    grad_TO: Tensor,
    h_TI: Tensor,
    ids_TX: Tensor,
    weights_TX: Tensor,
    down_SV: Tensor,
    up_SV: Tensor,
    down_row_E: Tensor,
    up_row_E: Tensor,
    rank_E: Tensor,
    scale_E: Tensor,
    silu_E: Tensor,
    mask_TXR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `routed_units_backward_reference`; the rows of two adapter experts must not overlap. The host waits for the largest
    rank. In bfloat16 throughout, products are of bfloat16 with float32 sums; otherwise all is float32.
    """
    grad_down_SV, grad_up_SV = torch.zeros_like(down_SV), torch.zeros_like(up_SV)
    ranks = _whole(int(rank_E.max())) if rank_E.numel() and ids_TX.numel() else 0
    if ranks == 0:
        return torch.zeros_like(h_TI), torch.zeros_like(weights_TX), grad_down_SV, grad_up_SV
    tables = Tables(down_row_E, up_row_E, rank_E, scale_E, silu_E).for_kernels()
    grad_TO, h_TI, ids_TX, weights_TX = (t.contiguous() for t in (grad_TO, h_TI, ids_TX, weights_TX))
    down_SV, up_SV = down_SV.contiguous(), up_SV.contiguous()
    mask_TXR = None if mask_TXR is None else mask_TXR.contiguous()
    in_width, out_width, num_experts = h_TI.shape[1], grad_TO.shape[1], rank_E.numel()
    blocks, turned = (_Blocks.of(*widths, h_TI.device) for widths in ((in_width, out_width), (out_width, in_width)))
    is_bfloat16 = all(t.dtype == torch.bfloat16 for t in (grad_TO, h_TI, down_SV, up_SV))
    dtype = tl.bfloat16 if is_bfloat16 else tl.float32
    grad_weights_TX = torch.empty_like(weights_TX)
    with gpu.on_device_of(h_TI):
        pairs = _Pairs.by_expert(ids_TX, tables.rank_E, blocks)
        assert pairs.key_P is not None
        assert pairs.order_P is not None
        z_1PR = _shrunk(h_TI, down_SV, tables.down_row_E, tables.rank_E, pairs, ranks, blocks, dtype)
        b_1PR = _shrunk(grad_TO, up_SV, tables.up_row_E, tables.rank_E, pairs, ranks, turned, dtype)
        _bottleneck_gradients[(triton.cdiv(pairs.number, _PAIRS.value),)](
            *(
                ids_TX,
                weights_TX,
                tables.rank_E,
                tables.scale_E,
                tables.silu_E,
                mask_TXR,
                z_1PR,
                b_1PR,
                grad_weights_TX,
            ),
            *(pairs.number, num_experts, ranks, 0 if mask_TXR is None else mask_TXR.shape[2]),
            HAS_MASK=mask_TXR is not None,
            **gpu.OPTIONS,
        )
        through_down = tables._replace(up_row_E=tables.down_row_E)
        grad_h_TI = _expanded(
            *(None, h_TI, None, down_SV, down_SV, through_down, None, pairs, z_1PR, turned, dtype),
            *(in_width, h_TI.dtype),
        )
        experts_E = torch.arange(num_experts, dtype=torch.int32, device=h_TI.device)
        end_E = torch.searchsorted(pairs.key_P, experts_E, right=True)
        for x_TD, coefficient_1PR, first_row_E, grad_SV in (
            (h_TI, z_1PR, tables.down_row_E, grad_down_SV),
            (grad_TO, b_1PR, tables.up_row_E, grad_up_SV),
        ):
            width, block_N = x_TD.shape[1], min(turned.block_N, blocks.block_N)
            _row_gradients[(num_experts, triton.cdiv(ranks, _PAIRS.value), triton.cdiv(width, block_N))](
                *(x_TD, coefficient_1PR, pairs.order_P, end_E, first_row_E, tables.rank_E, grad_SV),
                *(ids_TX.shape[1], width, grad_SV.shape[1], ranks),
                DTYPE=dtype,
                BLOCK_P=32,
                BLOCK_N=block_N,
                num_warps=4,
                num_stages=2,
                **gpu.OPTIONS,
            )
    return grad_h_TI, grad_weights_TX, grad_down_SV, grad_up_SV


def _whole(ranks: int) -> int:
    """Rounded up to whole tiles."""
    return triton.cdiv(ranks, _PAIRS.value) * _PAIRS.value
