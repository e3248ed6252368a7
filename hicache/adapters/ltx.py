"""LTX-Video: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter


class LTX(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (1, 2)
    compression = (8, 32)

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        temb: Tensor = block_kwargs["temb"]  # [batch, 1, 6 · channels]
        return temb.reshape(len(base), 6, -1)

    def refusal(self, block_kwargs: Mapping[str, Any]) -> str | None:
        if block_kwargs["temb"].shape[1] != 1:
            return "its gates differ from token to token (a timestep for every token)"
        return None
