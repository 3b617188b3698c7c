"""A plan as tensors: here tensors begin. In: a `Plan`. Out: a `Batch` that the runner hands to model, seam and sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perft_kernels.paged_attention import short_rows
from perft_serve.engine.scheduler import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's inputs. Tokens of one chunk stand together; chunks follow one another in the plan's order.

    Args:
        tokens_T, positions_T: token ids and their positions in their own sequences.
        slot_T: row of the KV pages, seen as `[P * page, ...]`, where each token's key and value go.
        adapter_T: arena slot of each token's adapter, -1 for the base.
        width: the most adapter experts that one of the tokens takes; 0: the batch has no adapter.
        pages_BN: page table, 0 where a sequence has no more pages.
        num_queries, context_len: of each sequence, on the host.
        short_T: sequence of each token, -1 in long prefill chunks (`perft_kernels.paged_attention`).
        logit_rows: which tokens' logits are needed, ascending.
        routed_rows: of which tokens it is to be kept what adapter experts they take, ascending.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    adapter_T: Tensor
    width: int
    pages_BN: Tensor
    short_T: Tensor
    num_queries: tuple[int, ...]
    context_len: tuple[int, ...]
    logit_rows: tuple[int, ...]
    routed_rows: tuple[int, ...] = ()


def build_batch(plan: Plan, page_size: int, device: torch.device) -> Batch:
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
        tokens += seq.token_ids[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        slots += [
            seq.pages[position // page_size] * page_size + position % page_size
            for position in range(chunk.start, chunk.end)
        ]
        adapters += [seq.adapter_slot] * chunk.num_tokens
        if seq.num_prompt_logprobs_wanted is not None:
            logit_rows += range(first_row, len(tokens))
        elif chunk.samples:
            logit_rows.append(len(tokens) - 1)
        if seq.next_routed is not None:
            routed_rows += range(first_row + max(0, seq.next_routed - chunk.start), len(tokens))

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    num_queries = tuple(chunk.num_tokens for chunk in plan.chunks)
    table = [chunk.seq.pages + [0] * (num_pages - len(chunk.seq.pages)) for chunk in plan.chunks]
    return Batch(
        tokens_T=ints(tokens),
        positions_T=ints(positions),
        slot_T=ints(slots),
        adapter_T=ints(adapters),
        width=max(chunk.seq.width for chunk in plan.chunks),
        pages_BN=torch.tensor(table, dtype=torch.int64, device=device),
        short_T=ints(short_rows(num_queries)),
        num_queries=num_queries,
        context_len=tuple(chunk.end for chunk in plan.chunks),
        logit_rows=tuple(logit_rows),
        routed_rows=tuple(routed_rows),
    )
