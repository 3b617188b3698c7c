"""Imported before all else: without a GPU, Triton's kernels are interpreted, on CPU tensors and in the tests' own process.

Triton asks `TRITON_INTERPRET` when it is imported, and Transformers' models import it.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
