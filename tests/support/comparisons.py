"""How far outputs are apart, and what a cache could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def relative_rms(one: Tensor, other: Tensor) -> float:
    """Root mean square of a difference over that of ``other``."""
    return float(((one - other).norm() / other.norm()).detach())


def relative_max(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest number of ``other``."""
    return float((one - other).abs().max() / other.abs().max())


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether the relative root mean square of a difference is at most ``tolerance``."""
    return bool((one - other).norm() <= tolerance * other.norm())


def first(output: Any) -> Tensor:
    """A copy of the hidden state that a denoiser returns, whatever it is wrapped in."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found.clone()


def flat(output: Any) -> Tensor:
    """All numbers of a model's output, in one row."""
    if isinstance(output, Tensor):
        return output.flatten()
    return torch.cat([flat(part) for part in output if part is not None])


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of calls in another floating dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(part, dtype) for key, part in value.items()}
    return type(value)(cast(part, dtype) for part in value) if isinstance(value, (list, tuple)) else value


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a module that a hook could change: classes, attributes, hooks, parameters, forwards."""
    seen: dict[str, Any] = {".state_dict": list(model.state_dict())}
    for path, part in model.named_modules():
        members = {key: id(value) for key, value in vars(part).items() if not isinstance(value, dict)}
        dicts = {
            key: {name: id(entry) for name, entry in value.items()}
            for key, value in vars(part).items()
            if isinstance(value, dict)
        }
        forward = getattr(part.forward, "__func__", part.forward)
        seen[path] = (type(part), list(vars(part)), members, dicts, forward)
    return seen
