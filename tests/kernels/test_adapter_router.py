"""`adapter_router`: each variant's rule, in a mixed batch, against one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perft_kernels import adapter_router
from perft_kernels.adapter_router import KIND_ALL, KIND_EMBEDDED, KIND_ROUTED, route

BACKENDS = ("native", "torch", "triton")
HIDDEN, NUM_BASE, BASE_TOP_K = 16, 5, 3
# kind, M, k, norm, base rank, first adapter expert
RULES = [
    [KIND_ALL, 1, 0, 0, 0, 0],
    [KIND_ALL, 4, 0, 0, 0, 1],
    [KIND_ROUTED, 6, 2, 0, 0, 5],
    [KIND_ROUTED, 3, 3, 1, 0, 11],
    [KIND_ROUTED, 6, 2, 0, 1, 14],
    [KIND_EMBEDDED, NUM_BASE, 0, 0, 0, 20],
    [KIND_ALL, 0, 0, 0, 0, 0],  # a slot that nobody has
]
WIDTH = 4


def make(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, base ids, base weights, adapter of each token, gate pool, gate rows); NaN between the gates."""
    g = torch.Generator().manual_seed(seed)
    h_TD = torch.randn(tokens, HIDDEN, generator=g)
    weights_TN = torch.softmax(torch.randn(tokens, NUM_BASE, generator=g), -1)
    base_weights_TK, base_ids_TK = weights_TN.topk(BASE_TOP_K)
    adapter_T = torch.randint(-1, len(RULES) + 1, (tokens,), generator=g)
    pool_SD = torch.full((30, HIDDEN), float("nan"))
    gate_row_A = torch.tensor([-1, -1, 2, 9, 13, -1, -1])
    for a in (2, 3, 4):
        pool_SD[gate_row_A[a] : gate_row_A[a] + RULES[a][1]] = torch.randn(RULES[a][1], HIDDEN, generator=g)
    return h_TD, base_ids_TK, base_weights_TK, adapter_T, pool_SD, gate_row_A


def expected(t: int, inputs: tuple[Tensor, ...]) -> list[tuple[int, float]]:
    """(id, weight) of each pair of token t."""
    h_TD, base_ids_TK, base_weights_TK, adapter_T, pool_SD, gate_row_A = inputs
    a = int(adapter_T[t])
    if not 0 <= a < len(RULES):
        return []
    kind, num_experts, top_k, norm, base_rank, first = RULES[a]
    if kind == KIND_ALL:
        return [(first + e, 1.0) for e in range(num_experts)]
    if kind == KIND_EMBEDDED:
        return [(first + int(e), float(w)) for e, w in zip(base_ids_TK[t], base_weights_TK[t], strict=True)]
    row = int(gate_row_A[a])
    probs = torch.softmax(pool_SD[row : row + num_experts] @ h_TD[t], 0)
    chosen = sorted(range(num_experts), key=lambda e: -float(probs[e]))[:top_k]
    weights = [float(probs[e]) for e in chosen]
    if norm:
        weights = [w / sum(weights) for w in weights]
    if base_rank:
        weights = [float(w) for w in base_weights_TK[t].sort(descending=True).values[:top_k]]
    return [(first + e, w) for e, w in zip(chosen, weights, strict=True)]


def run(
    inputs: tuple[Tensor, ...], device: torch.device, rules: list[list[int]] = RULES, width: int = WIDTH
) -> tuple[Tensor, Tensor]:
    """Ids and weights of (h, base ids, base weights, adapter of each token, gate pool, gate rows)."""
    on_device = [t.to(device) for t in inputs]
    ids_TX, weights_TX = adapter_router(*on_device[:5], torch.tensor(rules, device=device), on_device[5], width)
    return ids_TX.cpu(), weights_TX.cpu()


@pytest.mark.parametrize("tokens", [0, 1, 7, 200])
def test_mixed_batch(tokens: int, device: torch.device) -> None:
    inputs = make(tokens)
    ids_TX, weights_TX = run(inputs, device)
    assert (ids_TX.shape, ids_TX.dtype, weights_TX.dtype) == ((tokens, WIDTH), torch.int64, torch.float32)
    for t in range(tokens):
        pairs = [(int(e), float(w)) for e, w in zip(ids_TX[t], weights_TX[t], strict=True) if e >= 0]
        want = expected(t, inputs)
        assert [e for e, _ in pairs] == [e for e, _ in want]
        assert [w for _, w in pairs] == pytest.approx([w for _, w in want], abs=1e-6)
        assert (weights_TX[t][ids_TX[t] < 0] == 0).all()


def test_base_ids_out_of_range_emit_nothing(device: torch.device) -> None:
    """An embedded adapter checks the base's ids against its own M."""
    h_TD, base_ids_TK, base_weights_TK, _, pool_SD, gate_row_A = make(3)
    base_ids_TK[:, 0] = torch.tensor([-1, NUM_BASE, 10**6])
    ids_TX, weights_TX = run((h_TD, base_ids_TK, base_weights_TK, torch.full((3,), 5), pool_SD, gate_row_A), device)
    assert (ids_TX[:, 0] == -1).all()
    assert (weights_TX[:, 0] == 0).all()
    assert (ids_TX[:, 1:BASE_TOP_K] == 20 + base_ids_TK[:, 1:]).all()


def test_a_layer_that_is_not_adapted_emits_nothing(device: torch.device) -> None:
    h_TD, base_ids_TK, base_weights_TK, _, pool_SD, gate_row_A = make(3)
    gate_row_A[2] = -1
    ids_TX, _ = run((h_TD, base_ids_TK, base_weights_TK, torch.full((3,), 2), pool_SD, gate_row_A), device)
    assert (ids_TX == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden"),
    [
        (1, 1, 16),
        (15, 8, 16),
        (17, 8, 300),  # one more than a block of gates, and more columns than a block of those
        (128, 8, 32),
        (129, 1, 32),
    ],
)
def test_many_experts(num_experts: int, top_k: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """Against `route`, one adapter by itself."""
    g = torch.Generator().manual_seed(2)
    h_TD = torch.randn(9, hidden, generator=g).to(dtype)
    gate_MD = (torch.randn(num_experts, hidden, generator=g) / hidden**0.5).to(dtype)
    pool_SD = torch.full((num_experts + 5, hidden), float("nan"), dtype=dtype)
    pool_SD[3 : 3 + num_experts] = gate_MD
    base_TK = torch.zeros(9, 2)
    inputs = (h_TD, base_TK.long(), base_TK, torch.zeros(9, dtype=torch.int64), pool_SD, torch.tensor([3]))
    for norm in (False, True):
        ids_TX, weights_TX = run(inputs, device, [[KIND_ROUTED, num_experts, top_k, int(norm), 0, 7]], top_k)
        want_ids_TX, want_weights_TX = route(h_TD.float() @ gate_MD.float().T, top_k, norm=norm)
        assert (ids_TX == want_ids_TX + 7).all()
        torch.testing.assert_close(weights_TX, want_weights_TX)


def test_equal_logits_have_a_fixed_order(backend: str, device: torch.device) -> None:
    """The smaller ids win, so that two runs never differ; plain torch leaves it to `torch.topk`."""
    h_TD, base_ids_TK, base_weights_TK, _, pool_SD, gate_row_A = make(3)
    pool_SD[2:8] = pool_SD[2]
    ids_TX, weights_TX = run((h_TD, base_ids_TK, base_weights_TK, torch.full((3,), 2), pool_SD, gate_row_A), device)
    if backend != "torch":
        assert (ids_TX[:, :2] == torch.tensor([5, 6])).all()
    torch.testing.assert_close(weights_TX[:, :2], torch.full((3, 2), 1 / 6))


@pytest.mark.filterwarnings("ignore:.*(encountered in|All-NaN):RuntimeWarning")  # numpy, on the NaN put there
def test_a_neighbour_full_of_nan_changes_nothing(device: torch.device) -> None:
    """And a token alone has the bits that it has in the batch."""
    inputs = make(12)
    inputs[3].copy_(torch.arange(12) % len(RULES))
    want = run(inputs, device)
    inputs[4][inputs[5][2] : inputs[5][2] + RULES[2][1]] = float("nan")
    got = run(inputs, device)
    for t in range(12):
        alone = run((*(x[t : t + 1] for x in inputs[:4]), *inputs[4:]), device)
        for got_TX, want_TX, alone_TX in zip(got, want, alone, strict=True):
            if inputs[3][t] != 2:
                torch.testing.assert_close(got_TX[t], want_TX[t], rtol=0, atol=0)
                torch.testing.assert_close(alone_TX[0], want_TX[t], rtol=0, atol=0)


def test_unsorted_base_weights_are_ranked() -> None:
    """`base rank` means the q-th largest weight, whatever order the base router lists them in."""
    _, weights_Tk = route(torch.zeros(1, 4), 2, norm=False, base_weights_TK=torch.tensor([[0.1, 0.6, 0.3]]))
    assert weights_Tk.tolist() == [[pytest.approx(0.6), pytest.approx(0.3)]]


def test_op_is_well_formed(device: torch.device) -> None:
    inputs = [t.to(device) for t in make(5)]
    torch.library.opcheck(adapter_router.op, (*inputs[:5], torch.tensor(RULES, device=device), inputs[5], WIDTH))
