"""Tensor operations, counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Every operation that reaches the dispatcher, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


_WRITE_ONLY = ("copy_", "zero_", "fill_")  # what they write to they do not read
_MAKE_ROOM = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Traffic(TorchDispatchMode):
    """Bytes that torch's own operations read and write, each tensor once an operation; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function.namespace == "aten" and not function.is_view:
            self.nbytes += sum(_moved(function, args, kwargs, output))
        return output


def _moved(function: Any, args: Any, kwargs: Any, output: Any) -> Iterator[int]:
    """Bytes of every tensor an operation reads, and of every one it writes."""
    name, schema = function.overloadpacket.__name__, function._schema
    if name in _MAKE_ROOM:
        return
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    for argument in schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or not (argument.is_out or name in _WRITE_ONLY)
        yield (read + written) * _nbytes(given.get(argument.name))
    made = output if len(schema.returns) != 1 else (output,)
    for kind, value in zip(schema.returns, made or (), strict=False):
        if kind.alias_info is None:
            yield _nbytes(value)


def _nbytes(value: Any) -> int:
    """Bytes of a tensor's memory, or of several tensors'; what is broadcast counts once."""
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    if not isinstance(value, Tensor):
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    return value.element_size() * math.prod(size for size, stride in sizes if stride)
