"""Calls of an op in a form that passed its checks before: what is left to ask at every one of them.

Shapes, strides, dtypes, devices and numbers decide what :mod:`hicache_kernels.checks` says of a call, and
which backend runs it, but for the addresses. A call in a known form whose tensors are aligned and apart needs
nothing of that again. Any other goes the whole way, where the words for errors are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hicache_kernels.backend import Backend
from hicache_kernels.checks import span

_MOST: Final = 1024  # forms that an op remembers; all are forgotten when there are more


class _Known(NamedTuple):
    """A form of call that may run."""

    backend: Backend
    itemsizes: tuple[int, ...]  # of the tensors
    apart: tuple[tuple[int, int, int, int], ...]  # one that is written and its bytes, another and its bytes


class KnownForms:
    """The forms of calls of one op that passed its checks.

    Args:
        written: indices among its arguments of the tensors that it writes to.
    """

    def __init__(self, written: Sequence[int]) -> None:
        self._written = written
        self._known: dict[tuple[object, ...], _Known] = {}

    def add(self, arguments: Sequence[Any], backend: Backend) -> None:
        """These have passed, and ``backend`` runs them."""
        places = [index for index, value in enumerate(arguments) if isinstance(value, Tensor)]
        spans = {index: span(arguments[index]) for index in places}
        pairs = (
            (places.index(written), spans[written], place, spans[other])
            for written in self._written
            for place, other in enumerate(places)
            if other != written and spans[written] and spans[other]
        )
        if len(self._known) >= _MOST:
            self._known.clear()
        itemsizes = tuple(arguments[index].itemsize for index in places)
        self._known[_form(arguments)] = _Known(backend, itemsizes, tuple(pairs))

    def backend(self, arguments: Sequence[Any]) -> Backend | None:
        """What runs a call as it is, or None: the call has to go the whole way."""
        known = self._known.get(_form(arguments))
        if known is None:
            return None
        tensors = [value for value in arguments if type(value) is Tensor]
        if torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in tensors]:
            return None
        if True in [tensor.is_neg() for tensor in tensors]:  # the dispatcher makes its numbers first
            return None
        begin = [tensor.data_ptr() for tensor in tensors]
        if 0 in begin or any(map(operator.mod, begin, known.itemsizes)):
            return None
        for written, written_bytes, other, other_bytes in known.apart:
            if begin[written] < begin[other] + other_bytes and begin[other] < begin[written] + written_bytes:
                return None
        return known.backend


def _form(arguments: Sequence[Any]) -> tuple[object, ...]:
    """All but the addresses. Tensors of a class of their own have none but themselves."""
    return tuple(
        [
            (value.shape, value.stride(), value.dtype, value.device)
            if type(value) is Tensor
            else (type(value), value)  # True is 1, and is refused
            for value in arguments
        ]
    )
