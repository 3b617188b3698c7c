"""Which requests take part in the next step, with how many tokens, on which pages. Plain Python, no torch.

Policy: first come, first served, within a budget of tokens a step. Decoding requests go first, one token each; what is left
of the budget goes to prefill, in chunks if need be. A request enters when the pages for all its tokens so far are free;
when a decoding request finds no page, the youngest running request gives its pages back and starts again later
(preemption by recompute). Nothing is lost by it: sampling depends on seed and position only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from perft_serve.engine.events import FinishReason, Timing, TokenEvent, TokenLogprobs
from perft_serve.engine.pages import PagePool
from perft_serve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + num_tokens)` of one sequence, to be computed in this step."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token for this sequence."""
        return self.end == len(self.seq.token_ids) and self.seq.max_tokens > 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: its chunks, and the pages that change hands and must be cleared first."""

    chunks: tuple[Chunk, ...]
    new_pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """What the runner computed for one chunk.

    Args:
        token_id: the new token, if the chunk samples.
        logprobs: of the new token, if asked for.
        prompt_logprobs: of the prompt tokens that follow the chunk's tokens, if asked for.
        error: why there is no token although there should be.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


class Scheduler:
    """The queue and the running set.

    Args:
        pool: the KV pages.
        max_num_seqs: the most sequences in a step.
        max_num_batched_tokens: the most tokens in a step.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = eos_token_ids
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order in which they came in
        self._by_id: dict[str, Sequence] = {}
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def uses_slot(self, adapter_slot: int) -> bool:
        """Whether a sequence in flight has the adapter in this slot of the arena."""
        return any(seq.adapter_slot == adapter_slot for seq in self._by_id.values())

    def add(self, seq: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self._by_id[seq.request.request_id] = seq
        self._waiting.append(seq)

    def abort(self, request_id: str) -> bool:
        """Drop a sequence wherever it is and free its pages; false if it is not there."""
        seq = self._by_id.pop(request_id, None)
        if seq is None:
            return False
        if seq in self._waiting:
            self._waiting.remove(seq)
        else:
            self._running.remove(seq)
        self._pool.give(seq.pages)
        return True

    def abort_all(self) -> list[str]:
        """Drop everything; the ids of what was dropped."""
        ids = list(self._by_id)
        for request_id in ids:
            self.abort(request_id)
        return ids

    def schedule(self) -> Plan:
        """Choose the next step's chunks. An empty plan means that there is nothing to do."""
        budget = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        new_pages: list[int] = []
        for seq in [seq for seq in self._running if seq.num_to_compute == 1]:
            if seq in self._running and self._extend(seq, new_pages, chunks):
                chunks.append(Chunk(seq, seq.num_computed, 1))
                budget -= 1
        for seq in self._running:
            if seq.num_to_compute > 1 and budget > 0:
                chunks.append(Chunk(seq, seq.num_computed, min(seq.num_to_compute, budget)))
                budget -= chunks[-1].num_tokens
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            seq = self._waiting[0]
            pages = self._pool.take(self._pool.pages_for(len(seq.token_ids)))
            if pages is None:
                break
            self._running.append(self._waiting.popleft())
            seq.pages = pages
            new_pages += pages
            if seq.scheduled_at is None:
                seq.scheduled_at = time.monotonic()
            chunks.append(Chunk(seq, 0, min(seq.num_to_compute, budget)))
            budget -= chunks[-1].num_tokens
        return Plan(tuple(chunks), tuple(new_pages))

    def commit(self, plan: Plan, results: Seq[ChunkResult]) -> list[TokenEvent]:
        """Take a step's results in and say what happened, in the order of the plan's chunks."""
        events = []
        for chunk, result in zip(plan.chunks, results, strict=True):
            seq = chunk.seq
            seq.num_computed = chunk.end
            if seq.prompt_logprobs is not None:
                seq.prompt_logprobs.extend(result.prompt_logprobs)
            if result.error is not None:
                events.append(self._finish(seq, result, "error"))
            elif result.token_id is not None:
                seq.token_ids.append(result.token_id)
                events.append(self._finish(seq, result, self._finish_reason(seq, result.token_id)))
            elif seq.num_to_compute == 0:  # a prompt that was only to be scored
                events.append(self._finish(seq, result, "length"))
        return events

    def _extend(self, seq: Sequence, new_pages: list[int], chunks: list[Chunk]) -> bool:
        """Give a decoding sequence the page that its next token needs; false if it was preempted itself."""
        if self._pool.pages_for(len(seq.token_ids)) <= len(seq.pages):
            return True
        while (pages := self._pool.take(1)) is None:
            youngest = self._running[-1]
            self._preempt(youngest)
            chunks[:] = [chunk for chunk in chunks if chunk.seq is not youngest]
            if youngest is seq:
                return False
        seq.pages += pages
        new_pages += pages
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._pool.give(seq.pages)
        seq.restart()
        self._waiting.appendleft(seq)
        self.num_preemptions += 1

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.request.params
        if token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos):
            return "stop"
        return "length" if seq.num_generated >= seq.max_tokens else None

    def _finish(self, seq: Sequence, result: ChunkResult, reason: FinishReason | None) -> TokenEvent:
        """The event of a sequence's step; with a reason, the sequence is over and its pages are free."""
        first = seq.num_generated == (result.token_id is not None)
        timing = None
        if first:
            assert seq.scheduled_at is not None
            timing = Timing(arrival=seq.request.arrival, scheduled=seq.scheduled_at, first_token=time.monotonic())
        if reason is not None:
            self.abort(seq.request.request_id)
        by_stop_token = reason == "stop" and result.token_id in seq.request.params.stop_token_ids
        return TokenEvent(
            request_id=seq.request.request_id,
            token_id=result.token_id,
            logprobs=result.logprobs,
            prompt_logprobs=tuple(seq.prompt_logprobs) if first and seq.prompt_logprobs is not None else None,
            finish_reason=reason,
            stop_reason=result.token_id if by_stop_token else None,
            error=result.error,
            timing=timing,
        )
