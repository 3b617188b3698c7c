"""How a function of tensors becomes an op of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Op:
    """A function as the `torch.library` op `perft::NAME`, which compilers, graphs and autograd see.

    In inference mode the function is called directly: torch's dispatcher has nothing to do there, and the ten microseconds that
    it takes a call are more than many an op takes at decode.

    Args:
        name: of the op.
        function: does the work; mutates none of its arguments.

    Attributes:
        op: the op itself, for `torch.library.opcheck`.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(f"perft::{name}", function, mutates_args=())
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op."""
        return (self._function if torch.is_inference_mode_enabled() else self.op)(*args, **kwargs)
