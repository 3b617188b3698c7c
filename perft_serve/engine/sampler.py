"""From logits to tokens and log-probabilities.

A sampled token depends on the logits, the request's seed and the token's position, and on nothing else: no generator has a
state, so neighbours, chunking and preemption cannot change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from perft_kernels.argmax import argmax
from perft_serve.engine.events import TokenLogprobs
from perft_serve.engine.params import SamplingParams
from perft_serve.engine.transfer import to_device, to_host

Fault: TypeAlias = Literal["nan", "nothing left"]

# What stands in place of a token where none can be chosen
FAULTS: dict[int, Fault] = {-1: "nan", -2: "nothing left"}


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
) -> Tensor:
    """Choose a token for each row; nothing of it is read back from the device.

    Args:
        logits_BV: float32; not changed.
        params: of each row.
        draws: a number in [0, 1) for each row; greedy rows do not use it.
        edited: the logits of some rows as they are to be taken.

    Returns:
        Token ids `[B]`; one of `FAULTS` where there is none: the row's logits hold a NaN (its own, not those that stand in), or
        no token may be taken.
    """
    best_B = argmax(logits_BV)
    if edited is None and all(each.greedy for each in params):
        return best_B
    tokens_B = best_B
    place: dict[int, int] = {}  # of the edited rows
    if edited is not None:
        place = {row: r for r, row in enumerate(edited.rows)}
        likeliest_R = argmax(edited.logits_RV)
        most_R = edited.logits_RV.gather(1, likeliest_R.clamp(min=0).unsqueeze(1)).squeeze(1)
        likeliest_R = torch.where(most_R == -math.inf, -2, likeliest_R)
        tokens_B = best_B.index_copy(0, to_device(edited.rows, torch.int64, best_B.device), likeliest_R)
    likeliest_B = tokens_B
    sampled = [i for i, p in enumerate(params) if not p.greedy]
    for choose, is_filtered in ((_from_all, False), (_from_likeliest, True)):
        rows = [i for i in sampled if _is_filtered(params[i]) == is_filtered]
        if rows:
            temperature_B1 = _column([params[i].temperature for i in rows], logits_BV)
            rows_B = to_device(rows, torch.int64, logits_BV.device)
            some_BV = logits_BV[rows_B]  # a copy
            if edited is not None and (changed := [b for b, i in enumerate(rows) if i in place]):
                some_BV[changed] = edited.logits_RV[[place[rows[b]] for b in changed]]
            probs_BV = torch.softmax(some_BV.double() / temperature_B1, dim=-1)
            chosen_B = choose(probs_BV, [params[i] for i in rows], _column([draws[i] for i in rows], logits_BV))
            tokens_B = tokens_B.index_copy(0, rows_B, chosen_B)
    return torch.where(best_B < 0, best_B, torch.where(likeliest_B < 0, likeliest_B, tokens_B))


def _is_filtered(params: SamplingParams) -> bool:
    return bool(params.top_k) or params.top_p < 1 or params.min_p > 0


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(values, torch.float64, like.device).unsqueeze(1)


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


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities in tensors: on the device, or on their way to the host.

    Args:
        tokens_N: the token that each row tells of.
        chosen_N: its log-probability.
        rank_N: 1 and how many tokens are likelier.
        top_ids_NK, top_NK: the likeliest tokens and their log-probabilities.
        num_top: how many of those each row tells.
    """

    tokens_N: Tensor
    chosen_N: Tensor
    rank_N: Tensor
    top_ids_NK: Tensor
    top_NK: Tensor
    num_top: tuple[int, ...]

    def to_host(self) -> Scores:
        """The same in host memory, once what was launched so far is done."""
        return Scores(
            tokens_N=to_host(self.tokens_N),
            chosen_N=to_host(self.chosen_N),
            rank_N=to_host(self.rank_N),
            top_ids_NK=to_host(self.top_ids_NK),
            top_NK=to_host(self.top_NK),
            num_top=self.num_top,
        )

    def read(self) -> list[TokenLogprobs]:
        """Each row's."""
        columns = (self.tokens_N, self.chosen_N, self.rank_N, self.top_ids_NK, self.top_NK)
        return [
            TokenLogprobs(token, logprob, tuple(zip(ids[:n], values[:n], strict=True)), rank)
            for token, logprob, rank, ids, values, n in zip(*(t.tolist() for t in columns), self.num_top, strict=True)
        ]


def score(logits_NV: Tensor, tokens_N: Tensor, num_top: Sequence[int]) -> Scores:
    """Log-probabilities of the model's own distribution (before temperature) for each row.

    Args:
        logits_NV: float32.
        tokens_N: the token to report in each row; what is said of one below 0 has no meaning.
        num_top: how many of the likeliest tokens to report besides.
    """
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    chosen_N1 = logprobs_NV.gather(1, tokens_N.clamp(min=0).unsqueeze(1))
    rank_N = 1 + (logprobs_NV > chosen_N1).sum(1)
    top_NK, top_ids_NK = logprobs_NV.topk(min(max(num_top), logits_NV.shape[1]), dim=-1)
    return Scores(tokens_N, chosen_N1.squeeze(1), rank_N, top_ids_NK, top_NK, tuple(num_top))
