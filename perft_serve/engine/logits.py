"""What a request changes about its logits before a token is chosen: bias, penalties, and tokens that it may not take.

In: float32 logits of the rows that ask for it, a copy that is changed in place, and the sequences they belong to. Knows
nothing of temperature and filters (`sampler.py`), and of log-probabilities, which are of the logits before.

All rows are edited together, as pairs of row and token: what there is to do depends on how many tokens are concerned, not on
the vocabulary. What penalties count is kept with the sequence and grows with it, a token a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from perft_serve.engine.sequence import Sequence


class TokenCounts:
    """The distinct tokens of a sequence that penalties concern, and how often each was generated.

    Args:
        prompt_ids: what counts as seen, though not as generated.
    """

    def __init__(self, prompt_ids: Seq[int], device: torch.device) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._slot = {token: slot for slot, token in enumerate(distinct)}
        capacity = 2 * len(distinct) + 64
        self._tokens = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._tokens[: len(distinct)] = torch.tensor(distinct, dtype=torch.int64, device=device)

    @property
    def tokens_n(self) -> Tensor:
        """The tokens, in the order in which they came."""
        return self._tokens[: len(self._slot)]

    @property
    def counts_n(self) -> Tensor:
        """How often each was generated."""
        return self._counts[: len(self._slot)]

    def add(self, token: int) -> None:
        """`token` was generated."""
        slot = self._slot.get(token)
        if slot is None:
            slot = self._slot[token] = len(self._slot)
            if slot == len(self._tokens):
                self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)])
                self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._tokens[slot] = token
        self._counts[slot] += 1


class SequenceEdits:
    """What one sequence asks for, as tensors, and what it has generated as far as that matters.

    Attributes:
        bias: tokens and what is added to their logits, or `None`.
        counts: what penalties count, or `None`.
        allowed_n: the only tokens that may be taken, or `None`: all.
    """

    def __init__(self, seq: Sequence, eos_token_ids: frozenset[int], vocab_size: int, device: torch.device) -> None:
        params = seq.request.params

        def ids(tokens: Seq[int]) -> Tensor:
            return torch.tensor(tokens, dtype=torch.int64, device=device)

        self.bias = None
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
            self.bias = (ids(list(params.logit_bias)), values)
        self.counts = None
        if params.has_penalties:
            self.counts = TokenCounts(seq.request.prompt_ids if params.repetition_penalty != 1 else (), device)
        self.allowed_n = None if params.allowed_token_ids is None else ids(sorted(set(params.allowed_token_ids)))
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._ends_n = ids(sorted(token for token in ends if token < vocab_size))
        self._never_n = ids(sorted({words[0] for words in seq.request.bad_words if len(words) == 1}))
        self._bad_words = [(list(words[:-1]), words[-1]) for words in seq.request.bad_words if len(words) > 1]
        self._min_tokens = params.min_tokens
        self._num_seen = seq.num_prompt

    def catch_up(self, seq: Sequence) -> None:
        """Count what was generated since the last time."""
        if self.counts is not None:
            for token in seq.token_ids[self._num_seen :]:
                self.counts.add(token)
        self._num_seen = len(seq.token_ids)

    def banned(self, seq: Sequence) -> list[Tensor]:
        """Tokens that may not come next."""
        found = [self._never_n] if len(self._never_n) else []
        if seq.num_generated < self._min_tokens and len(self._ends_n):
            found.append(self._ends_n)
        last = [
            token
            for before, token in self._bad_words
            if len(before) <= seq.num_generated and seq.token_ids[-len(before) :] == before
        ]
        if last:
            found.append(torch.tensor(last, dtype=torch.int64, device=self._never_n.device))
        return found


class LogitEditor:
    """Edits the logits of the sequences that ask for it (`Sequence.edits_logits`).

    Args:
        eos_token_ids: tokens that end a text.
        vocab_size: V.
    """

    def __init__(self, eos_token_ids: frozenset[int], vocab_size: int, device: torch.device) -> None:
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._device = device

    def edit(self, logits_RV: Tensor, seqs: Seq[Sequence]) -> None:
        """Change the logits of `seqs`, one row each, in place: bias, then penalties, then what is not allowed.

        A token is excluded by minus infinity; each exclusion is on top of the others.
        """
        edits = [self._edits(seq) for seq in seqs]
        self._add_bias(logits_RV, edits)
        self._penalise(logits_RV, seqs, edits)
        self._keep_allowed(logits_RV, edits)
        self._ban(logits_RV, seqs, edits)

    def _edits(self, seq: Sequence) -> SequenceEdits:
        edits = seq.edits
        if not isinstance(edits, SequenceEdits):
            seq.edits = edits = SequenceEdits(seq, self._eos_token_ids, self._vocab_size, self._device)
        edits.catch_up(seq)
        return edits

    def _add_bias(self, logits_RV: Tensor, edits: Seq[SequenceEdits]) -> None:
        biased = [(row, *each.bias) for row, each in enumerate(edits) if each.bias is not None]
        if biased:
            row_P, token_P = self._pairs([(row, ids) for row, ids, _ in biased])
            logits_RV.index_put_((row_P, token_P), torch.cat([values for *_, values in biased]), accumulate=True)

    def _penalise(self, logits_RV: Tensor, seqs: Seq[Sequence], edits: Seq[SequenceEdits]) -> None:
        """Repetition as Transformers and vLLM have it (arXiv 1909.05858, which says nothing of negative logits); frequency and
        presence as OpenAI's API defines them.
        """
        penalised = [(row, each.counts) for row, each in enumerate(edits) if each.counts is not None]
        if not penalised:
            return
        row_P, token_P = self._pairs([(row, counts.tokens_n) for row, counts in penalised])
        count_P = torch.cat([counts.counts_n for _, counts in penalised])
        sizes = torch.tensor([len(counts.tokens_n) for _, counts in penalised], device=self._device)
        params = [seqs[row].request.params for row, _ in penalised]

        def per_pair(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self._device).repeat_interleave(sizes)

        repetition_P = per_pair([p.repetition_penalty for p in params])
        x_P = logits_RV[row_P, token_P]
        x_P = torch.where(x_P > 0, x_P / repetition_P, x_P * repetition_P)
        x_P -= per_pair([p.frequency_penalty for p in params]) * count_P
        x_P -= per_pair([p.presence_penalty for p in params]) * (count_P > 0)
        logits_RV[row_P, token_P] = x_P

    def _keep_allowed(self, logits_RV: Tensor, edits: Seq[SequenceEdits]) -> None:
        limited = [(row, each.allowed_n) for row, each in enumerate(edits) if each.allowed_n is not None]
        if limited:
            row_P, token_P = self._pairs(limited)
            kept_P = logits_RV[row_P, token_P]
            logits_RV[torch.tensor([row for row, _ in limited], device=self._device)] = -math.inf
            logits_RV[row_P, token_P] = kept_P

    def _ban(self, logits_RV: Tensor, seqs: Seq[Sequence], edits: Seq[SequenceEdits]) -> None:
        banned = [
            (row, ids) for row, (seq, each) in enumerate(zip(seqs, edits, strict=True)) for ids in each.banned(seq)
        ]
        if banned:
            logits_RV[self._pairs(banned)] = -math.inf

    def _pairs(self, tokens: Seq[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """Rows with tokens `[n]` each, as two tensors `[P]`."""
        rows = torch.tensor([row for row, _ in tokens], device=self._device)
        sizes = torch.tensor([len(ids) for _, ids in tokens], device=self._device)
        return rows.repeat_interleave(sizes), torch.cat([ids for _, ids in tokens])
