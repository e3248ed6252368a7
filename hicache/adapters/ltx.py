"""LTX-Video: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter, of_groups


class LTX(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (1, 2)
    compression = (8, 32)

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        temb: Tensor = block_kwargs["temb"]  # [batch, 1 or tokens, 6 · channels]
        temb = temb if temb.shape[1] == 1 else of_groups(temb, base)
        return temb.reshape(len(base), 6, -1)

    def token_timesteps(self, model_kwargs: Mapping[str, Any]) -> Tensor | None:
        hidden, timestep = model_kwargs.get("hidden_states"), model_kwargs.get("timestep")
        if not isinstance(hidden, Tensor) or not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return None
        return None if timestep.numel() == len(hidden) else timestep.reshape(len(hidden), -1)
