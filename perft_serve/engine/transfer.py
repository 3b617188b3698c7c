"""Numbers of the host on their way to the device. In: Python numbers. Out: a tensor there."""

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
