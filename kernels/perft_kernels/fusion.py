"""A step's operations, recorded, and neighbours that one kernel can do put together: what a captured decode step is made of.

In: a function over tensors that stay where they are (`fuse`). Out: a function that does the same to what they hold, in fewer
launches. At decode a GPU spends as long on starting small kernels as on reading weights, and what stands on either side of a
border between a model's modules no module can put together. It knows no model: it looks at operations of torch and of this
package and at what becomes of their results.

    | these                                                               | become            |
    |---------------------------------------------------------------------|-------------------|
    | a sum, and `rms_norm` of it                                         | `add_rms_norm`    |
    | linear layers of one input, whose weights lie one behind the other  | one linear layer  |
    | SiLU, and a product with it                                         | `silu_mul`        |
    | rotary embeddings of queries and keys, `rms_norm` before them, if   | `rotary_kv_write` |
    | there is one, and `kv_write` before `paged_attention`               |                   |

What is written to in place is left alone, and so is whatever looks otherwise. Operations whose results nobody wants are left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from perft_kernels._op import Op, observed
from perft_kernels.linear import stored_linear
from perft_kernels.paged_attention import kv_write, paged_attention
from perft_kernels.rms_norm import add_rms_norm, rms_norm
from perft_kernels.rotary import rotary_kv_write
from perft_kernels.silu_mul import silu_mul

aten = torch.ops.aten
_LINEARS = (aten.linear.default, stored_linear)
_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)


@dataclass(eq=False, slots=True)
class _Value:
    """A tensor that the step makes.

    Args:
        memory: stands for the memory that it lies in, and is the same for all tensors there; `None`: it is the first one.
    """

    shape: torch.Size
    dtype: torch.dtype
    memory: _Value | None = None


_Function: TypeAlias = "Callable[..., Any]"


@dataclass(eq=False, slots=True)
class _Call:
    """An operation: values stand for what the step makes; tensors among the arguments stay where they are.

    Args:
        writes: whether it writes to memory that was there before.
        launches: whether it does any work: a view does none.
    """

    function: _Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    results: list[_Value] = field(default_factory=list)
    writes: bool = False
    launches: bool = True

    def inputs(self) -> list[_Value]:
        """The values among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, _Value)]


class _Recorder(TorchDispatchMode):
    """Notes what runs in its context. It keeps no tensor that the step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.written: set[_Value] = set()  # memory that is written to after it was made
        self._values = WeakTensorKeyDictionary()
        self._outside: dict[int, _Value] = {}  # memory that was there before, by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        arguments = func._schema.arguments
        named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self._note(func, args, kwargs, result, written)
        return result

    def op(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notes a call of an op of this package as one operation."""
        with _disable_current_modes(), observed(None):
            result = op(*args, **kwargs)
        self._note(op, args, kwargs, result, op.written(args, kwargs))
        return result

    def value(self, leaf: Any) -> Any:
        """The value of a tensor that the step has made; anything else as it is."""
        return self._values.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf

    def _note(self, function: _Function, args: Any, kwargs: Any, result: Any, written: list[Any]) -> None:
        given = _tensors((args, kwargs))
        call = _Call(function, *tree_map(self.value, (args, kwargs)))
        addresses = {_address(tensor): tensor for tensor in given}
        made = _tensors(result)
        for tensor in made:
            if tensor not in self._values:
                shared = addresses.get(_address(tensor)) if tensor.numel() else None
                memory = None if shared is None else self._memory(shared)
                self._values[tensor] = _Value(tensor.shape, tensor.dtype, memory)
            call.results.append(self._values[tensor])
        targets = _tensors(written)
        call.writes = bool(targets)
        call.launches = call.writes or not made or any(_address(tensor) not in addresses for tensor in made)
        self.written.update(map(self._memory, targets))
        self.calls.append(call)

    def _memory(self, tensor: Tensor) -> _Value:
        """What stands for a tensor's memory."""
        value = self._values.get(tensor)
        if value is None:
            value = self._outside.setdefault(_address(tensor), _Value(tensor.shape, tensor.dtype))
        return value.memory or value


class FusedStep:
    """Operations that are done one after the other."""

    def __init__(self, calls: Sequence[_Call], result: Any) -> None:
        self._calls = calls
        self._result = result
        last_use = {value: i for i, call in enumerate(calls) for value in (*call.results, *call.inputs())}
        kept = {leaf for leaf in tree_leaves(result) if isinstance(leaf, _Value)}
        self._done: list[list[_Value]] = [[] for _ in calls]  # what nobody wants after each call
        for value, i in last_use.items():
            if value not in kept:
                self._done[i].append(value)

    @property
    def names(self) -> list[str]:
        """Of the operations that are no mere views, in their order."""
        return [_name(call.function) for call in self._calls if call.launches]

    def __call__(self) -> Any:
        """Do them."""
        tensors: dict[_Value, Tensor] = {}

        def tensor(leaf: Any) -> Any:
            return tensors[leaf] if isinstance(leaf, _Value) else leaf

        for call, done in zip(self._calls, self._done, strict=True):
            args, kwargs = tree_map(tensor, (call.args, call.kwargs))
            result = call.function(*args, **kwargs)
            tensors.update(zip(call.results, (t for t in tree_leaves(result) if isinstance(t, Tensor)), strict=True))
            for value in done:
                del tensors[value]
        return tree_map(tensor, self._result)


@torch.inference_mode()
def fuse(step: Callable[[], Any]) -> FusedStep:
    """Run a step once, as it is, and put its operations together.

    Args:
        step: returns tensors; does the same whenever it is called, and reads no value back.
    """
    recorder = _Recorder()
    with observed(recorder.op), recorder:
        result = step()
    graph = _Graph(recorder.calls, recorder.written, tree_map(recorder.value, result))
    del result
    graph.share_views()
    graph.join_linears()
    graph.rotate_and_write()
    graph.add_and_normalize()
    graph.activate_and_multiply()
    graph.drop_unused()
    return FusedStep(graph.calls, graph.result)


class _Graph:
    """The calls of a step, and what is made where."""

    def __init__(self, calls: list[_Call], written: set[_Value], result: Any) -> None:
        self.calls = calls
        self.result = result
        self._written = written
        self._maker = {value: call for call in calls for value in call.results}

    def share_views(self) -> None:
        """Views that are taken twice alike are one."""
        seen: dict[Any, _Value] = {}
        same: dict[_Value, _Value] = {}
        for call in self.calls:
            call.args, call.kwargs = _with(same, (call.args, call.kwargs))
            if call.function in _VIEWS and isinstance(call.args[0], _Value) and not call.kwargs:
                key = (call.function, call.args[0], *map(str, call.args[1:]))
                same[call.results[0]] = seen.setdefault(key, call.results[0])
        self.result = _with(same, self.result)

    def join_linears(self) -> None:
        """Linear layers of one input whose weights lie one behind the other, and their biases, become one."""
        groups: list[list[_Call]] = []
        for call in self.calls:
            if call.function not in _LINEARS or not all(map(self._is_untouched, (call.args[0], *call.results))):
                continue
            found = next((group for group in groups if _joined_linears([*group, call]) is not None), None)
            if found is None:
                groups.append([call])
            else:
                found.append(call)
        for group in groups:
            if len(group) > 1:
                args = _joined_linears(group)
                assert args is not None
                joined = _Call(_linears, args, results=[call.results[0] for call in group])
                self._put(joined, group[0], group)

    def rotate_and_write(self) -> None:
        """What stands between projections and attention becomes one."""
        attention = [call for call in self.calls if call.function is paged_attention]
        for write in [call for call in self.calls if call.function is kv_write]:
            k, v, k_pages, v_pages, slot_T = write.args
            of_these = [call for call in attention if call.args[1] is k_pages and call.args[2] is v_pages]
            if len(of_these) != 1 or isinstance(slot_T, _Value) or not isinstance(v, _Value):
                continue
            attend = of_these[0]
            q_found, k_found = self._rotation(attend.args[0]), self._rotation(k)
            if q_found is None or k_found is None or (q_found.cos, q_found.sin) != (k_found.cos, k_found.sin):
                continue
            needed = [
                value for value in (q_found.x, k_found.x, q_found.cos, q_found.sin, v) if isinstance(value, _Value)
            ]
            before = {value for call in self.calls[: self.calls.index(write)] for value in call.results}
            if not all(value in before and self._is_untouched(value) for value in needed):
                continue
            out = _Value(attend.args[0].shape, attend.args[0].dtype)
            fused = _Call(
                _rotate_and_write,
                (q_found.x, k_found.x, v, q_found.cos, q_found.sin, q_found.norm, k_found.norm, *write.args[2:]),
                results=[out],
                writes=True,
            )
            self._put(fused, write, [write])
            attend.args = (out, *attend.args[1:])

    def add_and_normalize(self) -> None:
        """A sum and its norm become one."""
        for norm in [call for call in self.calls if call.function is rms_norm]:
            terms = self._arguments(norm.args[0], aten.add.Tensor)
            if terms is None:
                continue
            (a, b), add = terms, self._maker[norm.args[0]]
            if _are_alike(a, b) and self._is_untouched(add.results[0]):
                fused = _Call(add_rms_norm, (a, b, *norm.args[1:]), results=[add.results[0], norm.results[0]])
                self._put(fused, add, [add, norm])

    def activate_and_multiply(self) -> None:
        """A SiLU and a product with it become one."""
        for product in [call for call in self.calls if call.function is aten.mul.Tensor]:
            silu, up = self._arguments(product.results[0], aten.mul.Tensor) or (None, None)
            gate = self._argument(silu, aten.silu.default)
            if _are_alike(gate, up) and all(map(self._is_untouched, (gate, silu, up))):
                self._put(_Call(silu_mul, (gate, up), results=product.results), product, [product])

    def drop_unused(self) -> None:
        """Leave out what is neither wanted nor written to what was there before."""
        wanted = {leaf for leaf in tree_leaves(self.result) if isinstance(leaf, _Value)}
        kept = []
        for call in reversed(self.calls):
            reads_back = not call.results  # what came of it is no tensor: the caller may have gone by it
            if call.writes or reads_back or wanted.intersection(call.results):
                wanted.update(call.inputs())
                kept.append(call)
        self.calls = kept[::-1]

    def _rotation(self, value: Any) -> _Rotation | None:
        """How `[T, X, C]` comes from a rotary embedding, as Transformers' models write it."""
        heads_first = self._argument(value, aten.transpose.int, 0, 1)
        rotated = self._argument(heads_first, aten.select.int, 0, 0)
        found = self._whole_rotation(rotated) or self._halved_rotation(rotated)
        if found is None:
            return None
        x, cos, sin = found
        cos, sin = (self._argument(table, aten.unsqueeze.default, 1) for table in (cos, sin))
        return None if cos is None or sin is None else _Rotation(*self._normalized(x), cos, sin)

    def _whole_rotation(self, value: Any) -> tuple[_Value, Any, Any] | None:
        """(x, cos, sin) of x * cos + (-x2, x1) * sin."""
        parts = self._arguments(value, aten.add.Tensor)
        straight, across = (self._arguments(part, aten.mul.Tensor) for part in parts or (None, None))
        if straight is None or across is None or not self._is_turned(across[0], straight[0]):
            return None
        return straight[0], straight[1], across[1]

    def _halved_rotation(self, value: Any) -> tuple[_Value, Any, Any] | None:
        """(x, cos, sin) of (x1 * cos - x2 * sin, x2 * cos + x1 * sin)."""
        halves = self._concatenated(value)
        if halves is None:
            return None
        first, second = self._arguments(halves[0], aten.sub.Tensor), self._arguments(halves[1], aten.add.Tensor)
        products = [self._arguments(part, aten.mul.Tensor) for part in (*(first or ()), *(second or ()))]
        if len(products) < 4 or None in products:
            return None
        (x1, cos), (x2, sin) = products[:2]  # type: ignore[misc]
        chunk = self._made_by(x1, aten.chunk.default)
        if chunk is None or chunk.results != [x1, x2]:
            return None
        x = chunk.args[0]
        is_it = products[2:] == [(x2, cos), (x1, sin)] and chunk.args[1:] in ((2, -1), (2, len(x.shape) - 1))
        return (x, cos, sin) if is_it else None

    def _is_turned(self, value: Any, x: Any) -> bool:
        """Whether a value is (-x2, x1), of the halves x1, x2 of the last axis."""
        halves = self._concatenated(value)
        if halves is None or not isinstance(x, _Value):
            return False
        second, first, width = self._argument(halves[0], aten.neg.default), halves[1], x.shape[-1]
        return self._is_slice(first, x, 0, width // 2) and self._is_slice(second, x, width // 2, width)

    def _concatenated(self, value: Any) -> Sequence[Any] | None:
        """The two halves that a value was put together from, along its last axis."""
        cat = self._made_by(value, aten.cat.default)
        if cat is None or len(cat.args[0]) != 2:
            return None
        halves: Sequence[Any] = cat.args[0]
        return halves if cat.args[1:] in ((-1,), (len(value.shape) - 1,)) else None

    def _is_slice(self, value: Any, x: _Value, begin: int, end: int) -> bool:
        call = self._made_by(value, aten.slice.Tensor)
        if call is None or call.args[0] is not x:
            return False
        dim, *bounds = call.args[1:]
        last = len(x.shape) - 1
        found = (bounds[0] or 0, min(bounds[1], x.shape[-1]) if len(bounds) > 1 else x.shape[-1])
        return dim in (-1, last) and found == (begin, end)

    def _normalized(self, x: _Value) -> tuple[_Value, tuple[Tensor, float] | None]:
        """What `[1, X, T, C]` comes from (that, `[1, T, X, C]` or `[1, T, X C]`), and the norm in between."""
        tokens_first = self._argument(x, aten.transpose.int, 1, 2)
        if tokens_first is None:
            return x, None
        norm = self._maker.get(tokens_first)
        if norm is not None and norm.function in (aten.view.default, aten.reshape.default):
            norm = self._maker.get(norm.args[0])
        if norm is None or norm.function is not rms_norm or not isinstance(norm.args[0], _Value):
            return x, None
        source, weight, epsilon = norm.args
        num_heads, width = x.shape[1], x.shape[3]
        is_row = source.shape == (*x.shape[:1], x.shape[2], num_heads * width)
        is_head = source.shape == tokens_first.shape
        fits = isinstance(weight, Tensor) and weight.shape[0] == source.shape[-1] and (is_row or is_head)
        return (source, (weight, epsilon)) if fits else (x, None)

    def _argument(self, value: Any, function: _Function, *rest: Any) -> Any:
        """What a value was made of by `function(it, *rest)`; `None` if it was not."""
        call = self._made_by(value, function)
        return None if call is None or call.args[1:] != rest else call.args[0]

    def _arguments(self, value: Any, function: _Function) -> tuple[Any, Any] | None:
        """The two values that a value was made of by `function(one, other)`; `None` if it was not."""
        call = self._made_by(value, function)
        return None if call is None or len(call.args) != 2 else (call.args[0], call.args[1])

    def _made_by(self, value: Any, function: _Function) -> _Call | None:
        """The call of `function`, without named arguments, that a value comes from; `None` if it comes from elsewhere."""
        call = self._maker.get(value) if isinstance(value, _Value) else None
        return call if call is not None and call.function is function and not call.kwargs else None

    def _is_untouched(self, value: Any) -> bool:
        """Whether it is a value whose memory is never written to after it was made."""
        return isinstance(value, _Value) and (value.memory or value) not in self._written

    def _put(self, call: _Call, where: _Call, instead_of: Sequence[_Call]) -> None:
        """Put a call where another is, instead of some."""
        self.calls[self.calls.index(where)] = call
        self.calls = [other for other in self.calls if other not in instead_of]
        self._maker |= dict.fromkeys(call.results, call)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """A rotary embedding of the heads of `x` after a norm (weight, epsilon), if there is one; cos and sin `[1, T, C]`, or
    `[1, T, C / 2]`.
    """

    x: _Value
    norm: tuple[Tensor, float] | None
    cos: Any
    sin: Any


def _are_alike(a: Any, b: Any) -> bool:
    """Whether both are values, of one shape and dtype."""
    return isinstance(a, _Value) and isinstance(b, _Value) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _joined_linears(calls: Sequence[_Call]) -> tuple[Any, ...] | None:
    """The arguments of `_linears` that does the same as all of these; `None` if there are none."""
    function, x = calls[0].function, calls[0].args[0]
    if any((call.function, call.args[0]) != (function, x) for call in calls):
        return None
    weights = [call.args[1] for call in calls]
    biases = [call.args[2] if len(call.args) > 2 else None for call in calls]
    weight, bias = _joined(weights), _joined(biases)
    has_bias = any(bias is not None for bias in biases)
    if weight is None or (has_bias and bias is None):
        return None
    return function, x, weight, bias, [w.shape[0] for w in weights]


def _linears(
    function: _Function, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]
) -> tuple[Tensor, ...]:
    """Linear layers that lie one behind the other."""
    return tuple(function(x, weight, bias).split(sizes, dim=-1))


def _rotate_and_write(
    q: Tensor,
    k: Tensor,
    v_TGC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: tuple[Tensor, float] | None,
    k_norm: tuple[Tensor, float] | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_T: Tensor,
) -> Tensor:
    """`rotary_kv_write` of what was found."""
    width = k_pages.shape[-1]
    q_THC, k_TGC = (_heads(x, width, norm is not None) for x, norm in ((q, q_norm), (k, k_norm)))
    (q_weight, q_epsilon), (k_weight, k_epsilon) = q_norm or (None, 0.0), k_norm or (None, 0.0)
    found: Tensor = rotary_kv_write(
        *(q_THC, k_TGC, v_TGC, cos[0], sin[0], q_weight, k_weight, q_epsilon, k_epsilon, k_pages, v_pages, slot_T)
    )
    return found


def _heads(x: Tensor, width: int, tokens_first: bool) -> Tensor:
    """`[T, X, C]` of `[1, T, X C]` or `[1, T, X, C]`, or else of `[1, X, T, C]`."""
    return x[0].unflatten(-1, (-1, width)) if x.dim() == 3 else x[0] if tokens_first else x[0].transpose(0, 1)


def _joined(tensors: Sequence[Any]) -> Tensor | None:
    """One tensor of tensors that lie one behind the other, along their first axis; `None` if they do not."""
    if not all(isinstance(tensor, Tensor) and tensor.is_contiguous() for tensor in tensors):
        return None
    first = tensors[0]
    end = first.data_ptr()
    for tensor in tensors:
        same_kind = (tensor.dtype, tensor.shape[1:], _address(tensor)) == (
            first.dtype,
            first.shape[1:],
            _address(first),
        )
        if not same_kind or tensor.data_ptr() != end:
            return None
        end += tensor.nbytes
    size = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    joined: Tensor = first.as_strided(size, first.stride(), first.storage_offset())
    return joined


def _with(same: dict[_Value, _Value], tree: Any) -> Any:
    """Other values in the place of some."""
    return tree_map(lambda leaf: same.get(leaf, leaf) if isinstance(leaf, _Value) else leaf, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    """Of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _name(function: _Function) -> str:
    """As a reader knows it."""
    if isinstance(function, Op):
        return function.name
    schema = getattr(function, "_schema", None)
    return function.__name__.lstrip("_") if schema is None else str(schema.name)
