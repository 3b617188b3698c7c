"""Sampling: the filters' arithmetic, the distribution, and log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from perft_serve.engine.params import SamplingParams
from perft_serve.engine.sampler import FAULTS, sample, score, uniform

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()


def support(**params: float) -> set[int]:
    """Tokens that can come out at all."""
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    draws = [i / 400 for i in range(400)]
    return set(sample(LOGITS.repeat(400, 1), [settings] * 400, draws).tolist())


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"temperature": 0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # top-p counts the mass that top-k left: 0.5/0.875 + 0.25/0.875 > 0.8
        ({"temperature": 0.05}, {0}),
    ],
)
def test_filters(params: dict[str, float], tokens: set[int]) -> None:
    assert support(**params) == tokens


@pytest.mark.parametrize("params", [{}, {"top_p": 0.999999}, {"temperature": 2.0}])
def test_distribution(params: dict[str, float]) -> None:
    """Inverse-CDF draws on a fine grid give each token its share, with and without sorting."""
    count = 20_000
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    tokens = sample(LOGITS.repeat(count, 1), [settings] * count, [(i + 0.5) / count for i in range(count)])
    want = torch.softmax(LOGITS / settings.temperature, -1)
    got = torch.bincount(tokens, minlength=5) / count
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_rows_do_not_mix() -> None:
    """Greedy, filtered and plain rows in one call choose as they do alone; a NaN row is named, the others stand."""
    params = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01),
        SamplingParams(),
    ]
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 50, generator=g)
    logits[4, 7] = float("nan")
    draws = [0.3, 0.9, 0.62, 0.11, 0.5]
    tokens = sample(logits, [*params, SamplingParams()], draws).tolist()
    assert [FAULTS.get(token) for token in tokens] == [None, None, None, None, "nan"]
    for i, one in enumerate(params):
        assert sample(logits[i : i + 1], [one], [draws[i]]).tolist() == [tokens[i]]


def test_draws_at_the_ends() -> None:
    last = math.nextafter(1.0, 0.0)
    for params in (SamplingParams(), SamplingParams(top_k=3)):
        assert sample(LOGITS[None], [params], [0.0]).tolist() == [0]
        assert int(sample(LOGITS[None], [params], [last])) in range(5)
    assert sample(torch.tensor([[-math.inf, 0.0, -math.inf]]), [SamplingParams()], [last]).tolist() == [1]


def test_uniform_is_a_function_of_its_arguments() -> None:
    values = {uniform(seed, choice, position) for seed in range(10) for choice in range(10) for position in range(10)}
    assert len(values) == 1000
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert abs(sum(values) / 1000 - 0.5) < 0.05
    assert all(0 <= value < 1 for value in values)


def test_logprobs_are_of_the_unfiltered_distribution() -> None:
    (one, two) = score(LOGITS.repeat(2, 1), torch.tensor([3, 0]), [2, 0]).read()
    assert one.token_id == 3
    assert one.logprob == pytest.approx(math.log(0.0625), abs=1e-6)
    assert [token for token, _ in one.top] == [0, 1]
    assert one.top[1][1] == pytest.approx(math.log(0.25), abs=1e-6)
    assert (two.token_id, two.top) == (0, ())
