"""From logits to tokens and log-probabilities.

A sampled token depends on the logits, the request's seed and the token's position, and on nothing else: no generator has a
state, so neighbours, chunking and preemption cannot change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from perft_serve.engine.events import TokenLogprobs
from perft_serve.engine.params import SamplingParams


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_BV: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> tuple[list[int], list[bool]]:
    """Choose a token for each row.

    Args:
        logits_BV: float32; not changed.
        params: of each row.
        draws: a number in [0, 1) for each row; greedy rows do not use it.

    Returns:
        (token ids, whether each row's logits are free of NaN; the token of a row that is not has no meaning).
    """
    best_B, tokens_B = logits_BV.max(dim=-1)
    fine = (~best_B.isnan()).tolist()
    tokens: list[int] = tokens_B.tolist()
    rows = [i for i, p in enumerate(params) if not p.greedy and fine[i]]
    if rows:
        chosen = _sample_rows(logits_BV[rows], [params[i] for i in rows], [draws[i] for i in rows])
        for i, token in zip(rows, chosen, strict=True):
            tokens[i] = token
    return tokens, fine


def _sample_rows(logits_BV: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Inverse-CDF sampling after temperature, then top-k, top-p and min-p, each on what the one before left."""
    device, vocab_size = logits_BV.device, logits_BV.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

    probs_BV = torch.softmax(logits_BV.double() / column([p.temperature for p in params]), dim=-1)
    filtered = any(p.top_k or p.top_p < 1 or p.min_p > 0 for p in params)
    order_BV = None
    if filtered:
        probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(vocab_size, device=device)
        probs_BV = torch.where(rank_V < column([float(p.top_k or vocab_size) for p in params]), probs_BV, 0.0)
        before_BV = probs_BV.cumsum(-1) - probs_BV  # mass of the likelier ones: the first is always kept
        mass_B1 = probs_BV.sum(-1, keepdim=True)
        probs_BV = torch.where(before_BV < column([p.top_p for p in params]) * mass_B1, probs_BV, 0.0)
        probs_BV = torch.where(probs_BV >= column([p.min_p for p in params]) * probs_BV[:, :1], probs_BV, 0.0)
    cdf_BV = probs_BV.cumsum(-1)
    target_B1 = column(list(draws)) * cdf_BV[:, -1:]
    index_B1 = torch.searchsorted(cdf_BV, target_B1, right=True).clamp(max=vocab_size - 1)
    if order_BV is not None:
        index_B1 = order_BV.gather(1, index_B1)
    return index_B1.squeeze(1).tolist()


def token_logprobs(logits_NV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of the model's own distribution (before temperature) for each row.

    Args:
        logits_NV: float32.
        token_ids: the token to report in each row.
        num_top: how many of the likeliest tokens to report besides.
    """
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    chosen = logprobs_NV.gather(1, torch.tensor(token_ids, device=logits_NV.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(num_top), logits_NV.shape[1])
    top_values, top_ids = (t.tolist() for t in logprobs_NV.topk(most, dim=-1))
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids[:n], values[:n], strict=True)))
        for token, logprob, ids, values, n in zip(token_ids, chosen, top_ids, top_values, num_top, strict=True)
    ]
