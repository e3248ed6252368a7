"""What tells a model from others, in its own words and by some of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from hicache.weights import is_sharded

_SAMPLED: Final = 8  # weights that are looked at
_NUMBERS: Final = 65536  # of each
_TOLERANCE: Final = 0.02  # relative: dtypes differ by less, and so does a LoRA's share


@dataclass(frozen=True)
class ModelKey:
    """Class, digest of the config, and mean magnitudes of some weights where those can be read.

    Equal models in other dtypes, on other devices or with LoRA have keys that :meth:`differs` takes for one.
    """

    name: str
    config: str
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> ModelKey:
        """The key of a model; reads a part of its weights from the device."""
        config = {
            name: value for name, value in dict(getattr(module, "config", {})).items() if name[:1] != "_"
        }
        text = json.dumps(config, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(type(module).__name__, digest, _magnitudes(module))

    def differs(self, other: ModelKey) -> str | None:
        """In what another model differs from this one; None where it does not."""
        if self.name != other.name:
            return f"it is for {self.name}, not {other.name}"
        if self.config != other.config:
            return f"it is for a {self.name} of another config"
        if len(self.weights) == len(other.weights) and any(
            abs(mine - given) > _TOLERANCE * max(abs(mine), 1e-6)
            for mine, given in zip(self.weights, other.weights, strict=True)
        ):
            return f"it is for a {self.name} with other weights"
        return None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"class": self.name, "config": self.config, "weights": list(self.weights)}


def _magnitudes(module: nn.Module) -> tuple[float, ...]:
    if is_sharded(module):
        return ()
    weights = [
        weight
        for name, weight in module.named_parameters()
        if "lora" not in name and weight.is_floating_point() and weight.numel()
    ]
    if not weights or any(weight.is_meta for weight in weights):
        return ()
    stride = max(1, len(weights) // _SAMPLED)
    with torch.no_grad():
        return tuple(
            float(f"{float(weight.detach().flatten()[:_NUMBERS].float().abs().mean()):.4g}")
            for weight in weights[::stride][:_SAMPLED]
        )
