"""A request while the engine works on it. Plain Python; changed by the scheduler only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from perft_serve.adapters.status import Lease
from perft_serve.engine.events import EngineRequest, Routing, TokenLogprobs


class Follower(Protocol):
    """What a sequence needs of its grammar (`perft_serve.engine.grammar.Grammar`)."""

    def accept(self, token_id: int) -> None:
        """The sequence has got a token."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can be added to the text."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and how far they have been computed.

    Args:
        request: what was asked for.
        seed: of its sampling.
        max_tokens: the most tokens to generate, settled.

    Attributes:
        number: counts arrivals.
        token_ids: the prompt, then what was generated.
        queued_at, scheduled_at: when it came, and when it first became part of a step (`time.monotonic()`).
        num_computed: tokens whose keys and values are in the KV cache.
        pages: the KV pages held, in order.
        lease: its hold on its adapter, from the moment it is chosen to start until it is over.
        adapter_slot: the adapter's slot in the arena; -1 for the base, and before there is a lease.
        width: the most adapter experts that one of its tokens takes.
        root: where the hashes of its pages start; `page_hashes` are those of its first pages, as far as they were needed.
        num_cached_tokens: tokens of the prompt that were in the prefix cache when it started.
        grammar: what its tokens must follow, once that is compiled; it has seen all that were generated, and being computed
            again changes nothing about it.
        passed_over: how many later arrivals have started while it waited for room in the arena; settled when it does so no
            longer, and counted up to `policy.MAX_PASSED_OVER`.
        edits_logits: whether its logits are changed before a token is chosen.
        next_routed: position of the next token whose adapter experts are to be told, or `None`: nobody asks. Of the prompt's
            tokens, which are the same in all completions, the first one tells.
        edits: what the sampler keeps for that, from its first token to its last, preempted or not.
    """

    request: EngineRequest
    seed: int
    max_tokens: int
    number: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    queued_at: float = 0.0
    scheduled_at: float | None = None
    lease: Lease | None = None
    adapter_slot: int = -1
    width: int = 0
    root: bytes = b""
    page_hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int = 0
    grammar: Follower | None = None
    passed_over: int = 0
    edits_logits: bool = False
    edits: object = None
    next_routed: int | None = None
    _routing: list[Routing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.edits_logits = self.request.params.edits_logits or bool(self.request.bad_words)
        self.token_ids = list(self.request.prompt_ids)
        if self.request.params.return_routing:
            self.next_routed = 0 if self.request.choice == 0 else self.num_prompt
        if self.request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * max(1, self.request.params.prompt_logprobs_start)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        """Tokens that are known but not in the KV cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def next_scored(self) -> int | None:
        """Position of the prompt's next token whose log-probability is to be told, or `None`: none is any more."""
        if self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt:
            return None
        return len(self.prompt_logprobs)

    @property
    def takes_likeliest(self) -> bool:
        """Whether of the logits nothing is wanted but which is largest."""
        params = self.request.params
        asks_more = self.edits_logits or self.grammar is not None or params.logprobs is not None
        return params.greedy and not asks_more and self.next_scored is None

    @property
    def runs_ahead(self) -> bool:
        """Whether its next token may be computed before the one before it is known on the host."""
        return not self.edits_logits and self.grammar is None and self.next_routed is None

    @property
    def num_reusable(self) -> int:
        """How many of its first tokens need keys and values only, which the prefix cache may have: the last one's logits are
        wanted, as are those before each token to be scored, and the adapter experts of some tokens.
        """
        ends = [len(self.token_ids) - 1]
        if self.next_scored is not None:
            ends.append(self.next_scored - 1)
        if self.next_routed is not None:
            ends.append(self.next_routed)
        return min(ends)

    def take_routing(self, routing: Routing, end: int) -> None:
        """Keep what the tokens up to position `end` took until the next event."""
        self._routing.append(routing)
        self.next_routed = end

    def give_routing(self) -> Routing | None:
        """What has been kept."""
        if not self._routing:
            return None
        parts, self._routing = self._routing, []
        return replace(
            parts[0], ids=b"".join(part.ids for part in parts), weights=b"".join(part.weights for part in parts)
        )

    def hold(self, lease: Lease) -> None:
        """It has its adapter, until it is over."""
        self.lease, self.adapter_slot, self.width = lease, lease.slot, lease.width

    def restart(self) -> None:
        """Forget what is in the KV cache: the pages are somebody else's now, and the tokens are computed again."""
        self.num_computed = 0
        self.pages = []
