"""Reading safetensors in place: what the library reads is what we read, and what it refuses, or what is no file, we refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from perft.tensor_file import TensorFileError, TensorInfo, read_header, read_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a": torch.tensor(1.5),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "odd": torch.tensor([True, False, True]),
    "c": torch.arange(4, dtype=torch.int64),
}
WHOLE = save(TENSORS, metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


def read(folder: Path, data: bytes) -> dict[str, Tensor]:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        infos = read_header(file)
        targets = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
        read_tensors(file, infos, targets)
    return targets


def with_header(**changes: object) -> bytes:
    header = json.loads(WHOLE[8:HEADER_END])
    header = {name: entry for name, entry in {**header, **changes}.items() if entry is not None}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + WHOLE[HEADER_END:]


def test_what_the_library_wrote(tmp_path: Path) -> None:
    found = read(tmp_path, WHOLE)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {"b": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 12]}},  # more than its bytes
        {"b": {"dtype": "BF16", "shape": [-2, -3], "data_offsets": [0, 12]}},
        {"b": {"dtype": "BF16", "shape": [2, True], "data_offsets": [0, 4]}},
        {"b": {"dtype": "XX", "shape": [2, 3], "data_offsets": [0, 12]}},
        {"b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12], "more": 1}},
        {"b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0]}},
        {"b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [12, 0]}},
        {"b": {"dtype": ["BF16"], "shape": [2, 3], "data_offsets": [0, 12]}},
        {"b": [1, 2]},
        {"b": None},  # a hole
        {"d": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},  # two in one place
    ],
)
def test_a_header_that_lies(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TensorFileError):
        read(tmp_path, with_header(**changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        WHOLE[:-1],
        WHOLE + b"x",
        (1 << 62).to_bytes(8, "little") + WHOLE[8:],
        (5).to_bytes(8, "little") + b"[1,2]",
        (6).to_bytes(8, "little") + b"\xff{}   ",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,  # deeper than any parser goes
    ],
)
def test_no_whole_file(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(TensorFileError):
        read(tmp_path, data)


def test_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    with path.open("rb+", buffering=0) as file:
        infos = read_header(file)
        file.truncate(len(WHOLE) - 40)
        with pytest.raises(TensorFileError, match="cut short"):
            read_tensors(file, infos, {name: torch.empty(i.shape, dtype=i.dtype) for name, i in infos.items()})


def test_only_some_tensors_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    with path.open("rb", buffering=0) as file:
        infos = read_header(file)
        target = torch.full((2, 3), torch.nan, dtype=torch.bfloat16)
        read_tensors(file, infos, {"b": target})
    assert torch.equal(target, TENSORS["b"])


def test_sizes() -> None:
    assert TensorInfo(dtype=torch.bfloat16, shape=(2, 3), start=0).num_bytes == 12


@settings(max_examples=300, deadline=None)
@given(st.integers(0, HEADER_END - 1), st.integers(0, 255))
def test_whatever_byte_of_the_header_changes(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    """We accept nothing that the library refuses, and read what it reads."""
    data = bytearray(WHOLE)
    data[place] = value
    try:
        expected = load(bytes(data))
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError):
        expected = None
    try:
        found = read(tmp_path_factory.getbasetemp(), bytes(data))
    except TensorFileError:
        return
    assert expected is not None
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
