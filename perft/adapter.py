"""An adapter on disk: read and checked, or written. The server, `perft inspect` and `perft import` all come through here.

A folder with `adapter_config.json` (a `PerftConfig`) and `adapter_model.safetensors`, as PEFT's `save_pretrained` writes it.
Tensors, for each adapted MoE block whose experts module is `PATH`:

    base_model.model.PATH.perft_down   [M, R, D]   rank rows that are dotted with the block's input
    base_model.model.PATH.perft_up     [M, R, D]   rank rows that are summed into the block's output
    base_model.model.PATH.perft_gate   [M, D]      the adapter's router (variant R only)

A folder is taken whole or not at all: every tensor is accounted for, its shape and dtype are checked, NaN and infinity are
refused, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from perft.config import PerftConfig
from perft.errors import AdapterError, PerftError, printable
from perft.model import resolve_config
from perft.moe import MoeBlock
from perft.tensor_file import TensorFileError, TensorInfo, read_header, read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_DOWN, _UP, _GATE = "perft_down", "perft_up", "perft_gate"
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.(?P<kind>perft_down|perft_up|perft_gate)$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fields of the configuration that change what the adapter computes: they are part of its identity
_IDENTITY_FIELDS = ("variant", "r", "unit", "alpha", "num_experts", "top_k", "norm_topk", "combine")

_Place: TypeAlias = "tuple[int, str]"  # decoder layer, kind of tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensors:
    """One layer of an adapter: down and up as rank rows `[M, R, D]`, the gate `[M, D]` for variant R."""

    down_MRD: Tensor
    up_MRD: Tensor
    gate_MD: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Its tensors by their names on disk."""
        tensors = {_DOWN: self.down_MRD, _UP: self.up_MRD}
        return tensors if self.gate_MD is None else {**tensors, _GATE: self.gate_MD}


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A checked adapter.

    Args:
        config: its configuration, as it was written.
        layers: its tensors by decoder layer.
        digest: sha256 (hex) over what it computes: the configuration's meaning and every tensor's bytes.
        pieces: all that it holds, down and up of each layer in turn, then all gates: one tensor of which those in `layers` are
            views, or, if they have more than one dtype, each of them.
    """

    config: PerftConfig
    layers: dict[int, LayerTensors]
    digest: str
    pieces: tuple[Tensor, ...]

    @property
    def num_experts(self) -> int:
        """M, the adapter experts of a layer (for variant E: N)."""
        return int(next(iter(self.layers.values())).down_MRD.shape[0])

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(next(iter(self.layers.values())).down_MRD.shape[2])

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(t.numel() for layer in self.layers.values() for t in layer.named().values())

    @property
    def num_bytes(self) -> int:
        """What its tensors weigh on disk."""
        return sum(t.nbytes for layer in self.layers.values() for t in layer.named().values())


def read_fields(path: str | Path) -> dict[str, Any]:
    """What `adapter_config.json` of the adapter in folder `path` holds, of whatever method of PEFT.

    Raises:
        AdapterError: the folder or the file is missing or not an adapter's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"no adapter at {str(path)!r}: the folder does not exist")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(
            f"{str(folder)!r} is not an adapter: it has no {CONFIG_FILE}"
            + (
                " (a checkpoint of the PERFT authors' code? Turn it into an adapter with `perft import`)"
                if (folder / "config.json").is_file()
                else ""
            )
        )
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{file}: peft_type is None, since it is not a mapping of fields")
    return fields


def read_config(path: str | Path) -> PerftConfig:
    """The configuration of the PERFT adapter in folder `path`; reads no tensor.

    Raises:
        AdapterError: the folder or the file is missing or not a PERFT adapter's.
    """
    fields, file = read_fields(path), Path(path) / CONFIG_FILE
    if fields.get("peft_type") != "PERFT":
        raise AdapterError(
            f"{file}: peft_type is {fields.get('peft_type')!r}, not 'PERFT'; only PERFT adapters and LoRAs can be used here"
        )
    known = set(PerftConfig.__dataclass_fields__) - {"target_modules"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise AdapterError(f"{file}: unknown fields {unknown}; was it written by a newer version?")
    try:
        return PerftConfig(**{name: value for name, value in fields.items() if name != "peft_type"})
    except (PerftError, TypeError) as error:
        raise AdapterError(f"{file}: {error}") from error


def read_adapter(path: str | Path, blocks: Sequence[MoeBlock] | None = None) -> Adapter:
    """Read the adapter in folder `path` and check all of it.

    Args:
        path: the adapter's folder.
        blocks: MoE blocks of the base it must fit; without them the layers are told from the tensors' names, and only
            what the adapter says of itself is checked.

    Raises:
        AdapterError: anything about it is missing, left over, misshapen, not finite, or does not fit the base.
    """
    config = read_config(path)
    file = weights_file(path)
    try:
        with file.open("rb", buffering=0) as opened:
            found = read_header(opened)
            keys = _sort_tensors(found, config, blocks)
            flats, tensors = _allocate(found, keys)
            read_tensors(opened, found, {keys[place]: tensor for place, tensor in tensors.items()})
        _check_finite(flats, tensors, keys)
    except (TensorFileError, OSError) as error:
        raise AdapterError(f"{file}: not a whole safetensors file: {error}") from error
    except PerftError as error:
        raise AdapterError(f"{file}: {error}") from error
    layers = {
        layer: LayerTensors(down_MRD=tensor, up_MRD=tensors[layer, _UP], gate_MD=tensors.get((layer, _GATE)))
        for (layer, kind), tensor in tensors.items()
        if kind == _DOWN
    }
    pieces = tuple(flats if len(flats) == 1 else tensors.values())
    return Adapter(
        config=config,
        layers=layers,
        digest=_digest(config, tensors, pieces),
        pieces=pieces,
    )


def weights_file(path: str | Path) -> Path:
    """The file of weights of the adapter in folder `path`.

    Raises:
        AdapterError: there is none.
    """
    file = Path(path) / WEIGHTS_FILE
    if not file.is_file():
        pickles = pickled_files(Path(path))
        reason = (
            f"{', '.join(pickles)}: pickled weights can run code when they are read and are never loaded; save the adapter "
            "again with safe_serialization=True"
            if pickles
            else "the file does not exist"
        )
        raise AdapterError(f"no {WEIGHTS_FILE} in {str(path)!r}: {reason}")
    return file


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name.

    The file is read, not mapped into memory: one that somebody cuts short meanwhile is an error here, not a SIGBUS later.

    Raises:
        AdapterError: it cannot be read, or is not whole.
    """
    try:
        tensors: dict[str, Tensor] = load(file.read_bytes())
        return tensors
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a whole safetensors file: {error}") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity: its extremes tell, in one pass."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def pickled_files(folder: Path) -> list[str]:
    """Files in `folder` that look like pickled weights, to name them where they are refused."""
    return sorted(printable(entry.name) for entry in folder.iterdir() if entry.suffix in _PICKLES)


def write_adapter(
    path: str | Path, config: PerftConfig, layers: Mapping[int, LayerTensors], block_names: Mapping[int, str]
) -> None:
    """Write an adapter folder.

    Args:
        path: the folder; made if need be.
        config: its configuration.
        layers: its tensors by decoder layer.
        block_names: path of each layer's experts module in the base (`MoeBlock.name`).
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{block_names[layer]}.{kind}": tensor.contiguous()
        for layer, rows in layers.items()
        for kind, tensor in rows.named().items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(
        0o644
    )  # safetensors makes it its owner's alone, but a server may run as somebody else
    config.save_pretrained(folder)


def _sort_tensors(
    found: Mapping[str, TensorInfo], config: PerftConfig, blocks: Sequence[MoeBlock] | None
) -> dict[_Place, str]:
    """The names of a file's tensors by their places, in the order of `Adapter.pieces`, every one accounted for."""
    by_path: dict[str, dict[str, str]] = {}
    left_over = []
    for key in found:
        match = _KEY.match(key)
        if match is None:
            left_over.append(key)
        else:
            by_path.setdefault(match["path"], {})[match["kind"]] = key
    if left_over:
        raise AdapterError(f"tensors that do not belong to a PERFT adapter: {_some(left_over)}")
    if not by_path:
        raise AdapterError("it holds no tensors")
    expected = _expected_blocks(
        config, {path: found[keys[_DOWN]].shape if _DOWN in keys else () for path, keys in by_path.items()}, blocks
    )
    missing = [block.name for block in expected if block.name not in by_path]
    extra = sorted(set(by_path) - {block.name for block in expected})
    if missing:
        raise AdapterError(f"tensors are missing for {_some(missing)}")
    if extra:
        raise AdapterError(
            f"tensors for modules that the base does not have, or that are not to be adapted: {_some(extra)}"
        )
    for block in expected:
        _check_layer(config, block, {kind: found[key] for kind, key in by_path[block.name].items()})
    return {
        (block.layer, kind): by_path[block.name][kind]
        for kinds in ((_DOWN, _UP), (_GATE,))
        for block in expected
        for kind in kinds
        if kind in by_path[block.name]
    }


def _expected_blocks(
    config: PerftConfig, down_shapes: Mapping[str, tuple[int, ...]], blocks: Sequence[MoeBlock] | None
) -> list[MoeBlock]:
    """The blocks that must have tensors, in layer order; without a base, the ones that the tensors' paths and shapes imply."""
    if blocks is not None:
        return sorted(resolve_config(config, list(blocks)), key=lambda block: block.layer)
    implied = []
    for path, shape in down_shapes.items():
        numbers = re.findall(r"\.(\d+)\.", f".{path}.")
        if not numbers or len(shape) != 3:
            raise AdapterError(f"cannot tell the layer or the shape of {path!r}")
        num_experts = config.num_experts if config.num_experts is not None else shape[0]
        implied.append(
            MoeBlock(
                layer=int(numbers[0]),
                name=path,
                hidden_size=shape[2],
                num_experts=num_experts,
                top_k=None,
                norm_topk=True,
            )
        )
    if len({block.layer for block in implied}) != len(implied):
        raise AdapterError("it holds tensors of two modules in one layer")
    if len({block.hidden_size for block in implied}) != 1 or len({block.num_experts for block in implied}) != 1:
        raise AdapterError("its layers differ in hidden size or in the number of adapter experts")
    if config.layers_to_transform is not None:
        missing = sorted(set(config.layers_to_transform) - {block.layer for block in implied})
        if missing:
            raise AdapterError(f"tensors are missing for layers {missing}")
    return sorted(implied, key=lambda block: block.layer)


def _check_layer(config: PerftConfig, block: MoeBlock, tensors: Mapping[str, TensorInfo]) -> None:
    num_experts = block.num_experts if config.num_experts is None else config.num_experts
    shapes: dict[str, tuple[int, ...]] = {
        _DOWN: (num_experts, config.r, block.hidden_size),
        _UP: (num_experts, config.r, block.hidden_size),
    }
    if config.variant == "R":
        shapes[_GATE] = (num_experts, block.hidden_size)
    for kind, shape in shapes.items():
        if kind not in tensors:
            raise AdapterError(f"tensor {block.name}.{kind} is missing")
        if tensors[kind].shape != shape:
            raise AdapterError(
                f"tensor {block.name}.{kind} has shape {list(tensors[kind].shape)}, but {list(shape)} is needed"
                + _shape_hint(config)
            )
    for kind, tensor in tensors.items():
        if kind not in shapes:
            raise AdapterError(f"tensor {block.name}.{kind} does not belong to variant {config.variant}")
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"tensor {block.name}.{kind} is {tensor.dtype}; float32, bfloat16 or float16 is needed")


def _allocate(found: Mapping[str, TensorInfo], keys: Mapping[_Place, str]) -> tuple[list[Tensor], dict[_Place, Tensor]]:
    """Memory for the tensors of a file: one piece for each dtype, and the tensors as views of these."""
    infos = {place: found[key] for place, key in keys.items()}
    flats: list[Tensor] = []
    tensors: dict[_Place, Tensor] = {}
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
        for dtype in dict.fromkeys(info.dtype for info in infos.values()):
            shapes = {place: info.shape for place, info in infos.items() if info.dtype == dtype}
            sizes = [math.prod(shape) for shape in shapes.values()]
            flats.append(torch.empty(sum(sizes), dtype=dtype))
            pieces = zip(shapes.items(), flats[-1].split(sizes), strict=True)
            tensors |= {place: piece.view(shape) for (place, shape), piece in pieces}
    return flats, {place: tensors[place] for place in infos}


def _check_finite(flats: Sequence[Tensor], tensors: Mapping[_Place, Tensor], keys: Mapping[_Place, str]) -> None:
    """One look at all of it, and only if that finds something, at each."""
    if not all(is_finite(flat) for flat in flats):
        bad = next(place for place, tensor in tensors.items() if not is_finite(tensor))
        raise AdapterError(f"tensor {keys[bad].removeprefix(_PREFIX)} holds NaN or infinity")


def _shape_hint(config: PerftConfig) -> str:
    first = "N base experts" if config.variant == "E" else "M adapter experts"
    return f" ({first}, r={config.r}, hidden size of the base): is the adapter for another base?"


def _digest(config: PerftConfig, tensors: Mapping[_Place, Tensor], pieces: Sequence[Tensor]) -> str:
    identity = {name: getattr(config, name) for name in _IDENTITY_FIELDS}  # as written, whatever the base makes of it
    form = [[layer, kind, str(tensor.dtype), list(tensor.shape)] for (layer, kind), tensor in tensors.items()]
    digest = hashlib.sha256(json.dumps([identity, form], sort_keys=True).encode())
    for piece in pieces:
        digest.update(piece.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: Sequence[str], at_most: int = 3) -> str:
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
