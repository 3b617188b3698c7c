"""LoRA beside PERFT: the paper's baselines (arXiv 2411.08212), trained and stored by PEFT itself.

In: what a recipe says (`LoraRecipe`), or a folder that PEFT has written. Out: a `peft.LoraConfig` for one base, or a checked
`LoraAdapter`. A LoRA adds `scale * up(down(x))` to what a linear map makes of `x`. Here it lies on attention projections
(`qvLoRA`: q and v), on the base's routers, or on its base experts.

Tensors of a folder, for each adapted linear map whose module is `PATH` (PEFT's names):

    base_model.model.PATH.lora_A.weight   [R, I]   down
    base_model.model.PATH.lora_B.weight   [O, R]   up

As with PERFT's adapters a folder is taken whole or not at all, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor
from transformers import PreTrainedModel

from perft.adapter import (
    CONFIG_FILE,
    DTYPES,
    WEIGHTS_FILE,
    Adapter,
    is_finite,
    read_adapter,
    read_fields,
    read_safetensors,
    weights_file,
)
from perft.attention import ATTENTION, AttentionBlock
from perft.base import load_skeleton
from perft.errors import AdapterError, PerftError
from perft.moe import MoeBlock, find_moe_blocks

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"]
_PREFIX = "base_model.model."
_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight$")
# initial values that are taken out of the base's weights: such a LoRA belongs to a base that was changed
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# what names modules; a stranger's regular expression could take for ever, and all of a process's threads with it
_NAME = re.compile(r"\^?[\w.-]+")
# fields of a LoraConfig that say nothing about what the adapter computes, or that are honoured below; any other must be unset
_HONOURED = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRecipe:
    """A LoRA as a recipe describes it. `alpha=None` means `2 * r`, as in the paper.

    Raises:
        PerftError: a value is out of its range, or a combination has no meaning.
    """

    targets: tuple[Target, ...] = field(
        default=("q_proj", "v_proj"), metadata={"help": "what a LoRA is put on; router and experts are the base's"}
    )
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    layers_to_transform: list[int] | None = None

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise PerftError(f"targets must name each target once, got {list(self.targets)}")
        for target in self.targets:
            if target not in get_args(Target):
                raise PerftError(f"targets must be among {', '.join(get_args(Target))}, got {target!r}")
        if self.r < 1:
            raise PerftError(f"r must be at least 1, got {self.r}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.r)
        assert self.alpha is not None
        if not 0 < self.alpha < 1e6:
            raise PerftError(f"alpha must be a positive number, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise PerftError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if self.dropout and not set(self.targets) <= set(ATTENTION):
            raise PerftError("dropout: PEFT has none for a LoRA on the router or on the experts; leave it out")
        if self.layers_to_transform is not None and not self.layers_to_transform:
            raise PerftError("layers_to_transform must be a non-empty list of layer numbers, got []")

    def to_peft(self, model: PreTrainedModel) -> LoraConfig:
        """PEFT's configuration of it for this base.

        Raises:
            PerftError: the base has no such module.
        """
        attention = [target for target in self.targets if target in ATTENTION]
        names = [name for name, _ in model.named_modules()]
        for target in attention:
            if not any(name.endswith(f".{target}") for name in names):
                raise PerftError(f"targets: {type(model).__name__} has no {target}")
        blocks, layers = find_moe_blocks(model), self.layers_to_transform
        there = set(range(model.config.get_text_config().num_hidden_layers))
        if len(attention) < len(self.targets):
            there = {block.layer for block in blocks}
        missing = sorted(set(layers or ()) - there)
        if missing:
            raise PerftError(f"layers_to_transform names layers that have no such target: {missing}")
        parameters = [
            name
            for target, find in (("router", _router_parameter), ("experts", _expert_parameters))
            if target in self.targets
            for block in blocks
            if layers is None or block.layer in layers
            for name in find(model, block)
        ]
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=attention,
            target_parameters=parameters or None,
            layers_to_transform=layers,
        )


def _router_parameter(model: PreTrainedModel, block: MoeBlock) -> list[str]:
    """The weight of a block's router: the one matrix of N rows of width D beside its experts."""
    parent = block.name.rpartition(".")[0]
    found = [
        name
        for name, parameter in model.get_submodule(parent).named_parameters()
        if tuple(parameter.shape) == (block.num_experts, block.hidden_size)
    ]
    if len(found) != 1:
        raise PerftError(f"targets: cannot tell the router of {parent} ({found or 'no matrix of its shape'})")
    return [f"{parent}.{found[0]}"]


def _expert_parameters(model: PreTrainedModel, block: MoeBlock) -> list[str]:
    """The matrices of a block's base experts, `[N, ., .]` each."""
    found = [
        name
        for name, parameter in model.get_submodule(block.name).named_parameters()
        if parameter.dim() == 3 and parameter.shape[0] == block.num_experts
    ]
    if not found:
        raise PerftError(f"targets: {block.name} does not hold its experts' weights as matrices of all experts")
    return [f"{block.name}.{name}" for name in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPair:
    """One adapted linear map: what is added to it is `scale * up(down(x))`.

    Args:
        path: of its module in the base.
        target: the last name of that path, `router` and `experts` whatever the family calls them.
        layer: of the decoder; `None` for what is in no layer.
        down_RI, up_OR: as stored (`lora_A`, `lora_B`).
        scale: alpha / r, or alpha / sqrt(r).
    """

    path: str
    target: str
    layer: int | None
    down_RI: Tensor
    up_OR: Tensor
    scale: float

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return self.down_RI.numel() + self.up_OR.numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraAdapter:
    """A checked LoRA.

    Args:
        config: as PEFT reads it.
        pairs: by path, in the order of the layers.
        digest: sha256 (hex) over what it computes: names, scales and every tensor's bytes.
    """

    config: LoraConfig
    pairs: tuple[LoraPair, ...]
    digest: str

    @property
    def targets(self) -> list[str]:
        """What it is put on, the targets of recipes first."""
        there = {pair.target for pair in self.pairs}
        known = [target for target in get_args(Target) if target in there]
        return known + sorted(there - set(known))

    @property
    def layers(self) -> list[int]:
        """Decoder layers that have it."""
        return sorted({pair.layer for pair in self.pairs if pair.layer is not None})

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [tensor for pair in self.pairs for tensor in (pair.down_RI, pair.up_OR)]

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """What its tensors weigh on disk."""
        return sum(tensor.nbytes for tensor in self.tensors)


def read_any_adapter(path: str | Path, base: str | Path | None = None) -> Adapter | LoraAdapter:
    """Read the adapter in folder `path`, PERFT or LoRA, and check all of it.

    Args:
        path: the adapter's folder.
        base: the base that it must fit, a folder or a hub id (only its config is read); without it only what the adapter says
            of itself is checked.

    Raises:
        AdapterError: anything about it is missing, left over, misshapen, not finite, or does not fit the base.
        BaseModelError: the base cannot be had or has no MoE blocks.
    """
    model = None if base is None else load_skeleton(base)
    if read_fields(path).get("peft_type") == "LORA":
        return read_lora(path, model)
    return read_adapter(path, None if model is None else find_moe_blocks(model))


def read_lora(path: str | Path, skeleton: PreTrainedModel | None = None) -> LoraAdapter:
    """Read the LoRA in folder `path` and check all of it.

    Args:
        path: the adapter's folder.
        skeleton: the base it must fit, on the meta device: PEFT is asked what a LoRA of this configuration has there.

    Raises:
        AdapterError: anything about it is missing, left over, misshapen, not finite, or does not fit the base; or it uses an
            option of PEFT's LoRA that is not supported.
    """
    config = read_lora_config(path)
    file = weights_file(path)
    try:
        found = read_safetensors(file)
        pairs = _pair(found, config)
        if skeleton is not None:
            _check_fit(found, config, skeleton)
    except PerftError as error:
        raise AdapterError(f"{file}: {error}") from error
    return LoraAdapter(config=config, pairs=pairs, digest=_digest(pairs))


def read_served_adapter(
    path: str | Path, blocks: Sequence[MoeBlock], attention: Sequence[AttentionBlock]
) -> Adapter | LoraAdapter:
    """Read the adapter in folder `path` that a server with this base can run: PERFT, or a LoRA on attention projections.

    Args:
        path: the adapter's folder.
        blocks, attention: of the base that it must fit.

    Raises:
        AdapterError: anything about it is missing, left over, misshapen, not finite, or does not fit the base; or it is a LoRA
            on something else.
    """
    if read_fields(path).get("peft_type") != "LORA":
        return read_adapter(path, blocks)
    adapter = read_lora(path)
    try:
        _check_attention(adapter, attention)
    except AdapterError as error:
        raise AdapterError(f"{Path(path) / WEIGHTS_FILE}: {error}") from error
    return adapter


def can_be_served(adapter: Adapter | LoraAdapter) -> bool:
    """Whether `perft-serve` runs adapters of its kind, on a base whose attention has such projections."""
    return isinstance(adapter, Adapter) or set(adapter.targets) <= set(ATTENTION)


def _check_attention(adapter: LoraAdapter, attention: Sequence[AttentionBlock]) -> None:
    """Whether a LoRA is on attention projections of this base only, and on all that its configuration names."""
    widths = {f"{block.name}.{target}": each for block in attention for target, each in block.widths.items()}
    others = [pair.path for pair in adapter.pairs if pair.target not in ATTENTION]
    if others:
        raise AdapterError(
            f"it is a LoRA on {', '.join(adapter.targets)} ({_some(others)}); of LoRAs those on attention projections can be "
            f"served: {', '.join(ATTENTION)}"
        )
    found = {pair.path: pair for pair in adapter.pairs}
    strange = sorted(set(found) - set(widths))
    if strange:
        raise AdapterError(f"tensors for projections that the base does not have: {_some(strange)}")
    # a regular expression is not tried: then what there is, is what was meant
    by_names = not isinstance(adapter.config.target_modules, str)
    expected = {path for path in widths if check_target_module_exists(adapter.config, path)} if by_names else set(found)
    missing, extra = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing:
        raise AdapterError(f"tensors are missing for {_some(missing)}")
    if extra:
        raise AdapterError(f"tensors for modules that its configuration does not name: {_some(extra)}")
    for path, pair in found.items():
        for side, width, there in (
            ("A", widths[path][0], pair.down_RI.shape[1]),
            ("B", widths[path][1], pair.up_OR.shape[0]),
        ):
            if width != there:
                raise AdapterError(
                    f"tensor {path}.lora_{side}.weight is {there} wide, but {width} is needed: is the adapter for another base?"
                )


def read_lora_config(path: str | Path) -> LoraConfig:
    """The configuration of the LoRA in folder `path`; reads no tensor.

    Raises:
        AdapterError: the file is missing or not a LoRA's, or it uses an option that is not supported.
    """
    fields, file = read_fields(path), Path(path) / CONFIG_FILE
    unsupported = [
        name for name, value in fields.items() if name not in _HONOURED and value not in (None, False, {}, [], "none")
    ]
    if unsupported:
        raise AdapterError(
            f"{file}: {', '.join(sorted(unsupported))}: plain LoRA is supported, without these options of PEFT"
        )
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{file}: init_lora_weights={init!r} has changed the base's weights, so that it does not fit the base as it is; "
            "convert it to a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = LoraConfig.__dataclass_fields__
    try:
        config = LoraConfig(**{name: value for name, value in fields.items() if name in known and name != "peft_type"})
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{file}: {error}") from error
    layers_pattern = config.layers_pattern or []
    names = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    names += [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    names += [config.exclude_modules] if isinstance(config.exclude_modules, str) else []
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AdapterError(
                f"{file}: {name!r} is a regular expression, which is not supported; name modules one by one"
            )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
        raise AdapterError(f"{file}: r must be a whole number of at least 1, got {ranks}")
    alphas = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
    if any(isinstance(a, bool) or not isinstance(a, (int, float)) or not -1e6 < a < 1e6 for a in alphas):
        raise AdapterError(f"{file}: lora_alpha must be a number, got {alphas}")
    return config


def rank_and_scale(config: LoraConfig, path: str) -> tuple[int, float]:
    """Rank and scale that a LoRA has on the module at `path` of the base."""
    rank = int(_of_pattern(config.rank_pattern or {}, path, config.r))
    alpha = _of_pattern(config.alpha_pattern or {}, path, config.lora_alpha)
    return rank, float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _of_pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first name in a pattern that a module's path is or, after a dot, ends with (`^`: is)."""
    parts = path.split(".")
    candidates = {".".join(parts[i:]) for i in range(len(parts))} | {f"^{path}"}
    name = next((name for name in pattern if name in candidates), None)
    return default if name is None else pattern[name]


def _pair(found: Mapping[str, Tensor], config: LoraConfig) -> tuple[LoraPair, ...]:
    """The tensors of a file as pairs, every one accounted for."""
    sides: dict[str, dict[str, str]] = {}
    left_over = []
    for key in found:
        match = _KEY.match(key)
        if match is None:
            left_over.append(key)
        else:
            sides.setdefault(match["path"], {})[match["side"]] = key
    if left_over:
        raise AdapterError(f"tensors that do not belong to a plain LoRA: {_some(left_over)}")
    if not sides:
        raise AdapterError("it holds no tensors")
    pairs = []
    for stored, keys in sides.items():
        if set(keys) != {"A", "B"}:
            raise AdapterError(f"{stored} has lora_{next(iter(keys))} alone")
        down_RI, up_OR = found[keys["A"]], found[keys["B"]]
        for tensor, key in ((down_RI, keys["A"]), (up_OR, keys["B"])):
            if tensor.dtype not in DTYPES:
                raise AdapterError(f"tensor {key} is {tensor.dtype}; float32, bfloat16 or float16 is needed")
            if tensor.dim() != 2:
                raise AdapterError(f"tensor {key} has shape {list(tensor.shape)}; a matrix is needed")
            if not is_finite(tensor):
                raise AdapterError(f"tensor {key.removeprefix(_PREFIX)} holds NaN or infinity")
        path = re.sub(r"(\.base_layer)+$", "", stored)
        target, layer = _place(path)
        rank, scale = rank_and_scale(config, path)
        # on the experts PEFT lays the ranks of all of them in one matrix
        if down_RI.shape[0] != up_OR.shape[1] or (target != "experts" and down_RI.shape[0] != rank):
            raise AdapterError(
                f"{stored}: lora_A {list(down_RI.shape)} and lora_B {list(up_OR.shape)} are not of rank {rank}"
            )
        pairs.append(LoraPair(path=stored, target=target, layer=layer, down_RI=down_RI, up_OR=up_OR, scale=scale))
    return tuple(sorted(pairs, key=lambda pair: (-1 if pair.layer is None else pair.layer, pair.path)))


def _place(path: str) -> tuple[str, int | None]:
    """What a module is as a target, and its decoder layer."""
    name = path.rpartition(".")[2]
    number = re.search(r"\.(\d+)\.", f".{path}.")
    target = "router" if name in ("gate", "router") else name
    return target, None if number is None else int(number[1])


def _check_fit(found: Mapping[str, Tensor], config: LoraConfig, skeleton: PreTrainedModel) -> None:
    """Holds the tensors of a file against those that PEFT would make for this base."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is looked at below, or changes nothing
            expected = get_peft_model_state_dict(get_peft_model(skeleton, config), save_embedding_layers=False)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot put it on this base: {str(error).splitlines()[0]}") from error
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise AdapterError(f"tensors are missing: {_some(missing)}")
    if extra:
        raise AdapterError(f"tensors for modules that the base does not have, or that are not targets: {_some(extra)}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise AdapterError(
                f"tensor {key} has shape {list(tensor.shape)}, but {list(expected[key].shape)} is needed: is the adapter for "
                "another base?"
            )


def _digest(pairs: Sequence[LoraPair]) -> str:
    form = [
        [pair.path, pair.scale, *([str(tensor.dtype), list(tensor.shape)] for tensor in (pair.down_RI, pair.up_OR))]
        for pair in pairs
    ]
    digest = hashlib.sha256(json.dumps(["LoRA", form]).encode())
    for pair in pairs:
        for tensor in (pair.down_RI, pair.up_OR):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: Sequence[str], at_most: int = 3) -> str:
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
