"""A CUDA graph's stand-in on a CPU: captures a step as the list of its operations and repeats them, and nothing else.

What a graph freezes is frozen here too: every number that Python passed, and every tensor by its address. Before a replay all
that the step made is overwritten, so what is not made again, or is read from elsewhere than the step's own memory and
what lay outside of it, shows. What a graph cannot do raises here too: reading a value back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from perft_kernels._op import Op, observed

_READS_BACK = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::_unique2")


class FrozenStep(TorchDispatchMode):
    """One captured step.

    Attributes:
        outside: addresses of the memory that the step reads or writes and has not made itself.
        is_capturing: whether it is being captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._made: dict[int, Tensor] = {}
        self.outside: set[int] = set()
        self.is_capturing = False

    def __enter__(self) -> FrozenStep:
        self.is_capturing = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.is_capturing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _READS_BACK:
            raise RuntimeError(f"{func._schema.name} reads a value back")
        return self._note(func, args, kwargs or {})

    def whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A kernel: one call, whatever it does inside."""
        with _disable_current_modes():
            return self._note(function, args, kwargs)

    def replay(self) -> None:
        """Do it all again."""
        for made in self._made.values():
            made.fill_(float("nan") if made.is_floating_point() else True if made.dtype == torch.bool else 1 << 20)
        for function, args, kwargs, output in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.numel() and address(new) != address(old):
                    old.copy_(new)

    def _note(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.outside |= given - self._made.keys()
        output = function(*args, **kwargs)
        self._calls.append((function, args, kwargs, output))
        # what is not new is a view, or was written in place
        self._made |= {
            address(t): t
            for t in tree_leaves(output)
            if isinstance(t, Tensor) and t.numel() and address(t) not in given
        }
        return output


def address(tensor: Tensor) -> int:
    """Of the tensor's memory, whatever part of it the tensor is."""
    return tensor.untyped_storage().data_ptr()


class FrozenCapture:
    """A `perft_serve.engine.decode_graphs.Capture` that makes `FrozenStep`s, in which each op of ours is one call.

    Attributes:
        steps: what was captured.
    """

    def __init__(self) -> None:
        self.steps: list[FrozenStep] = []

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        frozen = FrozenStep()

        def whole(op: Op, args: Any, kwargs: Any) -> Any:
            with observed(None):
                return frozen.whole(op, args, kwargs)

        with observed(whole), frozen:
            output = step()
        self.steps.append(frozen)
        return frozen.replay, output
