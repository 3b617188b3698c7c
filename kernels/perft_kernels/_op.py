"""How a function of tensors becomes an op of torch."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

# Makes a call (the op, positional and named arguments) and returns its result.
Observer: TypeAlias = "Callable[[Op, tuple[Any, ...], dict[str, Any]], Any]"

_observers = threading.local()


class Op:
    """A function as the `torch.library` op `perft::NAME`, which compilers, graphs and autograd see.

    In inference mode the function is called directly: torch's dispatcher has nothing to do there, and the ten microseconds that
    it takes a call are more than many an op takes at decode. `observed` sees such calls.

    Args:
        name: of the op.
        function: does the work.
        mutates: names of the arguments that it writes to.

    Attributes:
        name: as given.
        op: the op itself, for `torch.library.opcheck`.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self.name = name
        self.op = torch.library.custom_op(f"perft::{name}", function, mutates_args=tuple(mutates))
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd
        self._function = function
        self._mutates = tuple(mutates)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op."""
        if not torch.is_inference_mode_enabled():
            return self.op(*args, **kwargs)
        observer: Observer | None = getattr(_observers, "present", None)
        return self._function(*args, **kwargs) if observer is None else observer(self, args, kwargs)

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Those of a call's arguments that it writes to."""
        arguments = inspect.signature(self._function).bind(*args, **kwargs).arguments
        return [arguments[name] for name in self._mutates]


@contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Lets `observer` make this thread's calls of ops in inference mode. It makes them with nobody observing."""
    before = getattr(_observers, "present", None)
    _observers.present = observer
    try:
        yield
    finally:
        _observers.present = before
