"""Wan 2.1 and 2.2: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter, of_groups


class Wan(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (2, 1)
    compression = (4, 8)

    BLOCKS, MLP = "blocks", "ffn"

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        temb: Tensor = block_kwargs["temb"]  # [batch, 6, channels], or [batch, tokens, 6, channels]
        temb = temb if temb.ndim == 3 else of_groups(temb, base)
        return temb.float() if temb.dtype != base.dtype or base.element_size() < 4 else temb

    def token_timesteps(self, model_kwargs: Mapping[str, Any]) -> Tensor | None:
        timestep = model_kwargs.get("timestep")
        return timestep if isinstance(timestep, Tensor) and timestep.ndim == 2 else None

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config = self.module.config
        return {
            "hidden_states": like.new_empty(batch, config.in_channels, *latents),
            "timestep": like.new_empty(batch, dtype=torch.float32),
            "encoder_hidden_states": like.new_empty(batch, text, config.text_dim),
        }
