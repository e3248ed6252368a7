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
        batch, timestep = len(model_kwargs["hidden_states"]), model_kwargs["timestep"]
        return None if timestep.numel() == batch else timestep.reshape(batch, -1)
