"""Where recorded decode steps find their inputs: buffers on the device that stay where they are.

In: the batch of a step that only decodes, in host memory. Out: the same batch in the first rows of the buffers, with as
many rows of padding behind it as asked for.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perft_serve.adapters.arena import AdapterArena
from perft_serve.engine.batch import Batch

# A row of padding decodes token 0 at position 0 without an adapter. It has no pages: what it writes goes to page 0, which is
# nobody's, and all rows of padding write the same.
_PADDING = (0, 0, 0, -1)


class StepKind(NamedTuple):
    """What a recorded step depends on.

    Args:
        num_rows: sequences, and rows of padding.
        width: the most adapter experts that one token takes.
        has_lora: whether the attention's projections look for LoRAs.
        chooses: whether it gives the likeliest tokens instead of logits.
    """

    num_rows: int
    width: int
    has_lora: bool
    chooses: bool = False


class Tables:
    """Which tables of the arena recorded steps have read; where they are made anew, those steps are of no use any more.

    Args:
        arena: the adapters' memory.
    """

    def __init__(self, arena: AdapterArena) -> None:
        self._arena = arena
        self._read = (arena.rule_A6, arena.rank_LE)
        self._lora = arena.lora

    def drop_stale(self, steps: MutableMapping[StepKind, Any]) -> None:
        """Forget the steps that have read tables of before."""
        arena = self._arena
        if arena.rule_A6 is not self._read[0] or arena.rank_LE is not self._read[1]:
            steps.clear()
            self._read = (arena.rule_A6, arena.rank_LE)
        if arena.lora is not self._lora:
            for kind in [kind for kind in steps if kind.has_lora]:
                del steps[kind]
            self._lora = arena.lora


class _PinnedInputs:
    """Host memory from which a GPU copies `numbers_4T` and `pages_TN`, and the end of the last copy."""

    def __init__(self, numbers_4T: Tensor, pages_TN: Tensor) -> None:
        self._tensors = (numbers_4T.cpu().pin_memory(), pages_TN.cpu().pin_memory())
        self.copied = torch.cuda.Event()

    def take(self) -> tuple[Tensor, Tensor]:
        """To be written to, once nobody copies from it any more."""
        self.copied.synchronize()
        return self._tensors


class DecodeInputs:
    """The buffers.

    Args:
        max_num_seqs: the most rows.
        max_pages: the most pages of one sequence.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, device: torch.device) -> None:
        self._max_num_seqs = max_num_seqs
        on_gpu = device.type == "cuda"

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.rows_T = torch.arange(max_num_seqs, device=device)
        self._numbers_4T = zeros(4, max_num_seqs)  # token, position, slot, adapter
        self._pages_TN = zeros(max_num_seqs, max_pages)
        self._no_pieces_Q3 = zeros(0, 3)
        # on a GPU written in pinned memory first, and copied in two pieces without waiting: while one step's are on their way,
        # the next one's are written elsewhere
        self._host = [_PinnedInputs(self._numbers_4T, self._pages_TN) for _ in range(2)] if on_gpu else None

    def tensors(self) -> list[Tensor]:
        """All that a recorded step may read here."""
        return [self._numbers_4T, self._pages_TN, self.rows_T, self._no_pieces_Q3]

    def fill(self, batch: Batch, num_rows: int) -> None:
        """Put the batch into the first rows, and padding into the others of the first `num_rows`.

        On a CPU the step before must be over.
        """
        numbers_4T, pages_TN = self._numbers_4T, self._pages_TN
        if self._host is not None:
            pinned = self._host[0]
            self._host.reverse()
            numbers_4T, pages_TN = pinned.take()
        num_seqs, width = batch.pages_BN.shape
        for row, values in enumerate((batch.tokens_T, batch.positions_T, batch.slot_T, batch.adapter_T)):
            if values.device == numbers_4T.device:
                numbers_4T[row, :num_seqs] = values
        pages_TN[:num_seqs, :width] = batch.pages_BN
        if num_rows > num_seqs:
            for row, value in enumerate(_PADDING):
                numbers_4T[row, num_seqs:num_rows] = value
            pages_TN[num_seqs:num_rows] = 0
        if self._host is not None:
            self._numbers_4T.copy_(numbers_4T, non_blocking=True)
            self._pages_TN[:num_rows].copy_(pages_TN[:num_rows], non_blocking=True)
            pinned.copied.record()
            if batch.tokens_T.device != numbers_4T.device:
                self._numbers_4T[0, :num_seqs] = batch.tokens_T

    def batch(self, kind: StepKind) -> Batch:
        """The first rows as a batch of sequences with one token each."""
        num_rows = kind.num_rows
        tokens_T, positions_T, slot_T, adapter_T = self._numbers_4T[:, :num_rows]
        return Batch(
            tokens_T=tokens_T,
            positions_T=positions_T,
            slot_T=slot_T,
            adapter_T=adapter_T,
            width=kind.width,
            has_lora=kind.has_lora,
            pages_BN=self._pages_TN[:num_rows],
            short_T=self.rows_T[:num_rows],
            long_Q3=self._no_pieces_Q3,
            num_queries=(1,) * num_rows,
            context_len=(1,) * num_rows,
            num_long=(0,) * num_rows,
            logit_rows=(),
        )


def width_class(width: int) -> int:
    """Adapter experts a token for which a step is recorded: slots that nobody needs cost next to nothing, recordings do."""
    return 1 << (width - 1).bit_length() if width else 0
