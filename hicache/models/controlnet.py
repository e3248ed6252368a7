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


def flux_controlnet(module: Any, named: Mapping[str, Any]) -> list[Tensor]:
    """Residuals of Flux and Chroma: for the doubles, spread or repeated (XLabs), and for the singles."""
    doubles, singles = len(module.transformer_blocks), len(module.single_transformer_blocks)
    samples = named.get("controlnet_block_samples")
    if samples and named.get("controlnet_blocks_repeat"):
        added = [samples[block % len(samples)] for block in range(doubles)]
    else:
        added = spread(samples, doubles)
    return added + spread(named.get("controlnet_single_block_samples"), singles)
