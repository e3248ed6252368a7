"""Whether hundreds of things are as they were, asked before every skipped step.

Hardly any of them is in a cache of the processor by then, and a loop of Python waits for one after the other;
the extension has loops that wait for many at a time. Where it is not built, or torch's library has not the
functions that they call, Python's loops say the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hicache_kernels import compat

try:
    _native: Any = importlib.import_module("hicache_kernels._native")
except ImportError:
    _native = None


class TensorStates:
    """Where the numbers of some tensors are, and how often each was written to.

    Of tensors made in inference mode nobody counts the writes.

    Args:
        tensors: held as long as this is.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # those that are counted come first
        self._tensors = sorted(tensors, key=Tensor.is_inference)
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._addresses = _addresses(self._tensors)
        self._writes = compat.write_counts(self._counted)
        self._loop = _loop(self._tensors, self._addresses, self._writes)

    @property
    def compiled(self) -> bool:
        """Whether the extension's loop looks at them."""
        return self._loop is not None

    def unchanged(self) -> bool:
        """Whether they are where they were, and nobody has written to them."""
        if self._loop is not None:
            return self._loop.unchanged()
        return (
            _addresses(self._tensors) == self._addresses
            and compat.write_counts(self._counted) == self._writes
        )


class _Loop:
    """The same, by the extension.

    Args:
        functions: of torch's library, :func:`~hicache_kernels.compat.state_functions`.
        tensors: those that are counted first.
        addresses: of all.
        writes: to those that are counted.
    """

    def __init__(
        self,
        functions: tuple[int, int],
        tensors: Sequence[Tensor],
        addresses: Sequence[int],
        writes: Sequence[int],
    ) -> None:
        self._handles = compat.tensor_handles(tensors)
        # the loop has their addresses
        self._arrays = [array("Q", numbers) for numbers in (compat.places(self._handles), addresses, writes)]
        known, places, counts = (numbers.buffer_info()[0] for numbers in self._arrays)
        sizes = len(tensors), len(writes)
        self.unchanged: Callable[[], bool] = functools.partial(
            _native.tensors_unchanged, known, sizes[0], places, sizes[1], counts, *functions
        )

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, TypeError):  # as Python ends
            compat.given_back(self._handles)


def _loop(tensors: Sequence[Tensor], addresses: Sequence[int], writes: Sequence[int]) -> _Loop | None:
    """None where it cannot be had, or does not say what Python says."""
    functions = None if _native is None else compat.state_functions()
    # tensors that anything but Python refers to cannot be exchanged, as Module.to() then does
    if functions is None or torch.__future__.get_swap_module_params_on_conversion():
        return None
    try:
        found = _Loop(functions, tensors, addresses, writes)
        return found if found.unchanged() else None
    except Exception:  # whatever other versions of torch make of private names: Python can look
        return None


class Values:
    """The values that some dictionaries have, to be compared with those they have later.

    Args:
        dicts: the dictionaries; held, as the values are.
    """

    def __init__(self, dicts: Sequence[dict[str, Any]]) -> None:
        self._dicts = list(dicts)
        self._sizes = list(map(len, self._dicts))
        self._values = self._now()

    def unchanged(self) -> bool:
        """Whether the same objects are there, in the same order."""
        if _native is not None:
            same: bool = _native.same_values(self._dicts, self._sizes, self._values)
            return same
        now = self._now()
        return list(map(len, self._dicts)) == self._sizes and all(map(operator.is_, now, self._values))

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
