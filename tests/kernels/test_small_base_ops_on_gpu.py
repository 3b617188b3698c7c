"""What stands between the large products of the base on a GPU (`rms_norm`, `add_rms_norm`, `router_top_k`, `rotary_kv_write`,
`silu_mul`): in plain torch and in Triton, against the operations of Transformers' models.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, apply_rotary_pos_emb

from perft_kernels.base_router import router_top_k
from perft_kernels.paged_attention import kv_write
from perft_kernels.rms_norm import add_rms_norm, rms_norm
from perft_kernels.rotary import rotary_kv_write
from perft_kernels.silu_mul import silu_mul

BACKENDS = ("torch", "triton")
pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
GPU_ONLY = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter does not round to it"),
)
DTYPES = (torch.float32, torch.float16, GPU_ONLY)
# Relative RMS error: what is rounded twice may be rounded otherwise once.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 16), (5, 48), (2, 3, 100), (3, 2304), (0, 8)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    error = (got.float() - want.float()).norm()
    assert error <= TOLERANCE[want.dtype] * want.float().norm()


def norm(weight: Tensor, epsilon: float) -> OlmoeRMSNorm:
    module = OlmoeRMSNorm(weight.shape[0], epsilon)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = random(*shape, dtype=dtype, device=device) * 5
    weight = random(shape[-1], seed=1, dtype=dtype, device=device)
    assert_near(rms_norm(x, weight, 1e-5), norm(weight, 1e-5)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """The sum is torch's to the bit, and its norm that of the sum by itself."""
    x, residual = (random(*shape, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    weight = random(shape[-1], seed=2, dtype=dtype, device=device)
    total, y = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-6))


def test_rows_of_another_tensor(device: torch.device) -> None:
    """Parts of wider rows are normalised where they lie; a row that is not a number harms no other."""
    wide = random(6, 96, dtype=torch.float32, device=device)
    wide[2, 40] = float("nan")
    weight = random(32, seed=1, dtype=torch.float32, device=device)
    y = rms_norm(wide[:, 32:64], weight, 1e-6)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], rms_norm(wide[others, 32:64].contiguous(), weight, 1e-6))


def test_a_row_of_zeros(device: torch.device) -> None:
    weight = random(32, dtype=torch.float32, device=device)
    assert not rms_norm(torch.zeros(2, 32, device=device), weight, 1e-6).any()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (7, 64, 8), (5, 60, 4), (3, 1, 1), (0, 4, 2)]
)
def test_router_top_k(num_tokens: int, num_experts: int, top_k: int, norm: bool, device: torch.device) -> None:
    logits = random(num_tokens, num_experts, dtype=torch.float16, device=device) * 4
    weights, ids = router_top_k(logits, top_k, norm, torch.float32)
    probs = torch.softmax(logits.float(), dim=-1)
    want, _ = probs.topk(top_k)
    assert torch.equal(probs.gather(1, ids), want)  # of equals it may be another
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True) if norm else want)


def test_router_of_equals_takes_the_first(backend: str, device: torch.device) -> None:
    if backend == "torch":
        pytest.skip("torch says nothing of the order of equals")
    logits = torch.zeros(3, 12, device=device)
    logits[1, 5:9] = 1.0
    _, ids = router_top_k(logits, 3, False, torch.float16)
    assert ids.tolist() == [[0, 1, 2], [5, 6, 7], [0, 1, 2]]


def test_router_where_a_logit_is_no_number(device: torch.device) -> None:
    """Ids stay in range, and the weights tell."""
    logits = random(3, 8, dtype=torch.float32, device=device)
    logits[1, 3] = float("nan")
    weights, ids = router_top_k(logits, 2, True, torch.float32)
    assert weights[1].isnan().all()
    assert ((ids >= 0) & (ids < 8)).all()
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", ["none", "row", "head", "queries only"])
@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [(4, 2, 16, 16), (3, 1, 12, 8), (2, 2, 80, 80)])
def test_rotary_kv_write(
    heads: int, groups: int, width: int, value_width: int, norms: str, dtype: torch.dtype, device: torch.device
) -> None:
    """As the modules of a model: norms, `apply_rotary_pos_emb` and `kv_write`, one after the other."""
    num_tokens = 5
    together = random(num_tokens, (heads + groups) * width + groups * value_width, dtype=dtype, device=device)
    q, k, v = together.split([heads * width, groups * width, groups * value_width], dim=1)
    angle = random(num_tokens, width // 2, seed=1, dtype=torch.float32, device=device).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights: list[Tensor | None] = [None, None]
    if norms != "none":
        sizes = (width, width) if norms == "head" else (heads * width, groups * width)
        weights = [random(size, seed=2, dtype=dtype, device=device) + 1 for size in sizes]
        if norms == "queries only":
            weights[1] = None
    slots = torch.tensor([3, 17, 4, 40, 8], device=device)
    pages = [torch.zeros(3, 16, groups, w, dtype=dtype, device=device) for w in (width, value_width)]
    v_heads = v.unflatten(1, (groups, value_width))
    arguments = (*weights, 1e-5, 1e-6, *pages, slots)
    heads_of = (q.unflatten(1, (heads, width)), k.unflatten(1, (groups, width)), v_heads)
    got = rotary_kv_write(*heads_of, cos[:, : width // 2], sin[:, : width // 2], *arguments)
    got_k = pages[0].clone()
    assert torch.equal(rotary_kv_write(*heads_of, cos, sin, *arguments), got)
    assert torch.equal(pages[0], got_k)
    turned = []
    for x, weight, epsilon in ((q, weights[0], 1e-5), (k, weights[1], 1e-6)):
        x_TXC = x.unflatten(1, (-1, width))
        if weight is not None:
            x_TXC = norm(weight, epsilon)(x_TXC if norms == "head" else x).reshape(x_TXC.shape)
        turned.append(x_TXC.transpose(0, 1).unsqueeze(0))
    want_q, want_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*turned, cos.unsqueeze(0), sin.unsqueeze(0)))
    want_pages = [torch.zeros_like(p) for p in pages]
    kv_write(want_k.contiguous(), v_heads, *want_pages, slots)
    assert_near(got, want_q)
    assert_near(pages[0], want_pages[0])
    assert torch.equal(pages[1], want_pages[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 1500), (0, 8)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Of the halves of wider rows, large and small."""
    both = random(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device) * 20
    gate, up = both.chunk(2, dim=-1)
    y = silu_mul(gate, up)
    assert y.is_contiguous()
    assert_near(y, F.silu(gate) * up)


def test_the_ops_are_well_formed(device: torch.device) -> None:
    tests = ("test_schema", "test_faketensor")
    x, weight = (random(*shape, dtype=torch.float32, device=device) for shape in ((3, 16), (16,)))
    torch.library.opcheck(rms_norm.op, (x, weight, 1e-6), test_utils=tests)
    torch.library.opcheck(add_rms_norm.op, (x, x, weight, 1e-6), test_utils=tests)
    torch.library.opcheck(silu_mul.op, (x, x), test_utils=tests)
    torch.library.opcheck(router_top_k.op, (x, 2, True, torch.float16), test_utils=tests)
    heads, pages = x.unflatten(1, (2, 8)), torch.zeros(2, 4, 2, 8, device=device)
    turn, slots = x[:, :8].contiguous(), torch.arange(3, device=device)
    arguments = (heads, heads, heads, turn, turn, weight, weight[:8], 1e-6, 1e-6, pages, pages.clone(), slots)
    torch.library.opcheck(rotary_kv_write.op, arguments, test_utils=tests)
