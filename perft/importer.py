"""Checkpoints of the PERFT authors' code, turned into adapters.

In: a folder as their `save_pretrained` leaves it (`config.json` of a whole `olmoe-adapter` or `mixtral-adapter` model, and
`model.safetensors` with only the trained tensors), and the base that it was trained on (its config is enough). Out: an
adapter folder of ours. Every tensor of the file ends up in the adapter, or the import is refused. It loads no base weights.

    theirs, per MoE layer                                              ours
    {shared_adapter|shared_routing_adapter}.J.unit.{lora_A|adapter_w1} [r, D]     perft_down[J]
    {shared_adapter|shared_routing_adapter}.J.unit.{lora_B|adapter_w2} [D, r]     perft_up[J], transposed: rank rows
    shared_routing_adapter_gate                                       [M, D]     perft_gate
    experts.E.embedded_routing_adapter.unit.*                                     as the units above, J = E

What a checkpoint does not say is how variant R combines. The released OLMoE code multiplies the adapter experts by the *base*
router's top-k weights, by rank (`combine="base-rank"`); the Mixtral code by the adapter's own renormalised weights, as
the paper has it (`combine="own"`). The import follows the released code of the family unless it is told otherwise.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from perft.adapter import Adapter, LayerTensors, pickled_files, read_adapter, read_safetensors, write_adapter
from perft.base import build_skeleton, load_config
from perft.config import Combine, PerftConfig, Unit, Variant
from perft.errors import AdapterError, PerftError
from perft.moe import MoeBlock, find_moe_blocks

SOURCE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the authors' code for one base architecture does.

    Args:
        base_model_type: `model_type` of the plain base.
        block: name of the MoE block in their tensors.
        num_experts_field: their config's name for N.
        combine: how variant R combines.
    """

    base_model_type: str
    block: str
    num_experts_field: str
    combine: Combine


FAMILIES = {
    "olmoe-adapter": Family(base_model_type="olmoe", block="mlp", num_experts_field="num_experts", combine="base-rank"),
    "mixtral-adapter": Family(
        base_model_type="mixtral", block="block_sparse_moe", num_experts_field="num_local_experts", combine="own"
    ),
}

# their switch in config.json -> (name of the variant in messages, where its units stand in a tensor's name)
SWITCHES: dict[str, tuple[str, str]] = {
    "shared_adapter": ("S/D", r"shared_adapter\.(?P<unit>\d+)"),
    "shared_routing_adapter": ("R", r"shared_routing_adapter\.(?P<unit>\d+)"),
    "embedded_routing_adapter": ("E", r"experts\.(?P<unit>\d+)\.embedded_routing_adapter"),
}

# their adapter type -> (our unit, names of its down and up matrices, arguments it has)
UNITS: dict[str, tuple[Unit, str, str, frozenset[str]]] = {
    "LoRA": ("lora", "lora_A", "lora_B", frozenset({"r", "lora_alpha", "lora_dropout"})),
    "Parallel_Adapter": ("parallel", "adapter_w1", "adapter_w2", frozenset({"hidden_dim", "hidden_act", "dropout"})),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An official checkpoint, as its config describes it.

    Args:
        family: which of the authors' model files wrote it.
        switch: the one active variant, as their config calls it.
        adapter_type: `LoRA` or `Parallel_Adapter`.
        fields: the whole `config.json`.
    """

    family: Family
    switch: str
    adapter_type: str
    fields: Mapping[str, Any]

    @property
    def variant(self) -> Variant:
        """The variant in our words."""
        if self.switch == "shared_adapter":
            return "S" if self.fields["shared_adapter_num"] == 1 else "D"
        return "R" if self.switch == "shared_routing_adapter" else "E"

    @property
    def num_units(self) -> int:
        """Adapter experts per layer."""
        name = {
            "shared_adapter": "shared_adapter_num",
            "shared_routing_adapter": "shared_routing_adapter_num_experts",
            "embedded_routing_adapter": self.family.num_experts_field,
        }[self.switch]
        return int(self.fields[name])


def import_checkpoint(
    source: str | Path, out: str | Path, *, base: str | Path, combine: Combine | None = None
) -> Adapter:
    """Turns the official checkpoint in `source` into an adapter in `out`, complete or not at all.

    Args:
        source: folder with `config.json` and `model.safetensors`.
        out: folder to make; must not exist or be empty.
        base: the base model (folder or hub id); only its config is read.
        combine: for variant R, whose weights combine the adapter experts; `None` follows the family's released code.

    Returns:
        The adapter as it was written, read back and checked against the base.

    Raises:
        AdapterError: the checkpoint is not one, is damaged, has tensors that cannot be placed, or is for another base.
        BaseModelError: the base cannot be had or has no MoE blocks.
    """
    folder, target = Path(source), Path(out).absolute()
    checkpoint = _read_checkpoint(folder)
    if combine is not None and checkpoint.variant != "R":
        raise AdapterError(
            f"--combine has no meaning for this checkpoint: it is variant {checkpoint.variant}, and only R has a router of "
            "its own"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not empty; choose another folder for the adapter")
    base_config = load_config(base)
    _check_family(checkpoint, base_config)
    blocks = find_moe_blocks(build_skeleton(base_config))
    _check_base(checkpoint, base_config, blocks)
    tensors = _read_tensors(folder / SOURCE_WEIGHTS)
    layers = _collect_layers(checkpoint, tensors, {block.layer: block for block in blocks})
    config = _adapter_config(checkpoint, combine, str(base), layers, blocks)

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_adapter(scratch / "new", config, layers, {block.layer: block.name for block in blocks})
        adapter = read_adapter(scratch / "new", blocks)
        (scratch / "new").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return adapter


def _read_checkpoint(folder: Path) -> Checkpoint:
    file = folder / "config.json"
    if not folder.is_dir():
        raise AdapterError(f"no checkpoint at {str(folder)!r}: the folder does not exist")
    if (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder} is an adapter already (it has an adapter_config.json), not a checkpoint of the authors' code; "
            "nothing to import"
        )
    if not file.is_file():
        raise AdapterError(f"{folder} has no config.json; an official checkpoint has config.json and {SOURCE_WEIGHTS}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{file}: not readable as JSON: {error}") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type not in FAMILIES:
        raise AdapterError(
            f"{file}: model_type is {model_type!r}; official PERFT checkpoints have one of {', '.join(FAMILIES)}"
        )
    active = [switch for switch in SWITCHES if fields.get(switch) is True]
    if not active:
        raise AdapterError(f"{file}: none of {', '.join(SWITCHES)} is true, so it holds no PERFT adapter")
    if len(active) > 1:
        raise AdapterError(
            f"{file}: combines {' with '.join(active)} (variants {' and '.join(SWITCHES[s][0] for s in active)}); "
            "an adapter here is one variant, so this checkpoint cannot be imported"
        )
    switch = active[0]
    adapter_type = fields.get(f"{switch}_type")
    if adapter_type not in UNITS:
        raise AdapterError(f"{file}: {switch}_type is {adapter_type!r}; known are {', '.join(UNITS)}")
    checkpoint = Checkpoint(family=FAMILIES[model_type], switch=switch, adapter_type=str(adapter_type), fields=fields)
    _check_fields(checkpoint, file)
    return checkpoint


def _check_fields(checkpoint: Checkpoint, file: Path) -> None:
    """Every field that the import relies on is there and of the right kind."""
    fields, switch = checkpoint.fields, checkpoint.switch
    family = checkpoint.family
    needed = ["hidden_size", "num_hidden_layers", "num_experts_per_tok", family.num_experts_field]
    if switch == "shared_adapter":
        needed.append("shared_adapter_num")
    if switch == "shared_routing_adapter":
        needed += ["shared_routing_adapter_num_experts", "shared_routing_adapter_num_experts_per_tok"]
    for name in needed:
        if not isinstance(fields.get(name), int) or isinstance(fields[name], bool) or fields[name] < 1:
            raise AdapterError(f"{file}: {name} must be a positive integer, got {fields.get(name)!r}")
    args = fields.get(f"{switch}_args")
    known = UNITS[checkpoint.adapter_type][3]
    if not isinstance(args, dict) or set(args) != known:
        raise AdapterError(
            f"{file}: {switch}_args must hold exactly {', '.join(sorted(known))} for {checkpoint.adapter_type}, got {args!r}"
        )
    if args.get("hidden_act", "silu") != "silu":
        raise AdapterError(f"{file}: hidden_act is {args['hidden_act']!r}; only silu is known")


def _check_family(checkpoint: Checkpoint, base_config: PreTrainedConfig) -> None:
    expected = checkpoint.family.base_model_type
    if base_config.model_type != expected:
        raise AdapterError(
            f"the checkpoint was trained on a base of type {expected!r}, but this base is {base_config.model_type!r}"
        )


def _check_base(checkpoint: Checkpoint, base_config: PreTrainedConfig, blocks: list[MoeBlock]) -> None:
    fields = checkpoint.fields
    first = blocks[0]
    pairs: list[tuple[str, object, object]] = [
        ("hidden size (D)", fields["hidden_size"], first.hidden_size),
        ("number of base experts (N)", fields[checkpoint.family.num_experts_field], first.num_experts),
        ("base experts per token (K)", fields["num_experts_per_tok"], first.top_k),
        ("number of layers", fields["num_hidden_layers"], base_config.num_hidden_layers),
    ]
    if "norm_topk_prob" in fields:
        pairs.append(("norm_topk_prob", fields["norm_topk_prob"], first.norm_topk))
    wrong = [
        f"{name} is {theirs} in the checkpoint and {ours} in the base" for name, theirs, ours in pairs if theirs != ours
    ]
    if wrong:
        raise AdapterError(f"the checkpoint is for another base: {'; '.join(wrong)}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pickles = pickled_files(file.parent)
        if pickles:
            raise AdapterError(
                f"{file.parent} has {', '.join(pickles)} but no {SOURCE_WEIGHTS}: a pickle file can run code when it is "
                "read and is never loaded; save the checkpoint again with safe_serialization=True"
            )
        raise AdapterError(f"{file} not found")
    return read_safetensors(file)


def _collect_layers(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], blocks: Mapping[int, MoeBlock]
) -> dict[int, LayerTensors]:
    """The adapter's layers; every tensor is used once, and every layer that appears is complete."""
    downs: dict[int, dict[int, Tensor]] = {}
    ups: dict[int, dict[int, Tensor]] = {}
    gates: dict[int, Tensor] = {}
    _, down_name, up_name, _ = UNITS[checkpoint.adapter_type]
    block = re.escape(checkpoint.family.block)
    layer_pattern = rf"model\.layers\.(?P<layer>\d+)\.{block}\."
    unit_pattern = re.compile(
        layer_pattern + SWITCHES[checkpoint.switch][1] + rf"\.unit\.(?P<matrix>{down_name}|{up_name})\.weight"
    )
    gate_pattern = re.compile(layer_pattern + r"shared_routing_adapter_gate\.weight")
    unplaced = []
    for name, tensor in tensors.items():
        unit, gate = unit_pattern.fullmatch(name), gate_pattern.fullmatch(name)
        if unit is not None:
            side = downs if unit["matrix"] == down_name else ups
            side.setdefault(int(unit["layer"]), {})[int(unit["unit"])] = tensor
        elif gate is not None and checkpoint.variant == "R":
            gates[int(gate["layer"])] = tensor
        else:
            unplaced.append(name)
    if unplaced:
        raise AdapterError(
            f"{len(unplaced)} tensors do not belong to a {checkpoint.switch} of type {checkpoint.adapter_type}: "
            f"{', '.join(sorted(unplaced)[:4])}{', ...' if len(unplaced) > 4 else ''}"
        )
    if not downs:
        raise AdapterError("the checkpoint holds no adapter tensors")
    layers = {}
    for layer in sorted(downs.keys() | ups.keys() | gates.keys()):
        if layer not in blocks:
            raise AdapterError(
                f"the checkpoint has tensors for layer {layer}; the base has MoE blocks in {sorted(blocks)}"
            )
        layers[layer] = _layer_tensors(checkpoint, layer, downs.get(layer, {}), ups.get(layer, {}), gates.get(layer))
    return layers


def _layer_tensors(
    checkpoint: Checkpoint, layer: int, down: dict[int, Tensor], up: dict[int, Tensor], gate_MD: Tensor | None
) -> LayerTensors:
    hidden, rank, num_units = checkpoint.fields["hidden_size"], _rank(checkpoint), checkpoint.num_units
    _, down_name, up_name, _ = UNITS[checkpoint.adapter_type]
    wanted = set(range(num_units))
    for name, units, shape in ((down_name, down, (rank, hidden)), (up_name, up, (hidden, rank))):
        if units.keys() != wanted:
            raise AdapterError(
                f"layer {layer} has {name} of units {_span(units)}, but the config says {num_units} units: "
                f"missing {sorted(wanted - units.keys())[:8]}, left over {sorted(units.keys() - wanted)[:8]}"
            )
        for unit, tensor in units.items():
            _check_tensor(tensor, shape, f"{name} of unit {unit} in layer {layer}")
    if checkpoint.variant == "R":
        if gate_MD is None:
            raise AdapterError(f"layer {layer} has no shared_routing_adapter_gate")
        _check_tensor(gate_MD, (num_units, hidden), f"shared_routing_adapter_gate of layer {layer}")
    return LayerTensors(
        down_MRD=torch.stack([down[unit] for unit in range(num_units)]),
        up_MRD=torch.stack([up[unit].T for unit in range(num_units)]),
        gate_MD=gate_MD,
    )


def _check_tensor(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterError(f"{name} has shape {list(tensor.shape)}, but {list(shape)} is needed")
    if not tensor.is_floating_point():
        raise AdapterError(f"{name} has dtype {tensor.dtype}, not a floating-point one")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} holds NaN or infinity")


def _span(units: Mapping[int, object]) -> str:
    return f"{min(units)}..{max(units)} ({len(units)})" if units else "none"


def _rank(checkpoint: Checkpoint) -> int:
    args = checkpoint.fields[f"{checkpoint.switch}_args"]
    rank = args["r"] if checkpoint.adapter_type == "LoRA" else args["hidden_dim"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"the rank in {checkpoint.switch}_args must be a positive integer, got {rank!r}")
    return rank


def _adapter_config(
    checkpoint: Checkpoint,
    combine: Combine | None,
    base: str,
    layers: Mapping[int, LayerTensors],
    blocks: list[MoeBlock],
) -> PerftConfig:
    args = checkpoint.fields[f"{checkpoint.switch}_args"]
    unit = UNITS[checkpoint.adapter_type][0]
    variant = checkpoint.variant
    options: dict[str, Any] = {
        "variant": variant,
        "unit": unit,
        "r": _rank(checkpoint),
        "alpha": args["lora_alpha"] if unit == "lora" else None,
        "dropout": args["lora_dropout"] if unit == "lora" else args["dropout"],
        "init": "official",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if variant in ("D", "R"):
        options["num_experts"] = checkpoint.num_units
    if variant == "R":
        options["top_k"] = checkpoint.fields["shared_routing_adapter_num_experts_per_tok"]
        options["combine"] = combine or checkpoint.family.combine
        options["router_aux_loss_coef"] = checkpoint.fields.get("shared_routing_adapter_router_aux_loss_coef")
        if options["combine"] == "own":
            options["norm_topk"] = blocks[0].norm_topk
    if set(layers) != {block.layer for block in blocks}:
        options["layers_to_transform"] = sorted(layers)
    try:
        return PerftConfig(**options)
    except PerftError as error:
        raise AdapterError(f"the checkpoint's config.json has no meaning: {error}") from error
