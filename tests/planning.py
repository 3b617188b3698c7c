"""A scheduler without a model and without an arena, to be tested in milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from perft.errors import AdapterError
from perft_serve.adapters.catalog import AdapterRef
from perft_serve.adapters.status import Hold, Lease
from perft_serve.engine.events import EngineRequest, TokenEvent
from perft_serve.engine.pages import PagePool
from perft_serve.engine.params import SamplingParams
from perft_serve.engine.policy import WaitingOrder
from perft_serve.engine.scheduler import ChunkResult, Plan, Scheduler
from perft_serve.engine.sequence import Sequence

EOS = 99


class FakeAdapters:
    """Adapters by name that are read when the test says so, in an arena of `room` units; an adapter takes one, or its `sizes`.

    Those in `host` are in host memory from the start. What is copied into the arena is there at the next `copy`.
    """

    def __init__(self, room: int = 4, host: tuple[str, ...] = (), sizes: Mapping[str, int] | None = None) -> None:
        self.room = room
        self.host = set(host)
        self.broken: dict[str, str] = {}
        self.resident: dict[str, None] = {}  # least recently used first
        self.copying: set[str] = set()
        self.held: Counter[str] = Counter()
        self.in_flight: Counter[AdapterRef] = Counter()
        self.num_asked = 0
        self._sizes = sizes or {}

    def size(self, *names: str) -> int:
        return sum(self._sizes.get(name, 1) for name in names)

    def enter(self, ref: AdapterRef) -> None:
        self.in_flight[ref] += 1

    def leave(self, ref: AdapterRef) -> None:
        assert self.in_flight[ref] > 0
        self.in_flight[ref] -= 1

    def acquire(self, ref: AdapterRef) -> Lease | Hold:
        self.num_asked += 1
        assert self.in_flight[ref] > 0
        if ref.name in self.broken:
            raise AdapterError(self.broken[ref.name])
        if ref.name not in self.resident:
            if ref.name not in self.host or ref.name in self.copying:
                return Hold.LOADING
            idle = [name for name in self.resident if not self.held[name]]
            while self.size(*self.resident, *self.copying) + self.size(ref.name) > self.room:
                if not idle:
                    return Hold.NO_ROOM
                del self.resident[idle.pop(0)]
            self.copying.add(ref.name)
            return Hold.LOADING
        del self.resident[ref.name]
        self.resident[ref.name] = None
        self.held[ref.name] += 1
        return Lease(ref=ref, slot=sum(map(ord, ref.name)), width=1, digest=f"{ref.name}/{ref.version}")

    def release(self, lease: Lease) -> None:
        assert self.held[lease.ref.name] > 0
        self.held[lease.ref.name] -= 1

    def copy(self) -> list[str]:
        """Names that have come into the arena since the last call."""
        done, self.copying = sorted(self.copying), set()
        self.resident.update(dict.fromkeys(done))
        return done


class RoundRobin:
    """The tenant that has had fewest tokens is next; what a fair policy would be, in short."""

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self.waiting: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        self.waiting.remove(seq)

    def first(self) -> Sequence | None:
        return min(self.waiting, key=lambda seq: self.served.get(seq.request.tenant, 0), default=None)

    def started(self, seq: Sequence) -> None:
        pass

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        self.served[seq.request.tenant] = self.served.get(seq.request.tenant, 0) + num_tokens


class World:
    """A scheduler on which each step computes the token `position` for whoever gets one."""

    def __init__(
        self,
        *,
        num_pages: int = 100,
        page_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        adapters: FakeAdapters | None = None,
        prefix_caching: bool = False,
        order: WaitingOrder | None = None,
    ) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.adapters = adapters or FakeAdapters()
        self.scheduler = Scheduler(
            self.pool,
            self.adapters,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            eos_token_ids=frozenset({EOS}),
            prefix_caching=prefix_caching,
            order=order,
        )

    def add(
        self,
        name: str,
        prompt: int | tuple[int, ...],
        max_tokens: int = 4,
        adapter: str | None = None,
        version: int = 1,
        scope: str = "",
        tenant: str = "",
        priority: int = 0,
        **params: Any,
    ) -> Sequence:
        """A request with the prompt 0, 1, 2, ... of this length, or with these tokens."""
        request = EngineRequest(
            request_id=name,
            prompt_ids=tuple(range(prompt)) if isinstance(prompt, int) else prompt,
            params=SamplingParams(max_tokens=max_tokens, temperature=0, **params),
            adapter=None if adapter is None else AdapterRef(name=adapter, source="somewhere", version=version),
            cache_scope=scope,
            tenant=tenant,
            priority=priority,
        )
        seq = Sequence(request=request, seed=0, max_tokens=max_tokens)
        self.scheduler.add(seq)
        return seq

    def read(self, name: str) -> None:
        """The adapter has come into host memory."""
        self.adapters.host.add(name)
        self.scheduler.adapter_changed(name, 1)

    def fail(self, name: str, reason: str) -> None:
        """The adapter could not be read."""
        self.adapters.broken[name] = reason
        self.scheduler.adapter_failed(name, 1, reason)

    def step(self) -> tuple[Plan, list[TokenEvent]]:
        for name in self.adapters.copy():
            for version in (1, 2):
                self.scheduler.adapter_changed(name, version)
        plan = self.scheduler.schedule()
        assert len(set(plan.new_pages)) == len(plan.new_pages), "a page is cleared once"
        results = [ChunkResult(token_id=len(c.seq.token_ids) if c.samples else None) for c in plan.chunks]
        return plan, self.scheduler.commit(plan, results)

    def shape(self) -> dict[str, int]:
        """Tokens of each request in the next step, which is then taken."""
        plan, _ = self.step()
        return {chunk.seq.request.request_id: chunk.num_tokens for chunk in plan.chunks}

    def finish(self, max_steps: int = 1000) -> dict[str, TokenEvent]:
        """Step until nothing is left; the last event of each request."""
        last: dict[str, TokenEvent] = {}
        for _ in range(max_steps):
            for event in self.step()[1]:
                if event.finish_reason is not None:
                    assert event.request_id not in last
                    last[event.request_id] = event
            if not self.scheduler.has_work() and not self.adapters.copying:
                return last
        raise AssertionError(f"not done after {max_steps} steps")

    def assert_empty(self) -> None:
        """Nobody is in line, nothing is held."""
        assert (self.scheduler.num_running, self.scheduler.num_waiting, self.pool.usage) == (0, 0, 0)
        assert not any(self.adapters.held.values())
        assert not any(self.adapters.in_flight.values())
        assert not self.scheduler.has_work()
