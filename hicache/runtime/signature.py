"""The form of a call: what must be equal for a history to fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def signature(model_kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The form of a call, by its arguments.

    Shapes, dtypes and devices of its tensors, those in lists and dictionaries too (IP-Adapters'), whole
    numbers in lists (which layers to skip), words (whether keys and values are read or written), and what
    autocast makes of them.
    """
    forms = _forms(model_kwargs, in_list=False)
    types = sorted({device.type for *_, device in forms if isinstance(device, torch.device)})
    known = [kind for kind in types if torch.amp.is_autocast_available(kind)]
    casts = [torch.get_autocast_dtype(kind) for kind in known if torch.is_autocast_enabled(kind)]
    return (*forms, *casts)


def _forms(values: Any, in_list: bool) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(value, Tensor):
            found.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple, Mapping)):
            found += [(name, *form) for form in _forms(value, not isinstance(value, Mapping))]
        elif isinstance(value, str) or (in_list and isinstance(value, int)):
            found.append((name, value))
    return found


def requires_grad(model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is made for the gradients of one of its arguments."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in model_kwargs.values())
