"""Which requests take part in the next step, with how many tokens, on which pages. Plain Python, no torch.

Who goes first is `policy.py`'s business; here is what follows from it. A request starts when it has a lease of its adapter and
pages for all its tokens so far, those that the prefix cache knows already shared with others. It keeps the lease until it is
over, pages or no pages: so those that run wait for nothing but pages, those that wait for pages wait for those that run, and
nobody waits in a circle.

One that waits for its adapter is parked, together with all others that wait for the same one, and costs nothing until the
adapter changes (`adapter_changed`) or somebody lets go of a lease. A preempted one is computed again from what the
prefix cache has kept of it; nothing is lost by it: sampling depends on seed and position only.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import Hold, Lease
from perft_serve.engine.events import ErrorKind, FinishReason, Routing, Timing, TokenEvent, TokenLogprobs
from perft_serve.engine.pages import PagePool, page_hash, root_hash
from perft_serve.engine.policy import (
    MAX_PASSED_OVER,
    FirstComeFirstServed,
    LineForRoom,
    WaitingOrder,
    chunk_size,
    decoding,
    prefilling,
    victim,
)
from perft_serve.engine.sequence import Sequence

# Of thousands of waiting requests one step looks at this many at the most; the next step goes on where it stopped.
MAX_LOOKS = 256
# ... and of the adapters that had no room in the arena it asks for the longest waiting first, until so many have none still.
MAX_TRIES = 4

AdapterKey: TypeAlias = "tuple[str, int]"


class Adapters(Protocol):
    """What is asked of `perft_serve.adapters.store.AdapterStore`."""

    def enter(self, ref: AdapterRef) -> None:
        """A request for the adapter has come."""

    def acquire(self, ref: AdapterRef) -> Lease | Hold:
        """The adapter for one sequence, or why it has to wait; raises `AdapterError` if it cannot be had at all."""

    def release(self, lease: Lease) -> None:
        """The sequence no longer runs on it."""

    def leave(self, ref: AdapterRef) -> None:
        """The request is over."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + num_tokens)` of one sequence, to be computed in this step.

    Args:
        samples: whether the step ends with a new token for this sequence.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.num_tokens

    @property
    def scored(self) -> range:
        """Positions of those of its tokens whose logits tell how likely the prompt's next one is, where that is asked for."""
        if self.seq.next_scored is None:
            return range(0)
        return range(max(self.start, self.seq.next_scored - 1), min(self.end, self.seq.num_prompt - 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: its chunks, and the pages that change hands and must be cleared first.

    The last token of a chunk may be one that the step before is still about to choose (`Scheduler.schedule_ahead`).

    A chunk may attend to pages that another chunk of the same plan fills: in every layer the keys and values of the whole
    batch are written before anybody attends.
    """

    chunks: tuple[Chunk, ...]
    new_pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """What the runner computed for one chunk.

    Args:
        token_id: the new token, if the chunk samples.
        logprobs: of the new token, if asked for.
        prompt_logprobs: of the prompt tokens that follow those in `Chunk.scored`.
        routing: of the chunk's tokens that it is still wanted of, if asked for.
        error: why there is no token although there should be; `error_kind`: whose fault that is.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    routing: Routing | None = None
    error: str | None = None
    error_kind: ErrorKind = "engine"


@dataclass(slots=True)
class _Draft:
    """A plan in the making; `looks` and `tries` are what is left of `MAX_LOOKS` and `MAX_TRIES`."""

    budget: int
    looks: int
    tries: int = 0
    chunks: dict[Sequence, Chunk] = field(default_factory=dict)
    new_pages: dict[int, None] = field(default_factory=dict)  # a page that changes hands twice is cleared once


@dataclass(slots=True)
class _Parked:
    """The sequences that wait for one adapter, and why.

    When the adapter has changed, the head is put into the order besides, to ask for it when it is its turn; or among those who
    are overdue, who ask before all others. While there is no room in the arena, the head is in the line for it.
    """

    ref: AdapterRef
    hold: Hold
    seqs: dict[Sequence, None]
    has_changed: bool = False
    head_is_due: bool = False

    @property
    def head(self) -> Sequence:
        """Who has waited longest."""
        return next(iter(self.seqs))

    @property
    def has_no_room(self) -> bool:
        """Whether somebody waits here for room in the arena."""
        return self.hold is Hold.NO_ROOM and bool(self.seqs)


class Scheduler:
    """The queues and the running set.

    Args:
        pool: the KV pages.
        adapters: where leases come from.
        max_num_seqs: the most sequences in a step.
        max_num_batched_tokens: the most tokens in a step.
        eos_token_ids: tokens that end a text.
        base_digest: of the base model; enters the hashes of pages.
        prefix_caching: whether pages are found again by their hashes.
        order: who is next of those that could start.

    Attributes:
        num_preemptions, prefix_queries, prefix_hits: as in `EngineStats`.
        num_corrupted: sequences whose logits were not numbers.
    """

    def __init__(
        self,
        pool: PagePool,
        adapters: Adapters,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int],
        base_digest: str = "",
        prefix_caching: bool = True,
        order: WaitingOrder | None = None,
    ) -> None:
        self._pool = pool
        self._adapters = adapters
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = eos_token_ids
        self._base_digest = base_digest
        self._prefix_caching = prefix_caching
        self._by_id: dict[str, Sequence] = {}
        self._on_adapter: dict[AdapterKey, dict[Sequence, None]] = {}  # all that are on one, wherever they are
        self._numbers = itertools.count()
        # A sequence is in one of these:
        self._unready: dict[Sequence, None] = {}  # its grammar is being compiled
        self._running: dict[Sequence, None] = {}  # holds pages; in the order in which they started
        self._entering: deque[Sequence] = deque()  # preempted, or chosen to start: wants nothing but pages
        self._parked: dict[AdapterKey, _Parked] = {}  # waits for its adapter
        # could start, but somebody who came earlier has been passed over enough
        self._held_back = FirstComeFirstServed()
        self._order = FirstComeFirstServed() if order is None else order  # all others
        # And these hold heads of parked ones besides:
        self._line = LineForRoom()
        self._overdue = FirstComeFirstServed()  # were passed over too often, and may have their adapter now
        self._room_may_have_come = False  # in the arena, since those who wait for it were last tried
        self._ahead: tuple[
            Chunk, ...
        ] = ()  # of the step that was chosen before the tokens of the present one are there
        self._ended: list[TokenEvent] = []  # last events of sequences that ended outside of a step
        self.num_preemptions = 0
        self.num_corrupted = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._by_id) - len(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def has_work(self) -> bool:
        """Whether a step could do something now; if not, all sequences wait for adapters that are being loaded."""
        return bool(self._running or self._ended or self._could_start())

    def _could_start(self) -> bool:
        """Whether somebody who does not run might, if there is a seat."""
        return bool(
            self._entering
            or self._order.first() is not None
            or (self._parked and self._room_may_have_come)
            or ((overdue := self._first_overdue()) is not None and overdue.has_changed)
            or (self._held_back.first() is not None and self._gate() is None)
        )

    def _may_start_now(self) -> bool:
        """Whether the next step may be somebody's first; false for certain if there are no seats or pages."""
        if len(self._running) == self._max_num_seqs:
            return False
        if self._entering:
            found, num_own = self._needed_pages(self._entering[0])
            return self._pool.can_take(num_own, found)
        return self._could_start()

    def add(self, seq: Sequence, *, ready: bool = True) -> None:
        """Put a new sequence in line; one that is not ready stands there from the moment it is (`ready`, or `refuse`)."""
        if seq.request.adapter is not None:
            self._adapters.enter(seq.request.adapter)
            self._on_adapter.setdefault(_key(seq.request.adapter), {})[seq] = None
        seq.number = next(self._numbers)
        seq.queued_at = time.monotonic()
        self._by_id[seq.request.request_id] = seq
        if ready:
            self._order.add(seq)
        else:
            self._unready[seq] = None

    def ready(self, seq: Sequence) -> None:
        """A sequence that was not ready is; one that has been dropped meanwhile is ignored."""
        if seq in self._unready:
            del self._unready[seq]
            self._order.add(seq)

    def refuse(self, seq: Sequence, error: str, kind: ErrorKind) -> None:
        """A sequence that was not ready never will be; the next `commit` says so."""
        if seq in self._unready:
            del self._unready[seq]
            self._fail(seq, error, kind)

    def abort(self, request_id: str) -> bool:
        """Drop a sequence wherever it is and free what it holds; false if it is not there."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return False
        self._take_out(seq)
        self._drop(seq)
        return True

    def abort_all(self) -> list[str]:
        """Drop everything; the ids of what was dropped."""
        ids = list(self._by_id)
        for request_id in ids:
            self.abort(request_id)
        return ids

    def delete_adapter(self, name: str, up_to_version: int, error: str) -> None:
        """End every sequence on these versions of an adapter; the next `commit` says so."""
        for seq in list(self._by_id.values()):
            ref = seq.request.adapter
            if ref is not None and ref.name == name and ref.version <= up_to_version:
                self._take_out(seq)
                self._fail(seq, error, "deleted")

    def adapter_changed(self, name: str, version: int) -> None:
        """An adapter may have been read or copied, or has left: those that wait for it are looked at again."""
        self._room_may_have_come = True
        parked = self._parked.get((name, version))
        if parked is not None:
            self._stir(parked)

    def adapter_failed(self, name: str, version: int, error: str) -> None:
        """An adapter could not be read: all that wait for it end, seat or no seat in the batch; the next `commit` says so."""
        self._room_may_have_come = True
        for seq in list(self._on_adapter.get((name, version), ())):
            if seq.lease is None:
                self._take_out(seq)
                self._fail(seq, error, "adapter")

    def schedule(self) -> Plan:
        """Choose the next step's chunks. An empty plan means that there is nothing to compute."""
        draft = _Draft(self._max_num_batched_tokens, MAX_LOOKS)
        self._plan_decoding(draft)
        self._plan_prefill(draft)
        self._plan_starts(draft)
        return Plan(tuple(draft.chunks.values()), tuple(draft.new_pages))

    def schedule_ahead(self, plan: Plan) -> Plan | None:
        """Choose the step after `plan`, whose tokens are not there yet: one more for each sequence that does not end with it
        whatever its token is. One that does end with it has been computed in vain.

        `plan` has to be committed before anything else is scheduled.

        Returns:
            The step; or `None`: what comes next depends on the tokens, or somebody else may start.
        """
        alive = [chunk for chunk in plan.chunks if chunk.seq in self._running]
        if len(alive) < len(self._running) or not all(chunk.samples and chunk.seq.runs_ahead for chunk in alive):
            return None
        if self._may_start_now():
            return None
        going = [chunk.seq for chunk in alive if chunk.seq.num_generated + 1 < chunk.seq.max_tokens]
        growing = [seq for seq in going if self._pool.pages_for(len(seq.token_ids) + 1) > len(seq.pages)]
        pages = self._pool.take(len(growing))
        if not going or pages is None:
            return None
        for seq, page in zip(growing, pages, strict=True):
            seq.pages.append(page)
        for seq in going:
            self._order.charge(seq, 1)
        self._ahead = tuple(Chunk(seq, len(seq.token_ids), 1, samples=True) for seq in going)
        return Plan(self._ahead, tuple(pages))

    def is_alive(self, plan: Plan) -> bool:
        """Whether the results of a step are still of use to somebody."""
        return any(chunk.seq in self._running for chunk in plan.chunks)

    def commit(self, plan: Plan, results: Seq[ChunkResult]) -> list[TokenEvent]:
        """Take a step's results in and say what happened: first who ended outside of a step, then in the plan's order."""
        events, self._ended = self._ended, []
        for chunk, result in zip(plan.chunks, results, strict=True):
            seq = chunk.seq
            if seq not in self._running:  # it ended while this step was already on its way
                continue
            seq.num_computed = chunk.end
            if seq.prompt_logprobs is not None:
                seq.prompt_logprobs.extend(result.prompt_logprobs)
            if result.routing is not None:
                seq.take_routing(result.routing, chunk.end)
            if result.error is not None:
                self.num_corrupted += 1
                events.append(self._finish(seq, result, "error"))
            elif result.token_id is not None:
                seq.token_ids.append(result.token_id)
                if seq.grammar is not None:
                    seq.grammar.accept(result.token_id)
                events.append(self._finish(seq, result, self._finish_reason(seq, result.token_id)))
            elif seq.num_to_compute == 0:  # a prompt that was only to be scored
                events.append(self._finish(seq, result, "length"))
        for chunk in self._ahead:  # only now are the tokens known that its pages are known by
            if chunk.seq in self._running:
                self._publish(chunk)
        self._ahead = ()
        return events

    def roll_back(self, plan: Plan) -> None:
        """The plan was not carried out, nor one that was chosen ahead: its sequences start again, and nobody finds pages that
        it was to fill."""
        self._ahead = ()
        alive = [chunk for chunk in plan.chunks if chunk.seq in self._running]
        for chunk in alive:
            for page in chunk.seq.pages[chunk.start // self._pool.page_size :]:
                self._pool.forget(page)
        for chunk in reversed(alive):
            self._preempt(chunk.seq)

    # The plan

    def _plan_decoding(self, draft: _Draft) -> None:
        for seq in decoding(self._running):
            if seq in self._running and self._extend(seq, draft):
                self._compute(seq, 1, draft)
        for chunk in draft.chunks.values():  # only now is it certain that none of them is preempted
            self._publish(chunk)

    def _plan_prefill(self, draft: _Draft) -> None:
        for seq in prefilling(self._running):
            if draft.budget > 0:
                self._publish(self._compute(seq, chunk_size(seq, draft.budget), draft))

    def _plan_starts(self, draft: _Draft) -> None:
        draft.tries = MAX_TRIES if self._room_may_have_come else 0
        while draft.budget > 0 and len(self._running) < self._max_num_seqs:
            if not self._entering:
                chosen = self._choose(draft)
                if chosen is None:
                    return
                self._entering.append(chosen)
            if not self._admit(self._entering[0], draft):
                return
            seq = self._entering.popleft()
            self._publish(self._compute(seq, chunk_size(seq, draft.budget), draft))

    def _compute(self, seq: Sequence, num_tokens: int, draft: _Draft) -> Chunk:
        samples = num_tokens == seq.num_to_compute and seq.max_tokens > 0
        chunk = draft.chunks[seq] = Chunk(seq, seq.num_computed, num_tokens, samples=samples)
        draft.budget -= num_tokens
        self._order.charge(seq, num_tokens)
        return chunk

    # Pages

    def _extend(self, seq: Sequence, draft: _Draft) -> bool:
        """Give a decoding sequence the page that its next token needs; false if it was preempted itself."""
        if self._pool.pages_for(len(seq.token_ids)) <= len(seq.pages):
            return True
        while (pages := self._pool.take(1)) is None:
            loser = victim(self._running)
            self._preempt(loser)
            if draft.chunks.pop(loser, None) is not None:
                draft.budget += 1
            if loser is seq:
                return False
        seq.pages += pages
        draft.new_pages.update(dict.fromkeys(pages))
        return True

    def _preempt(self, seq: Sequence) -> None:
        del self._running[seq]
        self._pool.give(seq.pages)
        seq.restart()
        self._entering.appendleft(seq)
        self.num_preemptions += 1

    def _admit(self, seq: Sequence, draft: _Draft) -> bool:
        """Give a sequence pages for all its tokens, those with its beginning if there are any; false if there are too few."""
        found, num_own = self._needed_pages(seq)
        own = self._pool.take(num_own, found)
        if own is None:
            return False
        self._running[seq] = None
        seq.pages = found + own
        seq.num_computed = len(found) * self._pool.page_size
        draft.new_pages.update(dict.fromkeys(own))
        if seq.scheduled_at is None:
            seq.scheduled_at = time.monotonic()
            seq.num_cached_tokens = seq.num_computed
            if self._looks_up(seq):
                self.prefix_queries += seq.num_prompt
                self.prefix_hits += seq.num_cached_tokens
        return True

    def _looks_up(self, seq: Sequence) -> bool:
        return self._prefix_caching and seq.num_reusable > 0

    def _needed_pages(self, seq: Sequence) -> tuple[list[int], int]:
        """The pages with a sequence's beginning that are there, and how many it needs besides."""
        found = self._pool.find(self._hashes(seq, seq.num_reusable)) if self._looks_up(seq) else []
        return found, self._pool.pages_for(len(seq.token_ids)) - len(found)

    def _publish(self, chunk: Chunk) -> None:
        """Make the pages known that a chunk fills."""
        size = self._pool.page_size
        if not self._prefix_caching or chunk.start // size == chunk.end // size:
            return
        hashes = self._hashes(chunk.seq, chunk.end)
        for i in range(chunk.start // size, chunk.end // size):
            self._pool.publish(chunk.seq.pages[i], hashes[i])

    def _hashes(self, seq: Sequence, num_tokens: int) -> list[bytes]:
        """The hashes of the pages that its first `num_tokens` tokens fill."""
        size = self._pool.page_size
        for i in range(len(seq.page_hashes), num_tokens // size):
            before = seq.page_hashes[i - 1] if i else seq.root
            seq.page_hashes.append(page_hash(before, seq.token_ids[i * size : (i + 1) * size]))
        return seq.page_hashes[: num_tokens // size]

    # Adapters

    def _choose(self, draft: _Draft) -> Sequence | None:
        """Who is to start next, holding its lease: first those that have been passed over too often, then whoever is next in
        order and can have its adapter, then those that found no room before.
        """
        while (parked := self._first_overdue()) is not None:
            may_ask = parked.has_changed or (parked.has_no_room and draft.tries)
            if may_ask and (seq := self._retry(parked, draft)) is not None:
                return seq
            if parked.has_no_room:
                break  # whatever room there is, is for this one
        gate = self._gate()
        while (seq := self._held_back.first()) is not None and (gate is None or seq.number < gate):
            self._held_back.remove(seq)
            self._order.add(seq)
        while draft.looks and (seq := self._order.first()) is not None:
            draft.looks -= 1
            self._order.remove(seq)
            if self._can_start(seq, gate):
                return seq
        i = 0
        while gate is None and draft.tries and i < len(self._line):
            parked = self._parked_with(self._line[i])
            if (seq := self._retry(parked, draft)) is not None:
                return seq
            i += parked.has_no_room  # who is told to wait for something else has left the line
        self._room_may_have_come = False
        return None

    def _can_start(self, seq: Sequence, gate: int | None) -> bool:
        """Whether `seq`, just taken from the order, has its adapter; if not, it has found its place."""
        ref = seq.request.adapter
        if ref is None:
            seq.root = root_hash(scope=seq.request.cache_scope, base_digest=self._base_digest, adapter_digest="")
            self._start(seq)
            return True
        if gate is not None and seq.number > gate:
            self._held_back.add(seq)
            return False
        parked = self._parked.get(_key(ref))
        if parked is not None:
            if parked.head_is_due and parked.head is seq:
                parked.head_is_due = False
                return self._ask(parked)
            parked.seqs[seq] = None
            return False
        answer = self._acquire(seq, ref)
        if isinstance(answer, Hold):
            self._parked[_key(ref)] = parked = _Parked(ref, answer, {seq: None})
            self._line_up(parked)
        return isinstance(answer, Lease)

    def _retry(self, parked: _Parked, draft: _Draft) -> Sequence | None:
        """Ask again for an adapter that had no room; the head of those that wait for it, if it has it now."""
        seq = parked.head
        self._call_back(parked)
        has_it = self._ask(parked)
        if parked.has_no_room:
            draft.tries = max(0, draft.tries - 1)
        return seq if has_it else None

    def _ask(self, parked: _Parked) -> bool:
        """Whether the head has its adapter now; if so, or if the adapter cannot be had at all, nobody needs to wait."""
        parked.has_changed = False
        answer = self._acquire(parked.head, parked.ref)
        if isinstance(answer, Hold):
            parked.hold = answer
            self._line_up(parked)
            return False
        self._leave_line(parked.head)
        del parked.seqs[parked.head]
        self._unpark(parked)
        return isinstance(answer, Lease)

    def _acquire(self, seq: Sequence, ref: AdapterRef) -> Lease | Hold | None:
        """Ask for the adapter of `seq`, which is in no queue; `None`: it cannot be had, and that was the end of `seq`."""
        try:
            answer = self._adapters.acquire(ref)
        except AdapterError as error:
            self._fail(seq, str(error), "adapter")
            return None
        if isinstance(answer, Lease):
            seq.hold(answer)
            if answer.is_lora and seq.next_routed is not None:
                reason = f"adapter {ref.name!r} is a LoRA and has no adapter experts: leave return_routing out"
                self._fail(seq, reason, "request")
                return None
            seq.root = root_hash(
                scope=seq.request.cache_scope, base_digest=self._base_digest, adapter_digest=answer.digest
            )
            self._start(seq)
        return answer

    def _start(self, seq: Sequence) -> None:
        """`seq` has all that it needs but pages."""
        self._line.pass_over(seq.number)
        self._order.started(seq)

    def _parked_with(self, head: Sequence) -> _Parked:
        """Where `head` is the head."""
        assert head.request.adapter is not None
        return self._parked[_key(head.request.adapter)]

    def _first_overdue(self) -> _Parked | None:
        """Of those whose head has been passed over too often, and that wait for room or may have their adapter now, the one
        that has waited longest.
        """
        head = self._overdue.first()
        gate = self._gate()
        if gate is not None and (head is None or gate < head.number):
            head = self._line[0]
        return None if head is None else self._parked_with(head)

    def _gate(self) -> int | None:
        """Nobody that came after this arrival and needs an adapter is to start."""
        is_overdue = len(self._line) and self._line.num_passed_first >= MAX_PASSED_OVER
        return self._line[0].number if is_overdue else None

    def _line_up(self, parked: _Parked) -> None:
        """The head stands in the line for room if that is what it waits for."""
        if not parked.has_no_room:
            self._leave_line(parked.head)
        elif parked.head not in self._line:
            self._line.add(parked.head)

    def _leave_line(self, head: Sequence) -> None:
        if head in self._line:
            self._line.remove(head)
            head.passed_over = min(head.passed_over, MAX_PASSED_OVER)

    def _stir(self, parked: _Parked) -> None:
        """The adapter may be there now: let the head ask for it."""
        parked.has_changed = True
        if not parked.head_is_due:
            parked.head_is_due = True
            is_overdue = parked.head.passed_over >= MAX_PASSED_OVER and not parked.has_no_room
            (self._overdue if is_overdue else self._order).add(parked.head)

    def _call_back(self, parked: _Parked) -> None:
        """The head is not in the order any more, or among the overdue, or held back on its way."""
        if parked.head_is_due:
            parked.head_is_due = False
            special = [queue for queue in (self._overdue, self._held_back) if parked.head in queue]
            (special[0] if special else self._order).remove(parked.head)

    def _unpark(self, parked: _Parked) -> None:
        """Those that waited for this adapter are in line again."""
        del self._parked[_key(parked.ref)]
        for seq in parked.seqs:
            self._order.add(seq)
        parked.seqs = {}

    # The end

    def _take_out(self, seq: Sequence) -> None:
        """Remove a sequence from the queue or set that it is in."""
        ref = seq.request.adapter
        parked = None if ref is None else self._parked.get(_key(ref))
        if seq in self._running:
            del self._running[seq]
        elif seq in self._unready:
            del self._unready[seq]
        elif seq in self._entering:
            self._entering.remove(seq)
        elif parked is not None and seq in parked.seqs:
            was_head = parked.head is seq
            if was_head:
                self._call_back(parked)
                self._leave_line(seq)
            del parked.seqs[seq]
            if not parked.seqs:
                self._unpark(parked)
            elif was_head:
                self._line_up(parked)
                self._stir(parked)  # the head that is gone may have been about to ask
        elif seq in self._held_back:
            self._held_back.remove(seq)
        else:
            self._order.remove(seq)

    def _drop(self, seq: Sequence) -> None:
        """Free all that a sequence holds, which is in no queue any more."""
        del self._by_id[seq.request.request_id]
        self._pool.give(seq.pages)
        seq.pages = []
        if seq.lease is not None:
            self._adapters.release(seq.lease)
            seq.lease = None
            self._room_may_have_come = True
        ref = seq.request.adapter
        if ref is not None:
            seqs = self._on_adapter[_key(ref)]
            del seqs[seq]
            if not seqs:
                del self._on_adapter[_key(ref)]
            self._adapters.leave(ref)

    def _fail(self, seq: Sequence, error: str, kind: ErrorKind) -> None:
        """End a sequence that is in no queue; the next `commit` says so."""
        self._ended.append(self._event(seq, ChunkResult(error=error, error_kind=kind), "error"))
        self._drop(seq)

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        if self._is_end(seq, token_id) or (seq.grammar is not None and seq.grammar.is_complete):
            return "stop"
        return "length" if seq.num_generated >= seq.max_tokens else None

    def _is_end(self, seq: Sequence, token_id: int) -> bool:
        """Whether a token ends the text without being of it."""
        params = seq.request.params
        return token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)

    def _finish(self, seq: Sequence, result: ChunkResult, reason: FinishReason | None) -> TokenEvent:
        """The event of a sequence's step; with a reason, the sequence is over and what it held is free."""
        event = self._event(seq, result, reason)
        if reason is not None:
            self._take_out(seq)
            self._drop(seq)
        return event

    def _event(self, seq: Sequence, result: ChunkResult, reason: FinishReason | None) -> TokenEvent:
        first = seq.num_generated == (result.token_id is not None)
        timing = None
        if first and seq.scheduled_at is not None:
            timing = Timing(queued=seq.queued_at, scheduled=seq.scheduled_at, first_token=time.monotonic())
        by_stop_token = reason == "stop" and result.token_id in seq.request.params.stop_token_ids
        return TokenEvent(
            request_id=seq.request.request_id,
            token_id=result.token_id,
            logprobs=result.logprobs,
            prompt_logprobs=tuple(seq.prompt_logprobs) if first and seq.prompt_logprobs is not None else None,
            finish_reason=reason,
            stop_reason=result.token_id if by_stop_token else None,
            completes=reason == "stop" and result.token_id is not None and not self._is_end(seq, result.token_id),
            error=result.error,
            error_kind=None if result.error is None else result.error_kind,
            timing=timing,
            num_cached_tokens=seq.num_cached_tokens if first else None,
            adapter_digest=seq.lease.digest if first and seq.lease is not None else None,
            routing=seq.give_routing(),
        )


def _key(ref: AdapterRef) -> AdapterKey:
    return ref.name, ref.version
