"""What a call is conditioned on: the embeddings by which conditional, unconditional and further calls differ.

A guider may leave out a call of a step, or begin to make one, in the middle of a run. So calls are told apart
by the tensors they are given, and by their order only where those are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hicache import compat
from hicache.arguments import is_condition


class Conditions:
    """The embeddings among the arguments of a call.

    They are held weakly: a pipeline keeps them for as long as its run lasts. One that makes them anew in
    every step, or writes them to one buffer again, does not, and then numbers are compared.

    Args:
        model_kwargs: the transformer's arguments by name.
    """

    def __init__(self, model_kwargs: Mapping[str, Any]) -> None:
        self._given = [
            (weakref.ref(tensor), compat.write_count(tensor)) for tensor in conditioning(model_kwargs)
        ]
        self._numbers: list[Tensor] = []
        self._shared = False  # whether the numbers are counted as another's

    @property
    def counted(self) -> bool:
        """Whether it is known when they are written to; not so of tensors made in inference mode."""
        return all(count is not None for _, count in self._given)

    def keep(self, alike: Conditions | None = None) -> Conditions:
        """Copy their numbers, at the first call of a context: a later call may be given them anew.

        Args:
            alike: conditions that are the same and have a copy, which serves both.
        """
        self._shared = alike is not None
        if alike is not None:
            self._numbers = alike._numbers
            return self
        given = [tensor for ref, _ in self._given if (tensor := ref()) is not None]
        self._numbers = [tensor.detach().clone() for tensor in given]
        return self

    def release(self) -> None:
        """Free the numbers kept: from here on the tensors themselves have to come again."""
        self._numbers = []

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers kept."""
        return 0 if self._shared else sum(tensor.nbytes for tensor in self._numbers)

    def are(self, later: Conditions) -> bool:
        """Whether a later call is given the same tensors, with nothing known to be written to them since."""
        pairs = zip(self._given, later._given, strict=True)
        return all(one() is other() and count == now for (one, count), (other, now) in pairs)

    def equal(self, later: Conditions) -> bool:
        """Whether a later call is given the numbers kept, whatever holds them; reads the device.

        Where it is, its tensors are those that :meth:`are` looks for from then on.
        """
        given = [tensor for ref, _ in later._given if (tensor := ref()) is not None]
        same = len(given) == len(self._numbers) and all(map(torch.equal, self._numbers, given))
        if same:
            self._given = later._given
        return same


def conditioning(model_kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among a call's arguments that say what is drawn.

    Args:
        model_kwargs: the transformer's arguments by name.
    """
    return _tensors([value for name, value in model_kwargs.items() if is_condition(name)])


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
