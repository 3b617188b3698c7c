"""`stored_linear` against plain torch, in plain torch and in Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perft_kernels.linear import stored_linear

BACKENDS = ("torch", "triton")
pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
# Relative RMS error; what is rounded to the dtype is the output.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
GPU_ONLY = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter is wrong in it"),
)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5).to(dtype)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, device: torch.device) -> Tensor:
    y: Tensor = stored_linear(x.to(device), weight.to(device), None if bias is None else bias.to(device))
    return y.cpu()


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_ONLY])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 70, 150])
@pytest.mark.parametrize("has_bias", [False, True])
def test_against_torch(has_bias: bool, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(num_tokens, 70, seed=1, dtype=dtype), random(75, 70, seed=2, dtype=dtype)
    bias = random(75, seed=3, dtype=dtype) if has_bias else None
    got = run(x, weight, bias, device)
    assert got.dtype == dtype
    assert got.shape == (num_tokens, 75)
    if num_tokens:
        assert error(got, plain(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_ONLY])
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_tokens"),
    [(1, 1, 1), (16, 512, 3), (33, 513, 20), (5, 1153, 33)],
    ids=["one", "whole-tiles", "one-too-many", "third-round"],
)
def test_columns(num_rows: int, num_columns: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Each part has columns of one round, of several, or none."""
    x = random(num_tokens, num_columns, seed=1, dtype=dtype)
    weight = random(num_rows, num_columns, seed=2, dtype=dtype)
    assert error(run(x, weight, None, device), plain(x, weight, None)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(4100, 2), (8200, 20), (4100, 70)])
def test_rows_enough_for_larger_tiles(num_rows: int, num_tokens: int, device: torch.device) -> None:
    x, weight = random(num_tokens, 20, seed=1, dtype=torch.float16), random(num_rows, 20, seed=2, dtype=torch.float16)
    assert error(run(x, weight, None, device), plain(x, weight, None)) < TOLERANCE[torch.float16]


def test_rows_that_lie_apart(device: torch.device) -> None:
    """Tokens and weight are columns of wider matrices, whose other columns are not read."""
    wide_x, wide_weight = random(5, 90, seed=1), random(20, 64, seed=2)
    wide_x[:, 60:], wide_weight[:, 50:] = float("nan"), float("nan")
    x, weight = wide_x.to(device)[:, 10:60], wide_weight.to(device)[:, :50]
    got = stored_linear(x, weight, None).cpu()
    assert error(got, plain(wide_x[:, 10:60], wide_weight[:, :50], None)) < TOLERANCE[torch.float32]
    transposed = random(50, 5, seed=3).to(device).T
    assert error(stored_linear(transposed, weight, None).cpu(), plain(transposed.cpu(), weight.cpu(), None)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_ONLY])
def test_a_token_does_not_depend_on_its_neighbours(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Bit by bit: alone, and among any number of others, NaN among them. (Interpreted, the products of tiles are NumPy's, whose
    order depends on their shape on some processors.)
    """
    if backend == "torch":
        pytest.skip("a GEMM of torch's sums in an order that depends on the number of its rows")
    on_gpu = device.type == "cuda"
    num_tokens, num_rows, num_columns = (300, 2048, 2048) if on_gpu else (150, 40, 600)
    x = random(num_tokens, num_columns, seed=1, dtype=dtype)
    weight, bias = random(num_rows, num_columns, seed=2, dtype=dtype), random(num_rows, seed=3, dtype=dtype)
    x[7] = float("nan")
    together = run(x, weight, bias, device)
    assert together[7].isnan().all()
    assert together[torch.arange(num_tokens) != 7].isfinite().all()
    rounding = 0.0 if on_gpu else 16 * torch.finfo(dtype).eps
    for some in ([0], [8, 9, 10, 11], [149], range(8, 28), range(60, 110), [t for t in range(num_tokens) if t != 7]):
        apart = run(x[list(some)], weight, bias, device)
        torch.testing.assert_close(apart, together[list(some)], rtol=rounding, atol=rounding)


def test_the_op_is_well_formed(device: torch.device) -> None:
    x, weight, bias = (t.to(device) for t in (random(2, 24, seed=1), random(20, 24, seed=2), random(20, seed=3)))
    for given in (bias, None):
        torch.library.opcheck(stored_linear.op, (x, weight, given), test_utils=("test_schema", "test_faketensor"))
