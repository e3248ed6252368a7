"""ControlNet residuals as the models add them to the hidden state, one after each block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def spread(samples: Sequence[Tensor] | None, blocks: int) -> list[Tensor]:
    """Few residuals over many blocks, each for a run of neighbours."""
    if not samples:
        return []
    every = math.ceil(blocks / len(samples))
    return [samples[block // every] for block in range(blocks)]


def flux_controlnet(module: Any, model_kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Residuals of Flux and Chroma: for the doubles, spread or repeated (XLabs), and for the singles."""
    samples = model_kwargs.get("controlnet_block_samples")
    of_singles = model_kwargs.get("controlnet_single_block_samples")
    if not samples and not of_singles:
        return []
    doubles, singles = len(module.transformer_blocks), len(module.single_transformer_blocks)
    if samples and model_kwargs.get("controlnet_blocks_repeat"):
        added = [samples[block % len(samples)] for block in range(doubles)]
    else:
        added = spread(samples, doubles)
    return added + spread(of_singles, singles)
