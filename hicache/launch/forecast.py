"""What a run will take, told before anything is loaded: ``--dry-run`` and ``hicache plan``."""

from __future__ import annotations

from typing import Any

import torch

import hicache.fast
from hicache.launch.loading import DTYPES
from hicache.launch.model_files import folder_of, stored_dtype
from hicache.launch.settings import ORIGINAL, Settings
from hicache.launch.skeleton import skeleton

#: Below this, a run is hardly worth caching: a warm-up of 3 in 4 steps.
LITTLE = 1.5


def memory_plan(settings: Settings, batch: int = 1, **more: Any) -> hicache.fast.Plan | None:
    """Bytes that caching takes; None for the original.

    Args:
        settings: resolved.
        batch: pictures of a call.
        more: of :func:`hicache.fast.plan`.

    Raises:
        ModelError: a configuration that cannot be read.
        ValueError: a model whose modules are not known, or no size.
    """
    if settings.mode == ORIGINAL:
        return None
    pipe = skeleton(settings.model or "")
    return hicache.fast.plan(
        pipe,
        settings.config(),
        height=settings.height or _side(pipe),
        width=settings.width or _side(pipe),
        num_frames=settings.frames or 1,
        batch=2 * batch if _doubles(pipe, settings) else batch,
        steps=settings.steps or 1,
        granularity=settings.granularity,
        dtype=_dtype(settings),
        **more,
    )


def _side(pipe: Any) -> int:
    """Pixels a side of a pipeline that draws one size, or of its usual one.

    Raises:
        ValueError: it has none.
    """
    side = getattr(pipe, "default_sample_size", None) or pipe.transformer.config.get("sample_size")
    if not isinstance(side, int):
        raise ValueError("expected --width and --height: the model has no usual size")
    return side * (getattr(pipe, "vae_scale_factor", None) or 8)


def _doubles(pipe: Any, settings: Settings) -> bool:
    """Whether guidance doubles a call's batch and the model's adapter does not know: the bundled model's."""
    return getattr(pipe, "guided_in_one_batch", False) and (settings.guidance or 0) > 1


def _dtype(settings: Settings) -> torch.dtype:
    folder = folder_of(settings.model or "")
    stored = torch.bfloat16 if folder is None else stored_dtype(folder)  # of a name it is not known yet
    return DTYPES.get(settings.dtype, stored)


def steps_line(settings: Settings) -> str:
    """Full steps of a run and its bound, and whether that is little."""
    steps, full = settings.steps or 0, settings.full_steps()
    if full is None:
        return f"{steps} steps, of which the run decides how many are full"
    bound = steps / max(1, full)
    little = settings.mode != ORIGINAL and bound < LITTLE
    hint = ": little is left to skip; try a smaller --warmup or more --steps" if little else ""
    return f"{full} of {steps} steps are full, bound {bound:.2f}x{hint}"
