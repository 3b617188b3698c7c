"""`stored_linear` in Triton. In: what its contract says. Out: the same. Nothing is read back to the host.

One launch. A program multiplies a tile of the weight's rows with a tile of tokens: the output transposed, so that the weight is
what a tensor core takes 16 rows of at a time, and the tokens, of which there may be one, are what it takes 8 of.

A token's result is the same to the bit however many tokens there are, since the order of its sums follows from K alone. K is
dealt out to `PARTS` parts, `PART` columns at a time; a part adds from its first column to its last, 16 an instruction, and at
the end the parts' sums are added as (0 + 2) + (1 + 3). How many rows, tokens and columns a tile has decides which sums a
program makes, not how. The instruction is the same for all of them, m16n8k16: Triton takes that of a warpgroup (wgmma), which
adds otherwise, for products of two matrices only, and this is one of `PARTS` pairs at once, a warp each. That also makes the
chain of instructions that wait for each other, which can take as long as reading the weight for one token, four times shorter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.launch import options, take_turn

PARTS = 4
PART = 128
# Programs that give each multiprocessor something to do.
_MANY_PROGRAMS = 128
# What a program may have under way from memory: two programs then fit into a multiprocessor.
_BYTES_IN_FLIGHT = 96 * 1024


def tile_sizes(num_tokens: int, num_rows: int, itemsize: int) -> tuple[int, int, int, int]:
    """(rows, tokens, columns of each part, tiles under way) of a program: of shapes only.

    Larger tiles of rows read the tokens fewer times, as long as there are programs enough. A part has so many columns that
    a tile is more than its threads load at once; otherwise Triton 3.9 lays rows out in banks that collide.
    """
    tokens = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    rows = min(2 * tokens, 64 if itemsize == 2 else 32)
    token_tiles = triton.cdiv(num_tokens, tokens)
    while rows > max(16, tokens // 2) and triton.cdiv(num_rows, rows) * token_tiles < _MANY_PROGRAMS:
        rows //= 2
    columns = 32 if itemsize == 4 else 128 if min(rows, tokens) == 16 else 64
    return rows, tokens, columns, _BYTES_IN_FLIGHT // ((rows + tokens) * PARTS * columns * itemsize)


# What changes from step to step is not specialised: a divisible number of tokens must not cost a compilation.
@triton.jit(do_not_specialize=["T"])
def _linear(
    x_TK, weight_NK, bias_N, y_TN, T, N, K, x_stride, weight_stride,
    HAS_BIAS: tl.constexpr, N_TILE: tl.constexpr, T_TILE: tl.constexpr, K_TILE: tl.constexpr,
    NUM_PARTS: tl.constexpr, PART_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T / T_TILE, N / N_TILE): programs that share rows of the weight run side by side, so that it is read from
    memory once. In the axes of tiles, P is the parts and K the columns of a part."""
    take_turn(PDL)
    t_T = tl.program_id(0) * T_TILE + tl.arange(0, T_TILE)
    n_N = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    k_PK = tl.arange(0, NUM_PARTS)[:, None] * PART_SIZE + tl.arange(0, K_TILE)[None, :]
    # rows beyond the last are the last once more, and not stored
    row_N = tl.minimum(n_N, N - 1).to(tl.int64)
    weight_at = weight_NK + row_N[None, :, None] * weight_stride + k_PK[:, None, :]
    x_at = x_TK + t_T.to(tl.int64)[None, None, :] * x_stride + k_PK[:, :, None]
    sums_PNT = tl.zeros([NUM_PARTS, N_TILE, T_TILE], tl.float32)
    STEPS: tl.constexpr = PART_SIZE // K_TILE
    for step in range(tl.cdiv(K, NUM_PARTS * PART_SIZE) * STEPS):
        k0 = step // STEPS * (NUM_PARTS * PART_SIZE) + step % STEPS * K_TILE
        inside_PK = k_PK < K - k0
        weight_PNK = tl.load(weight_at + k0, mask=inside_PK[:, None, :], other=0.0)
        x_PKT = tl.load(x_at + k0, mask=inside_PK[:, :, None] & (t_T < T)[None, None, :], other=0.0)
        sums_PNT = tl.dot(weight_PNK, x_PKT, sums_PNT, input_precision="ieee")
    # not tl.sum, whose order is that of the threads that have the parts
    first_NT2, second_NT2 = tl.split(tl.permute(tl.reshape(sums_PNT, [2, 2, N_TILE, T_TILE]), [2, 3, 1, 0]))
    even_NT, odd_NT = tl.split(first_NT2 + second_NT2)
    y_NT = even_NT + odd_NT
    if HAS_BIAS:
        y_NT += tl.load(bias_N + row_N).to(tl.float32)[:, None]
    y_at = y_TN + t_T.to(tl.int64)[None, :] * N + n_N[:, None]
    tl.store(y_at, y_NT.to(y_TN.dtype.element_ty), mask=(n_N < N)[:, None] & (t_T < T)[None, :])


def stored_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """As the contract in `perft_kernels.linear`; the last axes lie in one piece."""
    (num_tokens, num_columns), num_rows = x_TK.shape, weight_NK.shape[0]
    y_TN = x_TK.new_empty(num_tokens, num_rows)
    if y_TN.numel() == 0:
        return y_TN
    rows, tokens, columns, num_tiles = tile_sizes(num_tokens, num_rows, x_TK.element_size())
    with gpu.on_device_of(x_TK):
        _linear[triton.cdiv(num_tokens, tokens), triton.cdiv(num_rows, rows)](
            *(x_TK, weight_NK, x_TK if bias_N is None else bias_N, y_TN),
            *(num_tokens, num_rows, num_columns, x_TK.stride(0), weight_NK.stride(0)),
            HAS_BIAS=bias_N is not None,
            N_TILE=rows,
            T_TILE=tokens,
            K_TILE=columns,
            NUM_PARTS=PARTS,
            PART_SIZE=PART,
            num_warps=PARTS,
            num_stages=num_tiles + 1,
            **options(),
        )
    return y_TN
