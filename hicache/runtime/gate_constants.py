"""What gates and embeddings depend on but for the timestep and weights: the other arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from hicache import compat
from hicache.adapters.base import ModuleAdapter

# what diffusers' pipelines give the scale of LoRA in
_LORA_ARGUMENTS: Final = ("joint_attention_kwargs", "attention_kwargs")


class Constants:
    """What gates depend on, but for the timestep and weights, as it was in one call.

    Args:
        adapter: the family's.
        model_kwargs: the transformer's.
    """

    def __init__(self, adapter: ModuleAdapter, model_kwargs: Mapping[str, Any]) -> None:
        self._lora_scale = lora_scale(model_kwargs)
        given = {name: model_kwargs.get(name) for name in adapter.gate_arguments}
        # held, so that no other tensor takes the place of one
        self._tensors = [
            (name, value, compat.write_count(value), value.detach().clone())
            for name, value in given.items()
            if isinstance(value, Tensor)
        ]
        self._others = [(name, value) for name, value in given.items() if not isinstance(value, Tensor)]

    def are(self, model_kwargs: Mapping[str, Any], read: bool) -> bool:
        """Whether a later call is given the same: the same tensors, which nobody wrote to.

        Args:
            model_kwargs: the transformer's.
            read: or others of the same numbers, which are read from the device.
        """
        for name, tensor, writes, numbers in self._tensors:
            later = model_kwargs.get(name)
            if later is tensor and compat.write_count(tensor) == writes:
                continue
            if not (read and isinstance(later, Tensor) and _equal(numbers, later)):
                return False
        for name, value in self._others:
            later = model_kwargs.get(name)
            if isinstance(later, Tensor) or later != value:
                return False
        return lora_scale(model_kwargs) == self._lora_scale


def _equal(numbers: Tensor, later: Tensor) -> bool:
    return numbers.dtype == later.dtype and torch.equal(numbers, later.to(numbers.device))


def lora_scale(model_kwargs: Mapping[str, Any]) -> float:
    """The scale a call gives to its LoRA layers."""
    given: Mapping[str, Any] = next(
        (model_kwargs[name] for name in _LORA_ARGUMENTS if model_kwargs.get(name)), {}
    )
    return float(given.get("scale", 1.0))
