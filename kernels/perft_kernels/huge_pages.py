"""Host memory in huge pages, for what every step reads from one end to the other: a tenth more bandwidth than in small ones.

In: shapes. Out: uninitialised tensors. Where the system has no transparent huge pages, or not for this process, the tensors
lie in small pages; nothing else changes. Memory that nobody has touched costs nothing, in steps of 2 MiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_BLOCK = 32 * _HUGE_PAGE
_ALIGNMENT = 64


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in a block of its own; on another device than the CPU as torch makes it."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = torch.Size(shape)
    return _block(size.numel() * dtype.itemsize).view(dtype).view(size)


class HugePages:
    """Gives out tensors that lie side by side in a few large blocks; a block lives as long as one of its tensors."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, contiguous, aligned to a line of the cache."""
        size = torch.Size(shape)
        num_bytes = size.numel() * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(size, dtype=dtype)
        if self._block.numel() - self._used < num_bytes:
            self._block, self._used = _block(max(num_bytes, _BLOCK)), 0
        begin = self._used
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._block[begin : begin + num_bytes].view(dtype).view(size)


def _block(num_bytes: int) -> Tensor:
    """Memory that begins at a huge page, `[num_bytes]` uint8."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -block.data_ptr() % _HUGE_PAGE
    return block[begin : begin + num_bytes]
