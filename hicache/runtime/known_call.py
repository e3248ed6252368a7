"""A call that is like the one before it, told in a few microseconds.

Most calls of a run differ from those of the last step in their hidden state and timestep alone: the rest is
the same objects. Such a call is of the same context; any other is taken apart.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, Final

from torch import Tensor

from hicache import compat
from hicache.arguments import is_condition
from hicache.runtime.signature import casts, forms, kinds

_FIXED: Final = (bool, int, float, str)


class KnownCall:
    """What was seen of a call.

    Args:
        name: what else tells it from others.
        model_kwargs: the transformer's arguments by name.
    """

    def __init__(self, name: Hashable, model_kwargs: Mapping[str, Any]) -> None:
        self._name = name
        self._names = list(model_kwargs)
        tensors = {key: value for key, value in model_kwargs.items() if isinstance(value, Tensor)}
        given = [(key, value) for key, value in model_kwargs.items() if key not in tensors]
        # held weakly: a pipeline keeps them for as long as its run lasts
        self._embeddings = [
            (key, weakref.ref(tensor)) for key, tensor in tensors.items() if is_condition(key)
        ]
        self._writes = compat.write_counts([tensors[key] for key, _ in self._embeddings])
        self._tensors = [
            (key, weakref.ref(tensor), tensor.shape, tensor.dtype, tensor.device)
            for key, tensor in tensors.items()
            if not is_condition(key)
        ]
        self._others = [key for key, _ in given]
        # what cannot be written to: the same objects have the same form
        self._fixed = {key: value for key, value in given if value is None or isinstance(value, _FIXED)}
        self._forms = forms(dict(given))
        self._kinds = kinds(tensor.device for tensor in tensors.values())
        self._casts = casts(self._kinds)
        # tensors in lists are for those who take calls apart
        self._plain = all(len(form) < 4 for form in self._forms)

    def is_like(self, name: Hashable, model_kwargs: Mapping[str, Any]) -> bool:
        """Whether a later call has the same form and is given the same embeddings, the same tensors."""
        if not self._plain or name != self._name or list(model_kwargs) != self._names:
            return False
        for key, ref in self._embeddings:
            tensor = ref()
            if tensor is None or model_kwargs[key] is not tensor:
                return False
        if compat.write_counts([model_kwargs[key] for key, _ in self._embeddings]) != self._writes:
            return False
        for key, ref, shape, dtype, device in self._tensors:
            later = model_kwargs[key]
            if not isinstance(later, Tensor):
                return False
            if later is not ref() and (
                later.shape != shape or later.dtype != dtype or later.device != device
            ):
                return False
        others = {key: model_kwargs[key] for key in self._others}
        same = map(operator.is_, others.values(), self._fixed.values())
        fixed = len(others) == len(self._fixed) and all(same)
        return (fixed or forms(others) == self._forms) and casts(self._kinds) == self._casts
