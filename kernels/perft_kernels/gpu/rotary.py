"""`rotary_kv_write` in Triton: one launch, one program a head of a token. In: what its contract says. Out: the same.

A program whose head is normalised with all the token's heads reads them all for the sum of their squares, in the order of
`gpu/rms_norm.py`: they are few, and all programs of a token find them in the cache. A head is read twice, the second time with
its halves exchanged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perft_kernels import gpu
from perft_kernels.gpu.launch import options, take_turn
from perft_kernels.gpu.rms_norm import inverse_rms, tile_size


@triton.jit
def _rotated(  # type: ignore[no-untyped-def]
    x_XC, head, head_stride, weight, cos_C, sin_C, epsilon, X, C: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr,
    C_TILE: tl.constexpr, ROW_TILE: tl.constexpr,
):  # fmt: skip
    """A head of a token, normalised (NORM: 0 not, 1 by itself, 2 with the token's others) and rotated, in float32.

    TURN: how many cosines and sines there are.
    """
    dtype = x_XC.dtype.element_ty
    c_C = tl.arange(0, C_TILE)
    is_there_C = c_C < C
    other_C = tl.where(c_C < C // 2, c_C + C // 2, c_C - C // 2)
    x_C = tl.load(x_XC + head * head_stride + c_C, mask=is_there_C, other=0.0).to(tl.float32)
    turned_C = tl.load(x_XC + head * head_stride + other_C, mask=is_there_C, other=0.0).to(tl.float32)
    if NORM > 0:
        if NORM == 1:
            scale = inverse_rms(x_C, C, epsilon)
        else:
            r_R = tl.arange(0, ROW_TILE)
            at_R = r_R // C * head_stride + r_R % C
            row_R = tl.load(x_XC + at_R, mask=r_R < X * C, other=0.0).to(tl.float32)
            scale = inverse_rms(row_R, X * C, epsilon)
            weight += head * C
        weight_C = tl.load(weight + c_C, mask=is_there_C, other=0.0).to(tl.float32)
        other_weight_C = tl.load(weight + other_C, mask=is_there_C, other=0.0).to(tl.float32)
        x_C = ((x_C * scale).to(dtype).to(tl.float32) * weight_C).to(dtype).to(tl.float32)
        turned_C = ((turned_C * scale).to(dtype).to(tl.float32) * other_weight_C).to(dtype).to(tl.float32)
    turned_C = tl.where(c_C < C // 2, -turned_C, turned_C)
    straight_C = (x_C * tl.load(cos_C + c_C % TURN, mask=is_there_C, other=0.0).to(tl.float32)).to(dtype)
    across_C = (turned_C * tl.load(sin_C + c_C % TURN, mask=is_there_C, other=0.0).to(tl.float32)).to(dtype)
    return straight_C.to(tl.float32) + across_C.to(tl.float32)


@triton.jit
def _rotary_kv_write(  # type: ignore[no-untyped-def]
    q_THC, k_TGC, v_TGC, cos_TC, sin_TC, q_weight, k_weight, k_pages, v_pages, slot_T, out_THC,
    q_stride_t, q_stride_h, k_stride_t, k_stride_g, v_stride_t, v_stride_g, cos_stride, sin_stride,
    H, G, q_epsilon, k_epsilon,
    C: tl.constexpr, CV: tl.constexpr, TURN: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    C_TILE: tl.constexpr, CV_TILE: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, H + G): a token's query heads, then its key heads with their values."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    c_C = tl.arange(0, C_TILE)
    cos_C, sin_C = cos_TC + t * cos_stride, sin_TC + t * sin_stride
    if head < H:
        q_C = _rotated(
            q_THC + t * q_stride_t, head, q_stride_h, q_weight, cos_C, sin_C, q_epsilon, H, C, TURN, Q_NORM, C_TILE,
            Q_TILE,
        )  # fmt: skip
        tl.store(out_THC + (t * H + head) * C + c_C, q_C.to(out_THC.dtype.element_ty), mask=c_C < C)
    else:
        group = head - H
        row = tl.load(slot_T + t) * G + group
        k_C = _rotated(
            k_TGC + t * k_stride_t, group, k_stride_g, k_weight, cos_C, sin_C, k_epsilon, G, C, TURN, K_NORM, C_TILE,
            K_TILE,
        )  # fmt: skip
        tl.store(k_pages + row * C + c_C, k_C.to(k_pages.dtype.element_ty), mask=c_C < C)
        cv_C = tl.arange(0, CV_TILE)
        v_C = tl.load(v_TGC + t * v_stride_t + group * v_stride_g + cv_C, mask=cv_C < CV)
        tl.store(v_pages + row * CV + cv_C, v_C, mask=cv_C < CV)


def rotary_kv_write(
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
    """As the contract in `perft_kernels.rotary`."""
    q_THC, k_TGC, v_TGC, cos_TC, sin_TC = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q_THC, k_TGC, v_TGC, cos_TC, sin_TC)
    )
    (num_tokens, num_heads, width), (_, num_groups, value_width) = q_THC.shape, v_TGC.shape
    out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
    if num_tokens == 0:
        return out_THC
    q_norm, k_norm = (0 if w is None else 1 if w.shape[0] == width else 2 for w in (q_weight, k_weight))
    with gpu.on_device_of(q_THC):
        _rotary_kv_write[num_tokens, num_heads + num_groups](
            *(q_THC, k_TGC, v_TGC, cos_TC, sin_TC, q_THC if q_weight is None else q_weight.contiguous()),
            *(q_THC if k_weight is None else k_weight.contiguous(), k_pages, v_pages, slot_T, out_THC),
            *(q_THC.stride(0), q_THC.stride(1), k_TGC.stride(0), k_TGC.stride(1), v_TGC.stride(0), v_TGC.stride(1)),
            *(cos_TC.stride(0), sin_TC.stride(0), num_heads, num_groups, q_epsilon, k_epsilon),
            C=width,
            CV=value_width,
            TURN=cos_TC.shape[1],
            Q_NORM=q_norm,
            K_NORM=k_norm,
            C_TILE=triton.next_power_of_2(width),
            CV_TILE=triton.next_power_of_2(value_width),
            Q_TILE=tile_size(num_heads * width)[0] if q_norm == 2 else 1,
            K_TILE=tile_size(num_groups * width)[0] if k_norm == 2 else 1,
            num_warps=4 if 2 in (q_norm, k_norm) else 1,
            **options(),
        )
    return out_THC
