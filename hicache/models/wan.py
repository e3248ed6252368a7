"""Wan 2.1 and 2.2: three terms whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.models.collapsed import TableAdapter


class Wan(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (2, 1)
    compression = (4, 8)

    BLOCKS, MLP = "blocks", "ffn"

    def shared(self, call: Mapping[str, Any], base: Tensor) -> Tensor:
        temb: Tensor = call["temb"]
        return temb.float() if temb.dtype != base.dtype or base.element_size() < 4 else temb

    def refusal(self, call: Mapping[str, Any]) -> str | None:
        if call["temb"].ndim != 3:
            return "its gates differ from token to token (a timestep for every token)"
        return None
