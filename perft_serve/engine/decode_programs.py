"""Decode steps as programs (`perft_kernels.program`): recorded once for each size of batch, then replayed without Python.

In: batches. Out: their logits, or only the likeliest tokens, if every sequence of the batch has one token; else `None`, and the
model is run as it is. A program depends on the number of tokens, on how many adapter experts a token takes at the most, and on
whether there are LoRAs, never on which adapters: these are rows and tables of the arena, which stay where they are. Only on a
CPU with the CPU kernels.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from perft_kernels.native import library
from perft_kernels.program import Program, RecordingError, Workspace, record
from perft_serve.adapters.arena import AdapterArena
from perft_serve.engine.batch import Batch
from perft_serve.engine.decode_inputs import DecodeInputs, StepKind, Tables, width_class

logger = logging.getLogger(__name__)

# Programs that are kept; one is some 100 KB of addresses.
MAX_PROGRAMS = 512


class DecodePrograms:
    """The programs of one model.

    Args:
        forward: the model: logits `[N, V]` of a batch's `logit_rows` (given as a tensor).
        choose: the model: the likeliest tokens `[N]` of the same, -1 where a logit is NaN; `None`: it cannot tell them without
            logits.
        arena: the adapters' memory; where its tables are made anew, so are the programs that read them.
        max_num_seqs: the most sequences in a batch.
        max_pages: the most pages of one sequence.
    """

    def __init__(
        self,
        forward: Callable[[Batch, Tensor], Tensor],
        choose: Callable[[Batch, Tensor], Tensor] | None,
        arena: AdapterArena,
        *,
        max_num_seqs: int,
        max_pages: int,
    ) -> None:
        self._forward = forward
        self._choose = choose
        self._tables = Tables(arena)
        self._kernels = library()
        self._workspace = Workspace()
        self._programs: OrderedDict[StepKind, Program] = OrderedDict()  # latest used last
        self._refused = False
        self._inputs = DecodeInputs(max_num_seqs, max_pages, torch.device("cpu"))

    def run(self, batch: Batch) -> Tensor | None:
        """Logits `[B, V]` in float32, good until the next call; `None` if there is no program for such a batch."""
        return self._run(batch, self._forward)

    def choose(self, batch: Batch) -> Tensor | None:
        """The likeliest tokens `[B]`, as `run`'s logits have them, -1 where one is NaN; `None` as `run`."""
        return None if self._choose is None else self._run(batch, self._choose)

    def _run(self, batch: Batch, function: Callable[[Batch, Tensor], Tensor]) -> Tensor | None:
        num_seqs = len(batch.num_queries)
        if not batch.is_decode or self._refused or self._kernels is None:
            return None
        self._tables.drop_stale(self._programs)
        kind = StepKind(num_seqs, width_class(batch.width), batch.has_lora, function is self._choose)
        self._inputs.fill(batch, num_seqs)
        inputs, rows_T = self._inputs.batch(kind), self._inputs.rows_T[:num_seqs]
        program = self._programs.get(kind)
        if program is None:
            try:
                program = record(lambda: function(inputs, rows_T), self._kernels, self._workspace)
            except RecordingError as error:
                logger.info("decode steps go through Python, which is slower: %s", error)
                self._refused = True
                return None
            self._programs[kind] = program
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
            return program.output  # recording has run it
        self._programs.move_to_end(kind)
        return program.run()
