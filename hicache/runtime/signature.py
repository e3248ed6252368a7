"""The form of a call: what must be equal for a history to fit it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def signature(model_kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The form of a call, by its arguments, and what autocast makes of them."""
    found = forms(model_kwargs)
    devices = (form[-1] for form in found)
    return (*found, *casts(kinds(device for device in devices if isinstance(device, torch.device))))


def forms(values: Any, in_list: bool = False) -> list[tuple[Any, ...]]:
    """Shapes, dtypes and devices of the tensors among arguments, those in lists and dictionaries too.

    IP-Adapters have such. Also whole numbers in lists (which layers to skip), and words (whether keys and
    values are read or written).
    """
    found: list[tuple[Any, ...]] = []
    for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(value, Tensor):
            found.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple, Mapping)):
            found += [(name, *form) for form in forms(value, not isinstance(value, Mapping))]
        elif isinstance(value, str) or (in_list and isinstance(value, int)):
            found.append((name, value))
    return found


def kinds(devices: Iterable[torch.device]) -> list[str]:
    """The kinds of some devices that know of autocast."""
    return [kind for kind in sorted({d.type for d in devices}) if torch.amp.is_autocast_available(kind)]


def casts(of_kinds: Iterable[str]) -> list[torch.dtype]:
    """What autocast casts to on kinds of devices, where it does."""
    return [torch.get_autocast_dtype(kind) for kind in of_kinds if torch.is_autocast_enabled(kind)]


def requires_grad(model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is made for the gradients of one of its arguments."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in model_kwargs.values())
