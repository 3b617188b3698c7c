"""A safetensors file, read so that every tensor lands where it is wanted, in one copy.

In: an open file. Out: what tensors it says it holds, then their bytes. `safetensors` itself copies each tensor, or maps the
file into memory, where a file that somebody cuts short is a SIGBUS; a server that reads adapters beside running requests can
afford neither. The format: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the bytes of
the tensors one after the other, without holes. Knows no adapter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_LENGTH_BYTES = 8
# As `safetensors` has it; the header of an adapter with ten thousand tensors is a megabyte.
_MAX_HEADER_BYTES = 100_000_000


class TensorFileError(ValueError):
    """A file is not a whole safetensors file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What a file says of one tensor; `start` is where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> dict[str, TensorInfo]:
    """The tensors of a file, by name. That its size is what they take, is checked.

    Raises:
        TensorFileError: it is not a whole safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise TensorFileError("it is shorter than its header")
    try:
        fields = json.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"its header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TensorFileError("its header is not a JSON object")
    fields.pop("__metadata__", None)
    first = _LENGTH_BYTES + length
    found = [(*_described(name, entry), name) for name, entry in fields.items()]
    end = 0
    tensors = {}
    for start, stop, dtype, shape, name in sorted(found, key=lambda each: each[:2]):
        if start != end:
            raise TensorFileError(f"tensor {name!r} does not begin where the one before it ends")
        end = stop
        tensors[name] = TensorInfo(dtype=dtype, shape=shape, start=first + start)
    if first + end != size:
        raise TensorFileError(f"it has {size:,} bytes, but its tensors need {first + end:,}")
    return tensors


def read_tensors(file: BinaryIO, tensors: Mapping[str, TensorInfo], targets: Mapping[str, Tensor]) -> None:
    """Read tensors of a file into tensors that are there already: contiguous, on the CPU, of the same dtype and shape.

    Raises:
        TensorFileError: the file was cut short meanwhile.
    """
    for name in sorted(targets, key=lambda name: tensors[name].start):
        info, target = tensors[name], targets[name]
        assert target.dtype == info.dtype
        assert tuple(target.shape) == info.shape
        assert target.is_contiguous()
        file.seek(info.start)
        left = target.view(-1).view(torch.uint8).numpy().data
        while left:
            num_read = file.readinto(left)  # type: ignore[attr-defined]
            if not num_read:
                raise TensorFileError("it was cut short while it was read")
            left = left[num_read:]


def _described(name: str, entry: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """(start, stop, dtype, shape) of a tensor, offsets as they stand in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"its header describes tensor {name!r} in a way that is not the format's")
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise TensorFileError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise TensorFileError(f"tensor {name!r} has no shape or no place that makes sense")
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise TensorFileError(f"tensor {name!r} does not have as many bytes as its shape needs")
    return start, stop, dtype, tuple(shape)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
