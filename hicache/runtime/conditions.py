"""What a call is conditioned on: the embeddings by which conditional, unconditional and further calls differ.

A guider may leave out a call of a step, or begin to make one, in the middle of a run. So calls are told apart
by the tensors they are given, and by their order only where those are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from hicache import compat

# how the names of arguments begin that say what is drawn
_NAMES: Final = ("encoder_hidden_states", "pooled", "class_labels", "cap_feats")


class Conditions:
    """The embeddings among the arguments of a call.

    They are held weakly: a pipeline keeps them for as long as its run lasts. One that makes them anew in
    every step does not, and is known by that: then numbers are compared.

    Args:
        model_kwargs: the transformer's arguments by name.
    """

    def __init__(self, model_kwargs: Mapping[str, Any]) -> None:
        named = [value for name, value in model_kwargs.items() if name.startswith(_NAMES)]
        self._given = [(weakref.ref(tensor), compat.write_count(tensor)) for tensor in _tensors(named)]
        self._kept: list[Tensor] | None = None  # of a pipeline that makes them anew
        self._lasted = False  # whether a later call had the same tensors

    def are(self, later: Conditions) -> bool:
        """Whether a later call is given the same tensors, with nothing written to them since."""
        pairs = list(zip(self._given, later._given, strict=True))
        same = all(one() is other() and count == now for (one, count), (other, now) in pairs)
        self._lasted = self._lasted or same
        return same

    def may_be(self, later: Conditions) -> bool:
        """Whether a later call may be given the same numbers, in other tensors; reads the device.

        So it may where nobody has kept the first ones: neither the pipeline, from the first call on, nor
        :meth:`kept`.
        """
        for (given, count), (now, count_now) in zip(self._given, later._given, strict=True):
            one, other = given(), now()
            if one is None or other is None:
                same = not self._lasted
            else:
                same = count == count_now if one is other else torch.equal(one, other)
            if not same:
                return False
        return True

    def kept(self) -> Conditions:
        """The same, with the tensors, to compare their numbers; of a call that goes on."""
        self._kept = [tensor for given, _ in self._given if (tensor := given()) is not None]
        return self


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
