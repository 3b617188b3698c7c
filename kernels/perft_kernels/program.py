"""A sequence of tensor operations, recorded once and replayed without Python: on a CPU what a CUDA graph is on a GPU.

In: a function over tensors that stay where they are (`record`). Out: a `Program`, which does the same to what those tensors
hold whenever it is run, bit for bit. Calls of the CPU kernels, and the small operations that models do between them
(`native/elementwise.c`), become a list that C walks (`native/program.c`); any other operation of torch is called at its place
in the sequence. Intermediate results lie in a `Workspace`, which programs that do not run at the same time share.

A function is refused if it asks for a tensor's values, makes tensors out of numbers of the host, or draws random numbers:
these would be frozen into the program. It knows no model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from perft_kernels.native import ELEMENT_TYPES, Argument, Library

_ALIGNMENT = 64
_DIMS = 4  # as in elementwise.c
_TYPES = {**ELEMENT_TYPES, torch.int64: 2}  # as in elementwise.c
_COPY, _NEGATE, _ADD, _SUBTRACT, _MULTIPLY = range(5)

aten = torch.ops.aten
# What gives memory and no values.
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
_UNARY = {
    aten.neg.default: _NEGATE,
    aten.clone.default: _COPY,
    aten.contiguous.default: _COPY,
    aten._to_copy.default: _COPY,
    aten.to.dtype: _COPY,
}
_BINARY = {
    aten.add.Tensor: _ADD,
    aten.sub.Tensor: _SUBTRACT,
    aten.mul.Tensor: _MULTIPLY,
}
# What depends on more than the tensors' places.
_REFUSED = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default}
_REFUSED_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class RecordingError(Exception):
    """A function that cannot be replayed; the message says why."""


class Workspace:
    """Memory for the intermediate results of programs that never run at the same time; it grows as they need it.

    Attributes:
        buffer: the memory, `[num_bytes]` uint8. Growing makes a new one.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        """Have room for at least so much."""
        if num_bytes > self.buffer.numel():
            self.buffer = torch.empty(num_bytes * 3 // 2, dtype=torch.uint8)


@dataclass(eq=False, slots=True)
class _Scratch:
    """A storage that was made while recording: the steps that use it, and later its place in the workspace."""

    num_bytes: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """An address in a scratch storage."""

    scratch: _Scratch
    num_bytes: int  # from its beginning

    @property
    def offset(self) -> int:
        """In the workspace."""
        return self.scratch.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class _Layout:
    """A tensor in a scratch storage."""

    place: _Place
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self, workspace: Workspace) -> Tensor:
        """The same tensor in the workspace."""
        begin = self.place.offset // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype).set_(workspace.buffer.untyped_storage(), begin, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class _KernelCall:
    """A call of a CPU kernel; places stand for scratch tensors."""

    name: str
    arguments: tuple[Argument | _Place, ...]


@dataclass(frozen=True, slots=True)
class _TorchCall:
    """A call of torch; layouts stand for scratch tensors.

    `results`: where each tensor that it returns is to be; `None`: it is there already, being one of the arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor | _Layout | None]


_Step: TypeAlias = "_KernelCall | _TorchCall"


class _Recorder(TorchDispatchMode):
    """Notes what runs in its context.

    A tensor whose storage was made in here is scratch; every other one is taken to stay where it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.scratches: dict[int, _Scratch] = {}  # by the address that the storage has while recording
        self.kept: list[Tensor] = []  # scratch: no address comes twice; the others: they stay while the program is used

    def kernel_called(self, name: str, arguments: tuple[Argument, ...]) -> None:
        """Notes a call of a CPU kernel."""
        self.steps.append(_KernelCall(name, tuple(self._placed(a) if isinstance(a, Tensor) else a for a in arguments)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSED or (_REFUSED_TAGS & set(func.tags) and not _is_gather(func, args)):
            raise RecordingError(f"{func} depends on more than where its tensors lie")
        result = func(*args, **kwargs)
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = {id(tensor) for tensor in results if _address(tensor) not in inputs}
        for tensor in results:
            if id(tensor) in fresh:
                self._add_scratch(tensor)
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if (fresh or writes) and func not in _EMPTY and not self._as_kernel_calls(func, args, kwargs, result):
            args, kwargs = tree_map(
                lambda leaf: self._laid_out(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
            places = [self._laid_out(tensor) if id(tensor) in fresh else None for tensor in results]
            self.steps.append(_TorchCall(func, args, kwargs, places))
        return result

    def _add_scratch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.scratches:
            now = len(self.steps)
            self.scratches[storage.data_ptr()] = _Scratch(storage.nbytes(), now, now)
            self.kept.append(tensor)

    def _placed(self, tensor: Tensor) -> Tensor | _Place:
        scratch = self.scratches.get(_address(tensor))
        if scratch is None:
            self.kept.append(tensor)
            return tensor
        scratch.last = len(self.steps)
        return _Place(scratch, tensor.data_ptr() - _address(tensor))

    def _laid_out(self, tensor: Tensor) -> Tensor | _Layout:
        place = self._placed(tensor)
        return place if isinstance(place, Tensor) else _Layout(place, tensor.dtype, tensor.size(), tensor.stride())

    def _as_kernel_calls(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> bool:
        """Notes an operation of torch as calls of the elementwise kernel, if it is one."""
        if func in _UNARY:
            return self._elementwise([(_UNARY[func], result, args[0], args[0])])
        if func in _BINARY and len(args) == 2 and not kwargs:
            a, b = args
            if isinstance(b, float) and result.is_floating_point():
                b = torch.tensor([b])
            if all(isinstance(x, Tensor) and x.dim() for x in (a, b)):
                return self._elementwise([(_BINARY[func], result, a, b)])
        if func is aten.embedding.default:
            return self._gather(result, args[0], args[1])
        if func is aten.index.Tensor and args[0].dim() > len(args[1]) - 1:
            # only axes of size 1 before the indexed one: rows of a table
            *before, index = args[1]
            is_table = not any(each is not None for each in before) and all(
                n == 1 for n in args[0].shape[: len(before)]
            )
            return is_table and index is not None and self._gather(result, args[0], index)
        if func is aten.reshape.default:
            return self._elementwise([(_COPY, result.view(args[0].shape), args[0], args[0])])
        if func is aten.copy_.default:
            return self._elementwise([(_COPY, args[0], args[1], args[1])])
        if func is aten.cat.default:
            dim, begin, parts = args[1] if len(args) > 1 else kwargs.get("dim", 0), 0, []
            for tensor in args[0]:
                parts.append((_COPY, result.narrow(dim, begin, tensor.shape[dim]), tensor, tensor))
                begin += tensor.shape[dim]
            return self._elementwise(parts)
        return False

    def _gather(self, out: Tensor, table: Tensor, index: Tensor) -> bool:
        """Notes the copying of rows, if they and their numbers lie in order. Numbers out of range are the caller's bug."""
        is_for_kernel = index.dtype == torch.int64 and all(
            t.is_contiguous() and t.device.type == "cpu" for t in (out, table, index)
        )
        if is_for_kernel and index.numel():
            row_bytes = out.nbytes // index.numel()
            self.kernel_called("perft_gather", (out, table, index, index.numel(), row_bytes))
        return is_for_kernel

    def _elementwise(self, operations: Sequence[tuple[int, Tensor, Tensor, Tensor]]) -> bool:
        """Notes all of these (operation, out, a, b), or none of them if one is not for the kernel."""
        calls = []
        for operation, *tensors in operations:
            dims = _common_dims(tensors) if _are_elements(*tensors) else None
            if dims is None:
                return False
            calls.append((operation, tensors, dims))
        for operation, tensors, dims in calls:
            arguments: list[Argument] = [operation]
            for tensor in tensors:
                arguments += [tensor, _TYPES[tensor.dtype]]
            for column in zip(*dims, strict=True):
                arguments += column
            self.kernel_called("perft_elementwise", tuple(arguments))
        return True


@dataclass(slots=True)
class _Segment:
    """Calls of kernels, one after the other, as C takes them.

    Args:
        words: the arguments of all calls.
        calls: (kernel, where its arguments begin) of each, as addresses.
        places: which words hold an address in the workspace, and which.
    """

    words: Any
    calls: Any
    places: list[tuple[int, _Place]]

    @property
    def num_calls(self) -> int:
        """How many calls."""
        return len(self.calls) // 2


@dataclass(slots=True)
class _BoundCall:
    """A call of torch, with its tensors in the workspace."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor | None]

    def run(self) -> None:
        """Call, and put what comes back in its place."""
        made = self.function(*self.args, **self.kwargs)
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        for place, tensor in zip(self.results, tensors, strict=True):
            if place is not None:
                place.copy_(tensor)


@dataclass(slots=True)
class Program:
    """A recorded function.

    Attributes:
        num_torch_calls: operations that go through Python when it runs; few, if it is to be fast.
    """

    _kernels: Library
    _workspace: Workspace
    _parts: list[_Segment | _TorchCall]
    _result: _Layout
    _kept: list[Tensor]
    _bound: list[_Segment | _BoundCall] = field(default_factory=list)
    _output: Tensor | None = None
    _buffer: Tensor | None = None  # what it is bound to

    @property
    def num_torch_calls(self) -> int:
        """See above."""
        return sum(isinstance(part, _TorchCall) for part in self._parts)

    def run(self) -> Tensor:
        """Do what was recorded; the result is in the workspace and good until another program runs.

        Raises:
            MemoryError: a kernel has found no memory for its intermediate results.
        """
        if self._buffer is not self._workspace.buffer:
            self._bind()
        for part in self._bound:
            if isinstance(part, _BoundCall):
                part.run()
            else:
                self._kernels("perft_run", ctypes.addressof(part.calls), part.num_calls)
        return self.output

    @property
    def output(self) -> Tensor:
        """What the last run has given; recording ends with one."""
        assert self._output is not None
        return self._output

    def _bind(self) -> None:
        """Write the workspace's addresses where places stand."""
        workspace, self._bound = self._workspace, []
        self._buffer = workspace.buffer

        def located(leaf: Any) -> Any:
            return leaf.tensor(workspace) if isinstance(leaf, _Layout) else leaf

        for part in self._parts:
            if isinstance(part, _Segment):
                for word, place in part.places:
                    part.words[word] = workspace.buffer.data_ptr() + place.offset
                self._bound.append(part)
            else:
                args, kwargs, results = tree_map(located, (part.args, part.kwargs, part.results))
                self._bound.append(_BoundCall(part.function, args, kwargs, results))
        self._output = self._result.tensor(workspace)


@torch.inference_mode()
def record(function: Callable[[], Tensor], kernels: Library, workspace: Workspace) -> Program:
    """Run a function once, as it is, and make a program of it. The program is run once too: both must give the same.

    Args:
        function: may write to tensors that were there before only what does not depend on what it finds in its place.
        kernels: the CPU kernels.
        workspace: for the program's intermediate results.

    Raises:
        RecordingError: the function cannot be replayed.
    """
    recorder = _Recorder()
    with kernels.observed(recorder.kernel_called), recorder:
        result = function()
    layout = recorder._laid_out(result)
    if not isinstance(layout, _Layout):
        raise RecordingError("what the function returns was there before")
    workspace.reserve(_assign_offsets(list(recorder.scratches.values())))
    kept = [tensor for tensor in recorder.kept if _address(tensor) not in recorder.scratches]
    program = Program(kernels, workspace, list(_parts(recorder.steps, kernels)), layout, kept)
    if not torch.equal(_bits(program.run()), _bits(result)):
        raise RecordingError("the replay's result is another")
    return program


def _parts(steps: Sequence[_Step], kernels: Library) -> Iterator[_Segment | _TorchCall]:
    """The steps, calls of kernels that follow one another put together."""
    run: list[_KernelCall] = []
    for step in [*steps, None]:
        if isinstance(step, _KernelCall):
            run.append(step)
            continue
        if run:
            yield _segment(run, kernels)
            run = []
        if step is not None:
            yield step


def _segment(calls: Sequence[_KernelCall], kernels: Library) -> _Segment:
    packed = bytearray()
    places: list[tuple[int, _Place]] = []
    begins = []
    for call in calls:
        begins.append(len(packed))
        places += [(len(packed) // 8 + i, a) for i, a in enumerate(call.arguments) if isinstance(a, _Place)]
        packed += kernels.pack(call.name, [None if isinstance(a, _Place) else a for a in call.arguments])
    words = (ctypes.c_uint64 * (len(packed) // 8)).from_buffer(packed)
    table = (ctypes.c_uint64 * (2 * len(calls)))()
    for i, (call, begin) in enumerate(zip(calls, begins, strict=True)):
        table[2 * i] = kernels.addresses[call.name]
        table[2 * i + 1] = ctypes.addressof(words) + begin
    return _Segment(words, table, places)


def _assign_offsets(scratches: list[_Scratch]) -> int:
    """Gives every scratch storage a place where no other lies while it is used; returns the bytes that takes."""
    live: list[_Scratch] = []  # by offset
    end = 0
    for scratch in sorted(scratches, key=lambda s: s.first):
        live = [other for other in live if other.last >= scratch.first]
        offset = index = 0
        while index < len(live) and live[index].offset - offset < scratch.num_bytes:
            offset = -(-(live[index].offset + live[index].num_bytes) // _ALIGNMENT) * _ALIGNMENT
            index += 1
        scratch.offset = offset
        live.insert(index, scratch)
        end = max(end, offset + scratch.num_bytes)
    return end


def _common_dims(tensors: Sequence[Tensor]) -> list[tuple[int, ...]] | None:
    """(size, stride of each tensor) by dimension, outermost first: as few as can be, and 1s up to four.

    The first tensor's shape is everybody's. `None`: there are more.
    """
    shape = tensors[0].shape
    strides = [tensor.expand(shape).stride() for tensor in tensors]
    dims: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1:], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, *steps)
        else:
            dims.append((size, *steps))
    if len(dims) > _DIMS:
        return None
    if len(dims) > 1:  # the outer dimensions are shared out among threads
        dims = [dims[0], *[(1,) + (0,) * len(tensors)] * (_DIMS - len(dims)), *dims[1:]]
    return [(1,) + (0,) * len(tensors)] * (_DIMS - len(dims)) + dims


def _is_gather(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is indexing whose result's shape does not depend on the indices' values."""
    return func is aten.index.Tensor and all(index is None or index.dtype == torch.int64 for index in args[1])


def _bits(tensor: Tensor) -> Tensor:
    """NaNs, too, can be equal."""
    return tensor.contiguous().view(torch.uint8)


def _are_elements(out: Tensor, *inputs: Tensor) -> bool:
    return (
        all(tensor.dtype in _TYPES and tensor.device.type == "cpu" for tensor in (out, *inputs))
        and out.dtype != torch.int64
        and (out.dtype == torch.float32 or inputs[0].dtype != torch.int64)  # torch rounds integers once, we would twice
    )


def _address(tensor: Tensor) -> int:
    """Of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()
