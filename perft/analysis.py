"""What an adapter does beside its base: whom tokens are sent to, and how routers' vectors lie to the memories they lead to.

In: an adapter, its base, data. Out: an `Analysis`, one `LayerAnalysis` for each adapted layer, with counts over all tokens and
vectors to draw (`perft.analysis_report`). It runs the PEFT model, as training does, and watches the experts call.

The paper's words (arXiv 2411.08212, section 3): a router's row is the *expert vector* that tokens are compared with, the rows
that an expert's first matrices are made of are its *key memories*. All of them are compared with the same input of the MoE
block, so they can be drawn in one space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from perft.adapter import read_adapter
from perft.base import first_line, load_base
from perft.data import PaddingCollator, encode, iter_records
from perft.errors import BaseModelError, PerftError
from perft.layer import PerftLayer
from perft.moe import MoeBlock, find_moe_blocks

MAX_KEYS = 512
"""Base key memories of a layer that are kept to draw, drawn evenly from its base experts."""
MAX_HIDDEN = 256
"""Inputs of a layer that are kept to draw."""
BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Vectors of one layer that are compared with its input. Each is a row, in float32.

    Args:
        hidden_SD: some inputs.
        base_router_ND: the base router's; `None` if the family keeps them where we do not find them.
        base_keys_SD: some of the base experts' key memories; `None` likewise.
        base_key_owner_S: which base expert's.
        adapter_router_MD: the adapter's own router's; `None` but for variant R.
        adapter_keys_MRD: the adapter experts' key memories, all of them.
    """

    hidden_SD: Tensor
    base_router_ND: Tensor | None
    base_keys_SD: Tensor | None
    base_key_owner_S: Tensor | None
    adapter_router_MD: Tensor | None
    adapter_keys_MRD: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAnalysis:
    """One adapted layer.

    Args:
        layer: its number.
        base_load_N: share of all choices that fell on each base expert.
        adapter_load_M: likewise of the adapter experts.
        together_NM: among the tokens that took base expert n, the share of adapter choices that fell on m; rows sum to 1, but
            for base experts that no token took, whose rows are 0.
        information: mutual information of the two choices, in bits: 0 where one says nothing of the other.
        base_balance: entropy of `base_load_N` over the most it can be: 1 is balanced.
        adapter_balance: likewise.
        router_entropy: mean entropy of the adapter router's probabilities over the most it can be; `None` but for variant R.
        own_keys, other_keys: variant R: mean |cosine| of an adapter expert's router vector with its own key memories, and
            with those of the others. Signs are left out: a linear unit's row may be negated if `up`'s is.
        nearest_base_router_M: variant R: largest cosine of each of its router's vectors with one of the base router's.
        vectors: to draw.
    """

    layer: int
    base_load_N: Tensor
    adapter_load_M: Tensor
    together_NM: Tensor
    information: float
    base_balance: float
    adapter_balance: float
    router_entropy: float | None
    own_keys: float | None
    other_keys: float | None
    nearest_base_router_M: Tensor | None
    vectors: Vectors

    def to_dict(self) -> dict[str, Any]:
        """All of it but the vectors, as plain data."""
        return {
            "layer": self.layer,
            "base_balance": self.base_balance,
            "adapter_balance": self.adapter_balance,
            "router_entropy": self.router_entropy,
            "information_bits": self.information,
            "own_keys_cosine": self.own_keys,
            "other_keys_cosine": self.other_keys,
            "nearest_base_router_cosine": _plain(self.nearest_base_router_M),
            "base_load": _plain(self.base_load_N),
            "adapter_load": _plain(self.adapter_load_M),
            "together": _plain(self.together_NM),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """An adapter on data.

    Args:
        adapter, base, data: what was given.
        variant, unit, top_k: the adapter's; `top_k` adapter experts take part in a token.
        base_top_k: base experts per token.
        num_examples, num_tokens: how much data.
        layers: in order.
    """

    adapter: str
    base: str
    data: list[str]
    variant: str
    unit: str
    top_k: int
    base_top_k: int
    num_examples: int
    num_tokens: int
    layers: list[LayerAnalysis]

    @property
    def chooses(self) -> bool:
        """Whether tokens take different adapter experts (variants R and E)."""
        return self.variant in ("R", "E")

    def to_dict(self) -> dict[str, Any]:
        """All of it but the vectors, as plain data."""
        names = ("adapter", "base", "data", "variant", "unit", "top_k", "base_top_k", "num_examples", "num_tokens")
        return {**{name: getattr(self, name) for name in names}, "layers": [each.to_dict() for each in self.layers]}


@torch.no_grad()
def analyze(
    adapter: str | Path,
    base: str,
    data: Sequence[str],
    *,
    columns: Sequence[str] = (),
    limit: int = 256,
    max_length: int = 256,
    dtype: str = "auto",
    seed: int = 0,
) -> Analysis:
    """Runs adapter and base over data.

    Args:
        adapter: its folder.
        base: folder or hub id.
        data: files or data sets, as in training.
        columns: fields to take, as theirs=ours.
        limit: so many examples, the first of the data.
        max_length: of an example in tokens; what is longer is cut.
        dtype: of the base: `auto` or a name.
        seed: of what is drawn from (inputs and base key memories).

    Raises:
        PerftError: adapter, base or data cannot be used.
    """
    if limit < 1 or max_length < 1:
        raise PerftError(f"limit and max_length must be at least 1, got {limit} and {max_length}")
    read_adapter(adapter)  # what is broken or not PERFT's is said before the base is loaded
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"no tokenizer for the base model {base!r}: {first_line(error)}") from error
    rows = _rows(data, tokenizer, columns, limit, max_length)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = load_base(base, dtype, device)
    read_adapter(adapter, find_moe_blocks(model))
    tuned = PeftModel.from_pretrained(model, str(adapter)).eval()
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in tuned.modules() if isinstance(module, PerftLayer)]
    watches = [_Watch(layer, -(-MAX_HIDDEN * BATCH // len(rows)), generator) for layer in layers if layer.perft_config]
    hooks = [watch.layer.register_forward_pre_hook(watch.see) for watch in watches]
    collate = PaddingCollator(pad_token_id=tokenizer.pad_token_id or 0)
    num_tokens = 0
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH])
        mask = batch["attention_mask"].to(model.device)
        num_tokens += int(mask.sum())
        for watch in watches:
            watch.real_T = mask.reshape(-1).bool()
        tuned(input_ids=batch["input_ids"].to(model.device), attention_mask=mask, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    config = watches[0].config
    return Analysis(
        adapter=str(adapter),
        base=base,
        data=list(data),
        variant=config.variant,
        unit=config.unit,
        top_k=watches[0].top_k,
        base_top_k=watches[0].base_top_k,
        num_examples=len(rows),
        num_tokens=num_tokens,
        layers=[watch.analysis(tuned.get_base_model()) for watch in watches],
    )


@dataclass(kw_only=False, slots=True)
class _Watch:
    """What one layer was seen to do.

    Args:
        layer: it.
        num_hidden: inputs to keep of each batch.
        generator: what is drawn comes from it.
        real_T: which tokens of the present batch are no padding.
    """

    layer: PerftLayer
    num_hidden: int
    generator: torch.Generator
    real_T: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: list[Tensor] = field(default_factory=list)
    pairs_NM: Tensor | None = None
    base_N: Tensor | None = None
    entropy: float = 0.0
    num_tokens: int = 0
    top_k: int = 0
    base_top_k: int = 0

    @property
    def name(self) -> str:
        return next(iter(self.layer.perft_config))

    @property
    def config(self) -> Any:
        return self.layer.perft_config[self.name]

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The experts call of one batch."""
        h, base_ids_TK, base_weights_TK = args
        h_TD = h.reshape(-1, h.shape[-1])[self.real_T]
        base_ids_TK, base_weights_TK = base_ids_TK[self.real_T], base_weights_TK[self.real_T]
        ids_TX, _ = self.layer._route(self.name, h_TD, base_ids_TK, base_weights_TK)
        self.base_top_k, self.top_k = base_ids_TK.shape[1], ids_TX.shape[1]
        num_adapter = self.layer.perft_down[self.name].shape[0]
        base_TN = F.one_hot(base_ids_TK.long(), self.layer.block.num_experts).sum(1).double()
        adapter_TM = F.one_hot(ids_TX, num_adapter).sum(1).double()
        pairs_NM, base_N = base_TN.T @ adapter_TM, base_TN.sum(0)
        self.pairs_NM = pairs_NM if self.pairs_NM is None else self.pairs_NM + pairs_NM
        self.base_N = base_N if self.base_N is None else self.base_N + base_N
        self.num_tokens += h_TD.shape[0]
        if self.name in self.layer.perft_gate:
            gate_MD = self.layer.perft_gate[self.name]
            log_TM = F.linear(h_TD.to(gate_MD.dtype), gate_MD).float().log_softmax(-1)
            self.entropy += float(-(log_TM.exp() * log_TM).sum())
        order = torch.randperm(h_TD.shape[0], generator=self.generator)[: self.num_hidden]
        self.hidden.append(h_TD[order.to(h_TD.device)].float().cpu())

    def analysis(self, model: nn.Module) -> LayerAnalysis:
        assert self.pairs_NM is not None
        assert self.base_N is not None
        pairs_NM = self.pairs_NM.cpu()
        gate = self.layer.perft_gate.get(self.name)
        gate_MD = None if gate is None else gate.detach().float().cpu()
        keys_MRD = self.layer.perft_down[self.name].detach().float().cpu()
        base_router_ND = _base_router(model, self.layer.block)
        keys, owner = _base_keys(self.layer, self.generator)
        own = other = nearest = None
        if gate_MD is not None:
            own, other = _alignment(gate_MD, keys_MRD)
            if base_router_ND is not None:
                nearest = (F.normalize(gate_MD, dim=-1) @ F.normalize(base_router_ND, dim=-1).T).amax(1)
        base_load_N = (self.base_N / self.base_N.sum()).float().cpu()
        adapter_load_M = (pairs_NM.sum(0) / pairs_NM.sum()).float()
        return LayerAnalysis(
            layer=self.layer.block.layer,
            base_load_N=base_load_N,
            adapter_load_M=adapter_load_M,
            together_NM=(pairs_NM / pairs_NM.sum(1, keepdim=True).clamp_min(1)).float(),
            information=mutual_information(pairs_NM),
            base_balance=balance(base_load_N),
            adapter_balance=balance(adapter_load_M),
            router_entropy=(
                None if gate_MD is None else self.entropy / self.num_tokens / max(math.log(gate_MD.shape[0]), 1e-9)
            ),
            own_keys=own,
            other_keys=other,
            nearest_base_router_M=nearest,
            vectors=Vectors(
                hidden_SD=torch.cat(self.hidden)[:MAX_HIDDEN],
                base_router_ND=base_router_ND,
                base_keys_SD=keys,
                base_key_owner_S=owner,
                adapter_router_MD=gate_MD,
                adapter_keys_MRD=keys_MRD,
            ),
        )


def balance(load: Tensor) -> float:
    """Entropy of shares over the most it can be: 1 if all are equal, 0 if one has all. One expert alone is balanced."""
    if load.numel() == 1:
        return 1.0
    return float(-torch.special.xlogy(load, load).sum() / math.log(load.numel()))


def mutual_information(pairs_NM: Tensor) -> float:
    """Of the row and the column of a pair, in bits; `pairs_NM` counts pairs."""
    joint = pairs_NM.double() / pairs_NM.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # where `joint` is 0 the term is 0, whatever `apart` is
    terms = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, apart)
    return max(0.0, float(torch.where(joint > 0, terms, 0.0).sum()) / math.log(2))


def _rows(
    data: Sequence[str], tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], limit: int, max_length: int
) -> list[dict[str, list[int]]]:
    if tokenizer.eos_token_id is None:
        raise PerftError("the base's tokenizer has no end-of-sequence token, which examples end with")
    rows: list[dict[str, list[int]]] = []
    for source in data:
        for record in iter_records(source, columns):
            if len(rows) == limit:
                return rows
            ids = encode(record, tokenizer)[0][:max_length]
            rows.append({"input_ids": ids, "labels": ids})
    if not rows:
        raise PerftError(f"no example in {', '.join(data)}")
    return rows


def _base_router(model: nn.Module, block: MoeBlock) -> Tensor | None:
    """The base router's vectors `[N, D]`: the one parameter of that shape beside the experts."""
    parent = model.get_submodule(block.name.rpartition(".")[0])
    experts = block.name.rpartition(".")[2]
    shape = (block.num_experts, block.hidden_size)
    found = [
        parameter
        for name, parameter in parent.named_parameters()
        if not name.startswith(f"{experts}.") and tuple(parameter.shape) == shape
    ]
    return found[0].detach().float().cpu() if len(found) == 1 else None


def _base_keys(layer: PerftLayer, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """Some of the base experts' key memories `[S, D]`, and whose they are `[S]`."""
    block, experts = layer.block, layer.base_layer
    first = next(
        (
            parameter
            for name, parameter in experts.named_parameters()
            if parameter.dim() == 3 and name.startswith("gate") and parameter.shape[0] == block.num_experts
        ),
        None,
    )
    if first is None or not first.is_floating_point():
        return None, None
    first_NID = first.detach()
    if getattr(experts, "is_transposed", False) or first_NID.shape[2] != block.hidden_size:
        first_NID = first_NID.transpose(1, 2)
    if first_NID.shape[2] != block.hidden_size:
        return None, None
    each = max(1, MAX_KEYS // block.num_experts)
    chosen = [torch.randperm(first_NID.shape[1], generator=generator)[:each] for _ in range(block.num_experts)]
    keys = torch.cat([rows_ID[ids.to(rows_ID.device)] for rows_ID, ids in zip(first_NID, chosen, strict=True)])
    owner = torch.arange(block.num_experts).repeat_interleave(torch.tensor([len(ids) for ids in chosen]))
    return keys.float().cpu(), owner


def _alignment(gate_MD: Tensor, keys_MRD: Tensor) -> tuple[float, float | None]:
    """Mean |cosine| of router vectors with their own key memories, and with the others'."""
    cosine_MM = torch.einsum("ad,mrd->amr", F.normalize(gate_MD, dim=-1), F.normalize(keys_MRD, dim=-1)).abs().mean(-1)
    num_experts = gate_MD.shape[0]
    own = cosine_MM.diagonal()
    if num_experts == 1:
        return float(own.mean()), None
    return float(own.mean()), float((cosine_MM.sum() - own.sum()) / (num_experts * (num_experts - 1)))


def _plain(tensor: Tensor | None) -> Any:
    return (
        None
        if tensor is None
        else [[round(value, 6) for value in row] if isinstance(row, list) else round(row, 6) for row in tensor.tolist()]
    )
