"""Between host and device without waiting. In: Python numbers, or a device's tensor. Out: a tensor on the other side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, `[N]`, without waiting for what the device has still to do.

    `torch.tensor(values, device=...)` waits: it copies from memory that is not pinned, and returns when the copy is over, which
    is behind everything that was launched before. The copy here is staged by the driver.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in (pinned) host memory, where it is once what was launched on the device so far is done."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
