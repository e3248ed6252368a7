"""The noise levels σ of a scheduler's steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def noise_levels(scheduler: Any, num_steps: int | None) -> tuple[float, ...] | None:
    """σ that every step of a run begins with; reads the device.

    Args:
        scheduler: after ``set_timesteps``. Of one without ``sigmas``, the cumulative products of its alphas
            give ``σ = √((1 - ᾱ) / ᾱ)``.
        num_steps: of the run: the scheduler's last ones. None: it is not known.

    Returns:
        ``num_steps`` numbers; None where the scheduler has none.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if num_steps is None or not isinstance(timesteps, Tensor) or len(timesteps) < num_steps:
        return None
    sigmas, products = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        levels = torch.as_tensor(sigmas)[: len(timesteps)]
    elif isinstance(products, Tensor):
        alphas = products[timesteps.long().to(products.device).clamp(0, len(products) - 1)]
        levels = ((1 - alphas) / alphas).sqrt()
    else:
        return None
    found: list[float] = levels[len(timesteps) - num_steps :].double().tolist()
    return tuple(found)
