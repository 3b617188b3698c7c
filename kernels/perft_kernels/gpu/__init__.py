"""The GPU kernels: Triton, one file an op, named as the op; imported when a GPU first needs them.

In: tensors on a CUDA device, checked by the op. Out: tensors. `takes` says whether they can run: where Triton is missing, the
ops run their references in plain torch. An op asks `gpu.takes(...)`, so that a test that interprets the kernels on a CPU
(`TRITON_INTERPRET=1`) replaces this one function.

Triton's interpreter is right in float32 and float16; in bfloat16 its products are silently wrong.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Of every launch: a multiplication and an addition are one instruction, whatever the default of the Triton at hand.
OPTIONS = {"enable_fp_fusion": True}


def takes(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can take these tensors: all of them on a CUDA device."""
    return all(t.device.type == "cuda" for t in tensors) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: the GPU runs plain torch, many times slower (pip install triton)")
    return found


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the present device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
