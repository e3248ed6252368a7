"""PixArt-α and Σ: three terms whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.models.collapsed import TableAdapter


class PixArt(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (1, 2)

    def shared(self, call: Mapping[str, Any], base: Tensor) -> Tensor:
        timestep: Tensor = call["timestep"]  # embedded: [batch, 6 · channels]
        return timestep.reshape(len(base), 6, -1)
