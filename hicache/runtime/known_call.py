"""A call that is like the one before it, told in a few microseconds.

Most calls of a run differ from those of the last step in their hidden state and timestep alone: the rest is
the same objects. Such a call is of the same context; any other is taken apart (:mod:`hicache.runtime.context`).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from hicache import compat
from hicache.runtime.conditions import is_condition
from hicache.runtime.signature import casts, forms, kinds


class KnownCall:
    """What was seen of a call.

    Args:
        name: what else tells it from others.
        model_kwargs: the transformer's arguments by name.
    """

    def __init__(self, name: Hashable, model_kwargs: Mapping[str, Any]) -> None:
        self._name = name
        self._count = len(model_kwargs)
        self._tensors = [
            _KnownTensor(key, value) for key, value in model_kwargs.items() if isinstance(value, Tensor)
        ]
        given = {key: value for key, value in model_kwargs.items() if not isinstance(value, Tensor)}
        self._others, self._forms = tuple(given), forms(given)
        self._kinds = kinds(tensor.device for tensor in self._tensors)
        self._casts = casts(self._kinds)
        # embeddings in lists and devices of tensors in them are for those who take calls apart
        self._plain = not any(is_condition(key) and value is not None for key, value in given.items()) and all(
            len(form) < 4 for form in self._forms
        )

    def is_like(self, name: Hashable, model_kwargs: Mapping[str, Any]) -> bool:
        """Whether a later call has the same form and is given the same embeddings, the same tensors."""
        if not self._plain or len(model_kwargs) != self._count or name != self._name:
            return False
        for known in self._tensors:
            if not known.is_like(model_kwargs.get(known.key)):
                return False
        try:
            others = {key: model_kwargs[key] for key in self._others}
        except KeyError:
            return False
        return forms(others) == self._forms and casts(self._kinds) == self._casts


class _KnownTensor:
    """A tensor among the arguments, not kept alive.

    Args:
        key: the argument's name.
        tensor: what was given.
    """

    def __init__(self, key: str, tensor: Tensor) -> None:
        self.key = key
        self.device = tensor.device
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._ref = weakref.ref(tensor)
        self._condition = is_condition(key)
        self._writes = compat.write_count(tensor)

    def is_like(self, later: Any) -> bool:
        if later is self._ref():
            return not self._condition or compat.write_count(later) == self._writes
        return (
            not self._condition
            and isinstance(later, Tensor)
            and later.shape == self._shape
            and later.dtype == self._dtype
            and later.device == self.device
        )
