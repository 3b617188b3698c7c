"""From logits to tokens and log-probabilities.

A sampled token depends on the logits, the request's seed and the token's position, and on nothing else: no generator has a
state, so neighbours, chunking and preemption cannot change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perft_kernels.argmax import argmax
from perft_serve.engine.events import TokenLogprobs
from perft_serve.engine.params import SamplingParams

Fault = Literal["nan", "nothing left"]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class EditedRows:
    """Logits `logits_RV` (float32) that stand in for those of some rows: what the requests have made of them (`logits.py`)."""

    rows: tuple[int, ...]
    logits_RV: Tensor


def sample(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    draws: Sequence[float],
    edited: EditedRows | None = None,
) -> tuple[list[int], list[Fault | None]]:
    """Choose a token for each row.

    Args:
        logits_BV: float32; not changed.
        params: of each row.
        draws: a number in [0, 1) for each row; greedy rows do not use it.
        edited: the logits of some rows as they are to be taken.

    Returns:
        (token ids, what is wrong with each row if anything is: `nan`, its logits hold a NaN, or `nothing left`, no token may
        be taken; the token of such a row has no meaning).
    """
    tokens: list[int] = argmax(logits_BV).tolist()
    faults: list[Fault | None] = [None if token >= 0 else "nan" for token in tokens]
    place: dict[int, int] = {}  # of the edited rows
    if edited is not None:
        place = {row: r for r, row in enumerate(edited.rows)}
        best_R = argmax(edited.logits_RV)
        most_R = edited.logits_RV.gather(1, best_R.clamp(min=0).unsqueeze(1)).squeeze(1)
        for row, best, most in zip(edited.rows, best_R.tolist(), most_R.tolist(), strict=True):
            tokens[row] = best
            if faults[row] is None and most == -math.inf:
                faults[row] = "nothing left"
    sampled = [i for i, p in enumerate(params) if not p.greedy and faults[i] is None]
    for choose, is_filtered in ((_from_all, False), (_from_likeliest, True)):
        rows = [i for i in sampled if _is_filtered(params[i]) == is_filtered]
        if rows:
            temperature_B1 = _column([params[i].temperature for i in rows], logits_BV)
            some_BV = logits_BV[rows]  # a copy
            if edited is not None and (changed := [b for b, i in enumerate(rows) if i in place]):
                some_BV[changed] = edited.logits_RV[[place[rows[b]] for b in changed]]
            probs_BV = torch.softmax(some_BV.double() / temperature_B1, dim=-1)
            chosen = choose(probs_BV, [params[i] for i in rows], _column([draws[i] for i in rows], logits_BV))
            for i, token in zip(rows, chosen.tolist(), strict=True):
                tokens[i] = token
    return tokens, faults


def _is_filtered(params: SamplingParams) -> bool:
    return bool(params.top_k) or params.top_p < 1 or params.min_p > 0


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


def _from_all(probs_BV: Tensor, params: Sequence[SamplingParams], draws_B1: Tensor) -> Tensor:
    """Inverse-CDF sampling over the whole vocabulary, in its own order: nothing needs to be sorted."""
    return _invert(probs_BV, draws_B1).squeeze(1)


def _from_likeliest(probs_BV: Tensor, params: Sequence[SamplingParams], draws_B1: Tensor) -> Tensor:
    """Inverse-CDF sampling, likeliest first, after top-k, top-p and min-p, each on what the one before left."""
    probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    vocab_size = probs_BV.shape[1]
    rank_V = torch.arange(vocab_size, device=probs_BV.device)
    top_k_B1 = _column([float(p.top_k or vocab_size) for p in params], probs_BV)
    probs_BV = torch.where(rank_V < top_k_B1, probs_BV, 0.0)
    before_BV = probs_BV.cumsum(-1) - probs_BV  # mass of the likelier ones: the first is always kept
    mass_B1 = _column([p.top_p for p in params], probs_BV) * probs_BV.sum(-1, keepdim=True)
    probs_BV = torch.where(before_BV < mass_B1, probs_BV, 0.0)
    least_B1 = _column([p.min_p for p in params], probs_BV) * probs_BV[:, :1]
    probs_BV = torch.where(probs_BV >= least_B1, probs_BV, 0.0)
    return order_BV.gather(1, _invert(probs_BV, draws_B1)).squeeze(1)


def _invert(probs_BV: Tensor, draws_B1: Tensor) -> Tensor:
    """Index `[B, 1]` at which the cumulative mass passes each row's draw."""
    cdf_BV = probs_BV.cumsum(-1)
    target_B1 = draws_B1 * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, target_B1, right=True).clamp(max=probs_BV.shape[1] - 1)


def token_logprobs(logits_NV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of the model's own distribution (before temperature) for each row.

    Args:
        logits_NV: float32.
        token_ids: the token to report in each row.
        num_top: how many of the likeliest tokens to report besides.
    """
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    chosen_N1 = logprobs_NV.gather(1, torch.tensor(token_ids, device=logits_NV.device).unsqueeze(1))
    chosen, ranks = chosen_N1.squeeze(1).tolist(), (1 + (logprobs_NV > chosen_N1).sum(1)).tolist()
    most = min(max(num_top), logits_NV.shape[1])
    top_values, top_ids = (t.tolist() for t in logprobs_NV.topk(most, dim=-1))
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids[:n], values[:n], strict=True)), rank)
        for token, logprob, rank, ids, values, n in zip(
            token_ids, chosen, ranks, top_ids, top_values, num_top, strict=True
        )
    ]
