"""Wan 2.1 and 2.2: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter


class Wan(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (2, 1)
    compression = (4, 8)

    BLOCKS, MLP = "blocks", "ffn"

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        temb: Tensor = block_kwargs["temb"]
        return temb.float() if temb.dtype != base.dtype or base.element_size() < 4 else temb

    def refusal(self, block_kwargs: Mapping[str, Any]) -> str | None:
        if block_kwargs["temb"].ndim != 3:
            return "its gates differ from token to token (a timestep for every token)"
        return None
