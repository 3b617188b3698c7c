"""The base model with the seam behind it, and its KV cache: runs plans. In: a `Plan`. Out: a `ChunkResult` per chunk.

A step is launched, and its results are collected: on a GPU it is on its way meanwhile, and the next one may be launched with
the tokens that it is about to choose.

It knows no queue and no names: adapters are slots of the arena here.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import abc
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perft.attention import find_attention_blocks
from perft.base import load_base, load_config, random_base
from perft.errors import BaseModelError
from perft.moe import find_moe_blocks
from perft_kernels import gpu
from perft_kernels.adapter_router import RULE_FIRST_EXPERT
from perft_kernels.fusion import fuse
from perft_serve.adapters.arena import AdapterArena
from perft_serve.engine.balance import Balances
from perft_serve.engine.batch import Batch, LongRule, build_batch, long_for_speed, long_if_prompt, never_long
from perft_serve.engine.config import EngineConfig
from perft_serve.engine.decode_graphs import Capture, CudaCapture, DecodeGraphs
from perft_serve.engine.decode_programs import DecodePrograms
from perft_serve.engine.digest import base_digest
from perft_serve.engine.events import Routing
from perft_serve.engine.gpu_base import use_gpu_ops
from perft_serve.engine.grammar import Grammar, Grammars, allowed
from perft_serve.engine.logits import LogitEditor
from perft_serve.engine.packing import PanelHead, greedy_head, pack
from perft_serve.engine.sampler import FAULTS, EditedRows, Fault, Scores, sample, score, uniform
from perft_serve.engine.scheduler import Chunk, ChunkResult, Plan
from perft_serve.engine.seam import KvCache, Seam, install
from perft_serve.engine.sequence import Sequence
from perft_serve.engine.transfer import to_device, to_host

logger = logging.getLogger(__name__)

# these choose rotary frequencies by the longest sequence of a batch, so a request would depend on its neighbours
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")

# Operations of torch whose result for a token has nothing to do with the other tokens. Sums and products of matrices may choose
# the order of their sums by how many rows there are.
_ROW_BY_ROW = {
    "add", "add_", "sub", "mul", "mul_", "div", "div_", "neg", "pow", "rsqrt", "exp", "sigmoid", "silu", "gelu", "relu",
    "tanh", "clamp", "clamp_", "clamp_min", "where", "masked_fill", "masked_fill_", "bitwise_not", "eq", "ne", "lt",
    "gt", "le", "ge", "embedding", "index", "index_select", "gather", "topk", "scatter_", "cat", "stack", "copy_",
    "clone", "to", "_to_copy", "contiguous", "reshape", "flatten", "new_empty", "empty_like", "zeros_like", "new_zeros",
    "softmax", "_softmax", "sin", "cos", "arange",
}  # fmt: skip

# Sequences that follow a grammar, and the masks over the vocabulary that are being computed for them
Masks: TypeAlias = "tuple[list[Sequence], Future[Tensor]]"


@dataclass(kw_only=True, slots=True)
class Step:
    """A plan that has been launched. Its tensors belong to it. What the host is to read is on its way there, and has come when
    `copied` has happened; `copied` is `None` where there is nothing to wait for.

    Args:
        plan: what is computed.
        sampled: the sequences that get a token, in the plan's order.
        tokens_S: what is chosen for each of them, on the device; `FAULTS` if nothing can be.
        told_S: the same in host memory.
        computed_at: when the logits were there, or (on a GPU) on their way (`time.monotonic()`).
        logprobs: of the tokens of the sequences `sampled[i]` for i in `with_logprobs`.
        prompt_logprobs: of the prompt tokens that follow those in `Chunk.scored`, one sequence after the other.
        routes: what the tokens took, if that is looked at for the balances.
        routing: ids and weights `[R, L, X]` of the tokens `Batch.routed_rows`.
    """

    plan: Plan
    computed_at: float
    sampled: list[Sequence]
    tokens_S: Tensor
    told_S: Tensor
    with_logprobs: list[int]
    logprobs: Scores | None = None
    prompt_logprobs: Scores | None = None
    copied: torch.cuda.Event | None = None
    routes: list[tuple[int, Tensor]] | None = None
    routing: tuple[Tensor, Tensor] | None = None


class Runner:
    """A base model that computes steps.

    Args:
        config: names the model, its dtype and device, and the sizes of KV cache and arena.

    Attributes:
        grammars: computes the masks of sequences that follow a grammar.
        arena: the adapters' memory.
        vocab_size, max_position_embeddings, eos_token_ids, base_digest: facts about the model.
        num_pages: pages that the KV cache has to give.
        balances: how evenly adapters' tokens spread, looked at now and then.
        runs_ahead: whether a step is to be launched before the last one's results are collected, where it can be.

    Raises:
        BaseModelError: the model cannot be loaded, has no MoE blocks, or does something that batches cannot do.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.device = _device(config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton launches on the thread's present device
        self._page_size = config.page_size
        self._model = _load(config, self.device).eval()
        self.base_digest = base_digest(self._model)
        text_config = self._model.config.get_text_config()
        _check_rope(text_config)
        self.vocab_size = int(self._model.get_input_embeddings().weight.shape[0])
        self.max_position_embeddings = int(getattr(text_config, "max_position_embeddings", 0)) or None
        self.eos_token_ids = _eos_token_ids(self._model)
        self.dtype = self._model.dtype
        self._editor = LogitEditor(self.eos_token_ids, self.vocab_size, self.device)
        self.grammars = Grammars(config.model, self.vocab_size, self.eos_token_ids)
        blocks, attention = find_moe_blocks(self._model), find_attention_blocks(self._model)
        pack(self._model, blocks)
        is_invariant = config.batch_invariant == "on"
        use_gpu_ops(self._model, blocks, batch_invariant=is_invariant)
        self._seam = Seam()
        install(self._model, blocks, attention, self._seam)
        shapes = self._kv_shapes(text_config)
        self._long_rule: LongRule = long_for_speed
        if is_invariant:
            self._check_invariant()
            self._long_rule = long_if_prompt if gpu.takes(self._model.get_input_embeddings().weight) else never_long
        self._head = self._greedy_head()
        blocks = [replace(block, top_k=self._seam.base_top_k) for block in blocks]  # seen, whatever the config says
        self.arena = AdapterArena(blocks, config.adapter_memory, self.dtype, self.device, attention)
        self._seam.arena = self.arena
        self._seam.ones_T1 = torch.ones(max(config.max_num_batched_tokens, config.max_num_seqs), 1, device=self.device)
        self.balances = Balances(self.arena)
        self.runs_ahead = config.async_scheduling == "on" or (
            config.async_scheduling == "auto" and self.device.type == "cuda"
        )
        page_bytes = sum(heads * (key_dim + value_dim) for heads, key_dim, value_dim in shapes.values())
        page_bytes *= config.page_size * self.dtype.itemsize
        self.num_pages = config.kv_memory // page_bytes
        if self.num_pages < 1:
            raise BaseModelError(
                f"KV memory of {config.kv_memory:,} bytes does not hold one page of {page_bytes:,} bytes; "
                "start with a larger --kv-memory"
            )
        # without an upper bound a small model would take pages that no batch can fill
        if self.max_position_embeddings is not None:
            self.num_pages = min(
                self.num_pages, -(-self.max_position_embeddings // config.page_size) * config.max_num_seqs
            )
        self._cache = KvCache(shapes, self.num_pages, config.page_size, self.dtype, self.device)
        self._seam.cache = self._cache
        self._programs: DecodePrograms | DecodeGraphs | None = None
        sizes = {"max_num_seqs": config.max_num_seqs, "max_pages": self._max_pages(config)}
        if self.device.type == "cpu" and config.decode_programs == "on":
            choose = None if self._head is None else self._choose
            self._programs = DecodePrograms(self._forward, choose, self.arena, **sizes)
        elif self.device.type == "cuda" and config.cuda_graphs != "off":
            self._programs = self._graphs(CudaCapture(self.device), **sizes)
            if config.cuda_graphs == "start":
                with torch.inference_mode():
                    self._programs.capture_all()

    @torch.inference_mode()
    def launch(self, plan: Plan, after: Step | None = None) -> Step:
        """Start one step; the plan has at least one chunk.

        Args:
            after: the step before, where the plan was chosen ahead of its results: all tokens are those that it chooses.
        """
        self._cache.clear(plan.new_pages)
        masks = self._begin_masks(plan)
        batch = build_batch(plan, self._page_size, self._long_rule)
        if after is not None:
            place = {seq: i for i, seq in enumerate(after.sampled)}
            rows = self._indices([place[chunk.seq] for chunk in plan.chunks])
            tokens_T = after.tokens_S[rows].clamp(min=0)  # what follows a fault is of no use to anybody
            batch = replace(batch, tokens_T=tokens_T)
        # what is computed on the way of a recorded step, nobody sees
        programs = None if batch.routed_rows else self._programs
        if isinstance(programs, DecodePrograms) and all(chunk.seq.takes_likeliest for chunk in plan.chunks):
            chosen_B = programs.choose(batch)
            if chosen_B is not None:
                return self._step(plan, [chunk.seq for chunk in plan.chunks], chosen_B.clone(), time.monotonic())
        logits_NV = None if programs is None else programs.run(batch)
        routes = None
        if logits_NV is None:
            # a chunk in the middle of a prompt needs no logits, but the model computes at least one row
            rows = self._indices(batch.logit_rows or (0,))
            routes = self._seam.routes = self.balances.begin(batch)
            try:
                logits_NV = self._forward(batch.to(self.device), rows)
            finally:
                self._seam.routes = None
        step = self._sampled(plan, logits_NV, masks)
        if self.device.type == "cuda":
            step.copied = torch.cuda.Event()
            step.copied.record()
        step.routes = routes
        if batch.routed_rows:
            step.routing = self._take_routing()
        return step

    def _step(self, plan: Plan, sampled: list[Sequence], tokens_S: Tensor, computed_at: float) -> Step:
        """A launched step, and its tokens on their way to the host."""
        return Step(
            plan=plan,
            computed_at=computed_at,
            sampled=sampled,
            tokens_S=tokens_S,
            told_S=to_host(tokens_S),
            with_logprobs=[i for i, seq in enumerate(sampled) if seq.request.params.logprobs is not None],
        )

    def _graphs(self, capture: Capture, **sizes: Any) -> DecodeGraphs:
        return DecodeGraphs(self._forward, self.arena, capture, self.device, base_top_k=self._seam.base_top_k, **sizes)

    def _max_pages(self, config: EngineConfig) -> int:
        """The most pages that a sequence can have."""
        longest = config.max_model_len or self.max_position_embeddings
        return self.num_pages if longest is None else min(self.num_pages, -(-longest // config.page_size))

    def _forward(self, batch: Batch, rows: Tensor) -> Tensor:
        """float32 logits of the batch's tokens `rows`, `[N, V]`."""
        self._seam.batch = batch
        output = self._model(**self._inputs(batch.tokens_T, batch.positions_T), logits_to_keep=rows)
        return output.logits[0].float()

    def _choose(self, batch: Batch, rows: Tensor) -> Tensor:
        """The likeliest tokens of the batch's tokens `rows`, as `_forward` has them: `[N]`, -1 where a logit is NaN."""
        assert self._head is not None
        self._seam.batch = batch
        output = self._model.base_model(**self._inputs(batch.tokens_T, batch.positions_T))
        return self._head.argmax(output.last_hidden_state[0][rows])

    def _inputs(self, tokens_T: Tensor, positions_T: Tensor) -> dict[str, Any]:
        """What every call of the model is given."""
        return {
            "input_ids": tokens_T.unsqueeze(0),
            "position_ids": positions_T.unsqueeze(0),
            "use_cache": False,
            "perft_seam": self._seam,
        }

    def _begin_masks(self, plan: Plan) -> Masks | None:
        """Have the masks of this step's sequences computed while the model runs."""
        seqs = [chunk.seq for chunk in plan.chunks if chunk.samples and chunk.seq.grammar is not None]
        return (seqs, self.grammars.masks([_grammar(seq) for seq in seqs])) if seqs else None

    def _sampled(self, plan: Plan, logits_NV: Tensor, masks: Masks | None) -> Step:
        """The step whose logits these are, with all that is wanted of them; nothing is read back."""
        computed_at = time.monotonic()
        scored: list[int] = []  # rows whose prompt tokens are to be scored,
        following: list[int] = []  # those tokens, and
        num_top: list[int] = []  # how many likeliest ones are to be told beside each
        sampled: list[tuple[Chunk, int]] = []  # chunks with a token to choose, and its row
        row = 0
        for chunk in plan.chunks:
            if chunk.scored:
                scored += range(row, row + len(chunk.scored))
                following += chunk.seq.request.prompt_ids[chunk.scored.start + 1 : chunk.scored.stop + 1]
                num_top += [chunk.seq.request.params.prompt_logprobs or 0] * len(chunk.scored)
                row += len(chunk.scored)
            if chunk.samples:
                sampled.append((chunk, row))
                row += 1
        step = self._sample(plan, sampled, logits_NV, masks, computed_at)
        if scored:
            scored_NV = self._rows(logits_NV, scored)
            step.prompt_logprobs = score(scored_NV, self._indices(following), num_top).to_host()
        return step

    def _rows(self, logits_NV: Tensor, rows: list[int]) -> Tensor:
        """Some rows of the logits; no copy where they are all of them."""
        return logits_NV if rows == list(range(len(logits_NV))) else logits_NV[self._indices(rows)]

    def _indices(self, values: abc.Sequence[int]) -> Tensor:
        return to_device(values, torch.int64, self.device)

    def _sample(
        self,
        plan: Plan,
        sampled: list[tuple[Chunk, int]],
        logits_NV: Tensor,
        masks: Masks | None,
        computed_at: float,
    ) -> Step:
        """Chooses a token for each chunk that gets one."""
        if not sampled:
            return self._step(plan, [], self._indices([]), computed_at)
        logits_SV = self._rows(logits_NV, [row for _, row in sampled])
        seqs = [chunk.seq for chunk, _ in sampled]
        draws = [uniform(chunk.seq.seed, chunk.seq.request.choice, chunk.end) for chunk, _ in sampled]
        edited = self._edited(seqs, logits_SV, masks)
        tokens_S = sample(logits_SV, [seq.request.params for seq in seqs], draws, edited)
        step = self._step(plan, seqs, tokens_S, computed_at)
        if step.with_logprobs:
            wanted = self._indices(step.with_logprobs)
            num_top = [seqs[i].request.params.logprobs or 0 for i in step.with_logprobs]
            step.logprobs = score(logits_SV[wanted], tokens_S[wanted], num_top).to_host()
        return step

    @torch.inference_mode()
    def collect(self, step: Step) -> list[ChunkResult]:
        """What has come of a launched step; waits until it is there."""
        if step.copied is not None:
            step.copied.synchronize()
        tokens = step.told_S.tolist()
        logprobs = dict(zip(step.with_logprobs, step.logprobs.read(), strict=True)) if step.logprobs else {}
        found = {
            seq: ChunkResult(token_id=token, logprobs=logprobs.get(i)) if token >= 0 else _faulty(seq, FAULTS[token])
            for i, (seq, token) in enumerate(zip(step.sampled, tokens, strict=True))
        }
        results = [found.get(chunk.seq, ChunkResult()) for chunk in step.plan.chunks]
        if step.prompt_logprobs is not None:
            scores = iter(step.prompt_logprobs.read())
            for i, chunk in enumerate(step.plan.chunks):
                results[i] = replace(results[i], prompt_logprobs=tuple(itertools.islice(scores, len(chunk.scored))))
        if step.routes is not None:  # only now, when the step's tokens are there and nobody waits for the device
            self.balances.note(step.plan, step.routes)
        return results if step.routing is None else self._with_routing(step, results)

    def _edited(self, seqs: list[Sequence], logits_BV: Tensor, masks: Masks | None) -> EditedRows | None:
        """The logits of the sequences that have them changed; log-probabilities are of those that were there before."""
        rows = [i for i, seq in enumerate(seqs) if seq.edits_logits or seq.grammar is not None]
        if not rows:
            return None
        logits_RV = logits_BV[rows]  # a copy
        edited = [r for r, i in enumerate(rows) if seqs[i].edits_logits]
        if edited:
            some_RV = logits_RV[edited]
            self._editor.edit(some_RV, [seqs[rows[r]] for r in edited])
            logits_RV[edited] = some_RV
        if masks is not None:
            followers, mask = masks
            place = {seq: r for r, seq in enumerate(followers)}
            following = [r for r, i in enumerate(rows) if seqs[i].grammar is not None]
            mask_BW = mask.result()[[place[seqs[rows[r]]] for r in following]]
            forbidden_BV = ~allowed(mask_BW, self.vocab_size, self.device)
            logits_RV[following] = logits_RV[following].masked_fill(forbidden_BV, -math.inf)
        return EditedRows(tuple(rows), logits_RV)

    def _take_routing(self) -> tuple[Tensor, Tensor]:
        """What adapter experts the tokens `Batch.routed_rows` of the last pass took, and with what weights: `[R, L, X]`."""
        routed, self._seam.routed = self._seam.routed, {}
        ids_RLX, weights_RLX = (
            torch.stack([routed[l][which] for l in range(len(self.arena.blocks))], dim=1) for which in (0, 1)
        )
        return ids_RLX, weights_RLX

    def _with_routing(self, step: Step, results: list[ChunkResult]) -> list[ChunkResult]:
        """`results` with what adapter experts the tokens `Batch.routed_rows` took, each chunk's with its own."""
        assert step.routing is not None
        plan, (ids_RLX, weights_RLX) = step.plan, (tensor.cpu() for tensor in step.routing)
        first_row = 0
        told = list(results)
        for i, chunk in enumerate(plan.chunks):
            seq = chunk.seq
            if seq.next_routed is None or seq.next_routed >= chunk.end:
                continue
            start = max(chunk.start, seq.next_routed)
            rows = slice(first_row, first_row + chunk.end - start)
            first_row = rows.stop
            first_expert = int(self.arena.rule_A6[seq.adapter_slot, RULE_FIRST_EXPERT])
            ordinals = (self.arena.rank_LE[:, first_expert] > 0).nonzero().flatten().tolist()  # layers that are adapted
            ids_TLk = ids_RLX[rows][:, ordinals, : seq.width]
            told[i] = replace(
                results[i],
                routing=Routing(
                    start=start,
                    layers=tuple(self.arena.blocks[l].layer for l in ordinals),
                    width=seq.width,
                    ids=torch.where(ids_TLk >= 0, ids_TLk - first_expert, -1).to(torch.int32).numpy().tobytes(),
                    weights=weights_RLX[rows][:, ordinals, : seq.width].contiguous().numpy().tobytes(),
                ),
            )
        return told

    @torch.inference_mode()
    def _greedy_head(self) -> PanelHead | None:
        """What tells the likeliest token without all logits, if there is one; asked before there is a KV cache."""
        tokens_T = torch.arange(min(16, self.vocab_size), device=self.device)
        return greedy_head(self._model, **self._inputs(tokens_T, tokens_T))

    @torch.inference_mode()
    def _check_invariant(self) -> None:
        """Refuses a model that does more than our ops and what treats every element, or every row, by itself."""
        tokens_T = torch.arange(min(3, self.vocab_size), device=self.device)
        names = fuse(lambda: self._model(**self._inputs(tokens_T, tokens_T)).logits).names
        others = sorted({name for name in names if "::" in name and name.partition("::")[2] not in _ROW_BY_ROW})
        if others:
            needed = "" if self.device.type == "cuda" else "; on a CPU that takes bfloat16 and a C compiler"
            raise BaseModelError(
                f"{type(self._model).__name__} cannot be batch-invariant: it computes {', '.join(others)}, whose results may "
                f"depend on the size of the batch{needed}; start with --batch-invariant off"
            )

    @torch.inference_mode()
    def _kv_shapes(self, text_config: Any) -> dict[int, tuple[int, int, int]]:
        """Shapes of keys and values by layer, found out by a forward pass of one token."""
        zero_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            self._model(**self._inputs(zero_1, zero_1))
        except NotImplementedError as error:
            raise BaseModelError(str(error)) from error
        shapes = self._seam.kv_shapes
        if len(shapes) != text_config.num_hidden_layers:
            raise BaseModelError(
                f"{type(self._model).__name__}: {len(shapes)} of its {text_config.num_hidden_layers} layers keep keys and "
                "values; models with other kinds of layers (linear attention, state space) cannot be served"
            )
        return shapes


def _grammar(seq: Sequence) -> Grammar:
    """The grammar of a sequence that has one."""
    assert isinstance(seq.grammar, Grammar)
    return seq.grammar


def _faulty(seq: Sequence, fault: Fault) -> ChunkResult:
    """The end of a sequence for which no token can be chosen."""
    if fault == "nothing left":
        reason = None if seq.grammar is None else _grammar(seq).error
        return ChunkResult(
            error=reason
            or "no token is left to choose: allowed_token_ids, bad_words, min_tokens and structured_outputs together exclude "
            "all of them",
            error_kind="request",
        )
    adapter = seq.request.adapter
    whose = "the base model" if adapter is None else f"adapter {adapter.name!r}"
    return ChunkResult(error=f"the logits are not numbers (NaN): {whose} gives no usable output")


def _load(config: EngineConfig, device: torch.device) -> PreTrainedModel:
    """The base, on the device."""
    if config.load_format == "dummy":
        logger.warning("the base's weights are random (--load-format dummy): what it says means nothing")
        return random_base(load_config(config.model), config.dtype, device)
    return load_base(config.model, config.dtype, device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: this torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def _check_rope(text_config: Any) -> None:
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in [parameters, *nested]:
        if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            raise BaseModelError(
                f"rotary embeddings of type {rope['rope_type']!r} depend on the longest sequence of a batch, so that a "
                "request's result would depend on its neighbours; such a base cannot be served"
            )


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
