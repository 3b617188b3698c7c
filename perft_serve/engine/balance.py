"""How evenly the tokens of an adapter spread over its adapter experts: looked at now and then, beside the steps.

In: the adapter experts that a step's tokens took in each MoE block, once a second and only in steps that go through Python (on
a CPU those that prefill; each request has one). Out: a `RouterBalance` for each adapter that was seen often enough. Adapters
without a choice (variants S and D) have none.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perft_kernels.adapter_router import KIND_ALL, RULE_FIRST_EXPERT, RULE_KIND, RULE_NUM_EXPERTS
from perft_serve.adapters.arena import AdapterArena
from perft_serve.engine.batch import Batch
from perft_serve.engine.counts import RouterBalance
from perft_serve.engine.scheduler import Plan

INTERVAL_SECONDS = 1.0
# Fewer choices than this for each adapter expert look uneven by chance.
MIN_CHOICES = 8
# More than this, and older ones count half: it shows how things are, not how they were.
MAX_CHOICES = 4096
# The adapters that are remembered, the last seen ones.
MAX_ADAPTERS = 256


@dataclass(slots=True)
class _Seen:
    """The choices of an adapter's tokens so far: `[L, M]`."""

    digest: str
    choices_LM: Tensor


class Balances:
    """The balances of all adapters.

    Args:
        arena: says which adapter experts are whose.
        interval: seconds from one look to the next.
    """

    def __init__(self, arena: AdapterArena, interval: float = INTERVAL_SECONDS) -> None:
        self._arena = arena
        self._interval = interval
        self._next_look = 0.0
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._changed: dict[str, RouterBalance] = {}

    def begin(self, batch: Batch) -> list[tuple[int, Tensor]] | None:
        """Where the seam is to put what a step's tokens take, if this step is to be looked at."""
        now = time.monotonic()
        if batch.width == 0 or now < self._next_look:
            return None
        self._next_look = now + self._interval
        return []

    def note(self, plan: Plan, routes: Sequence[tuple[int, Tensor]]) -> None:
        """Take in what a step's tokens have taken: for each MoE block, its number and ids_TX."""
        if not routes:
            return
        ids_LTX = torch.stack([ids_TX for _, ids_TX in routes]).cpu()
        rows: dict[tuple[str, str, int], list[int]] = {}
        first = 0
        for chunk in plan.chunks:
            lease = chunk.seq.lease
            if lease is not None:
                key = (lease.ref.name, lease.digest, lease.slot)
                rows.setdefault(key, []).extend(range(first, first + chunk.num_tokens))
            first += chunk.num_tokens
        rules = self._arena.rule_A6[[slot for _, _, slot in rows]].tolist()
        for ((name, digest, _), tokens), rule in zip(rows.items(), rules, strict=True):
            if rule[RULE_KIND] != KIND_ALL:
                num_experts = rule[RULE_NUM_EXPERTS]
                ids_LC = ids_LTX[:, tokens].flatten(1) - rule[RULE_FIRST_EXPERT]
                self._add(name, digest, _histogram(ids_LC, num_experts))

    def take(self) -> list[RouterBalance]:
        """The balances that have changed since the last call."""
        changed, self._changed = [*self._changed.values()], {}
        return changed

    def _add(self, name: str, digest: str, choices_LM: Tensor) -> None:
        seen = self._seen.pop(name, None)
        if seen is None or seen.digest != digest:
            seen = _Seen(digest, torch.zeros_like(choices_LM))
        self._seen[name] = seen
        if len(self._seen) > MAX_ADAPTERS:
            self._seen.popitem(last=False)
        if seen.choices_LM.sum(dim=1).max() > MAX_CHOICES:
            seen.choices_LM /= 2
        seen.choices_LM += choices_LM
        entropy = entropy_of(seen.choices_LM)
        if entropy is not None:
            self._changed[name] = RouterBalance(adapter=name, entropy=entropy)


def entropy_of(choices_LM: Tensor) -> float | None:
    """Mean over the layers of the entropy of their choices, each divided by log M; layers that are not adapted have no choices.

    `None`: there are too few choices to tell, or nothing to choose from.
    """
    num_experts = choices_LM.shape[1]
    adapted_LM = choices_LM[choices_LM.sum(dim=1) > 0]
    if num_experts < 2 or not len(adapted_LM) or adapted_LM.sum(dim=1).min() < MIN_CHOICES * num_experts:
        return None
    shares_LM = adapted_LM / adapted_LM.sum(dim=1, keepdim=True)
    return float(torch.special.entr(shares_LM).sum(dim=1).mean() / math.log(num_experts))


def _histogram(ids_LC: Tensor, num_experts: int) -> Tensor:
    """How often each local id is among a layer's choices, `[L, M]`; ids that are none do not count."""
    is_one_LC = (ids_LC >= 0) & (ids_LC < num_experts)
    counts_LM = torch.zeros(ids_LC.shape[0], num_experts, dtype=torch.float64)
    return counts_LM.scatter_add_(1, ids_LC.clamp(0, num_experts - 1), is_one_LC.double())
