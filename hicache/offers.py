"""What comes fitted with a pipeline's models, and what is cached of them with it and without."""

from __future__ import annotations

from typing import Any

from hicache.calibration.shipped import shipped
from hicache.config import HiCacheConfig
from hicache.hooks.transformer import HookedTransformer
from hicache.pipeline import find_denoisers, granularity_of


def offers_for(pipe: Any, granularity: str) -> list[HiCacheConfig]:
    """What was fitted to the models of a pipeline, by what is to be cached of them, the preferred first."""
    found = []
    for calibration in shipped(pipe, granularity):
        fitted = {key.name for key in calibration.models.values()}
        modules = find_denoisers(pipe, unets="output" in (granularity, calibration.granularity))
        if fitted <= {type(module).__name__ for module in modules.values()}:  # else it holds for no run
            found.append(HiCacheConfig.of(calibration))
    return found


def granularity_for(pipe: Any, granularity: str, config: HiCacheConfig, offered: bool) -> str:
    """What is cached in the runs for which no offer holds.

    Args:
        pipe: the pipeline.
        granularity: asked for.
        config: the settings asked for.
        offered: whether there are offers: they were fitted to what can be cached.

    Raises:
        ValueError: it is not known, or cannot be had with rows by feature; the message says why.
    """
    if granularity == "auto":
        granularity = config.fitted_by or granularity
    if granularity == "auto" and offered and not _has_blocks(pipe):
        granularity = "output"
    return granularity_of(granularity, config.by_feature)


def _has_blocks(pipe: Any) -> bool:
    """Whether the denoisers of a pipeline can be cached by what is inside."""
    try:
        for module in find_denoisers(pipe).values():
            HookedTransformer(module)
    except ValueError:
        return False
    return True
