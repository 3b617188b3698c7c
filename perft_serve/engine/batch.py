"""A plan as tensors: here tensors begin. In: a `Plan`. Out: a `Batch` in host memory, which the runner brings to the device and
hands to model, seam and sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from perft_kernels.paged_attention import long_pieces, num_long_queries, short_rows
from perft_serve.engine.scheduler import Chunk, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's inputs. Tokens of one chunk stand together; chunks follow one another in the plan's order.

    Args:
        tokens_T, positions_T: token ids and their positions in their own sequences. Tokens that the host does not know yet are
            on the device from the start.
        slot_T: row of the KV pages, seen as `[P * page, ...]`, where each token's key and value go.
        adapter_T: arena slot of each token's adapter, -1 for the base.
        width: the most adapter experts that one of the tokens takes; 0: the batch has no PERFT adapter.
        pages_BN: page table, 0 where a sequence has no more pages.
        num_queries, context_len: of each sequence, on the host.
        num_long: how many of its new tokens are attended as a long prefill (`perft_kernels.paged_attention`).
        short_T: sequence of each token, -1 in long prefills.
        long_Q3: the pieces of long prefills.
        logit_rows: which tokens' logits are needed, ascending.
        routed_rows: of which tokens it is to be kept what adapter experts they take, ascending.
        has_lora: some of the adapters are LoRAs.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    adapter_T: Tensor
    width: int
    pages_BN: Tensor
    short_T: Tensor
    long_Q3: Tensor
    num_queries: tuple[int, ...]
    context_len: tuple[int, ...]
    num_long: tuple[int, ...]
    logit_rows: tuple[int, ...]
    routed_rows: tuple[int, ...] = ()
    has_lora: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token, and all logits are wanted."""
        return len(self.tokens_T) == len(self.num_queries) == len(self.logit_rows)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        if device.type == "cpu":
            return self
        names = ("tokens_T", "positions_T", "slot_T", "adapter_T", "pages_BN", "short_T", "long_Q3")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


# How many new tokens of each chunk are attended as a long prefill.
LongRule: TypeAlias = Callable[[Sequence[Chunk]], Sequence[int]]


def long_for_speed(chunks: Sequence[Chunk]) -> list[int]:
    """By a chunk's length, which depends on what else is in the batch."""
    return num_long_queries([chunk.num_tokens for chunk in chunks])


def long_if_prompt(chunks: Sequence[Chunk]) -> list[int]:
    """Tokens of prompts, and no others: of a sequence it is always the same ones, however it is cut into chunks."""
    return [min(chunk.num_tokens, max(0, chunk.seq.num_prompt - chunk.start)) for chunk in chunks]


def never_long(chunks: Sequence[Chunk]) -> list[int]:
    """None."""
    return [0] * len(chunks)


def build_batch(plan: Plan, page_size: int, long_rule: LongRule = long_for_speed) -> Batch:
    """The tensors of `plan`, which has at least one chunk."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    adapters: list[int] = []
    logit_rows: list[int] = []
    routed_rows: list[int] = []
    num_pages = max(len(chunk.seq.pages) for chunk in plan.chunks)
    for chunk in plan.chunks:
        seq, first_row = chunk.seq, len(tokens)
        known = seq.token_ids[chunk.start : chunk.end]
        tokens += known + [0] * (chunk.num_tokens - len(known))  # the runner puts in what is about to be chosen
        positions += range(chunk.start, chunk.end)
        slots += [
            seq.pages[position // page_size] * page_size + position % page_size
            for position in range(chunk.start, chunk.end)
        ]
        adapters += [seq.adapter_slot] * chunk.num_tokens
        logit_rows += [first_row + position - chunk.start for position in chunk.scored]
        if chunk.samples:
            logit_rows.append(len(tokens) - 1)
        if seq.next_routed is not None:
            routed_rows += range(first_row + max(0, seq.next_routed - chunk.start), len(tokens))

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    num_queries = tuple(chunk.num_tokens for chunk in plan.chunks)
    num_long = tuple(long_rule(plan.chunks))
    table = [chunk.seq.pages + [0] * (num_pages - len(chunk.seq.pages)) for chunk in plan.chunks]
    return Batch(
        tokens_T=ints(tokens),
        positions_T=ints(positions),
        slot_T=ints(slots),
        adapter_T=ints(adapters),
        width=max(chunk.seq.width for chunk in plan.chunks),
        pages_BN=torch.tensor(table, dtype=torch.int64),
        short_T=ints(short_rows(num_queries, num_long)),
        long_Q3=torch.tensor(long_pieces(num_queries, num_long), dtype=torch.int64).view(-1, 3),
        num_queries=num_queries,
        context_len=tuple(chunk.end for chunk in plan.chunks),
        num_long=num_long,
        logit_rows=tuple(logit_rows),
        routed_rows=tuple(routed_rows),
        has_lora=any(chunk.seq.lease is not None and chunk.seq.lease.is_lora for chunk in plan.chunks),
    )
