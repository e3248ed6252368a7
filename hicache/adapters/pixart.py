"""PixArt-α and Σ: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter


class PixArt(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (1, 2)

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        timestep: Tensor = block_kwargs["timestep"]  # embedded: [batch, 6 · channels]
        return timestep.reshape(len(base), 6, -1)
