"""LTX-Video: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter, of_groups


class LTX(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (1, 2)
    compression = (8, 32)
    text_tokens = 128

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        temb: Tensor = block_kwargs["temb"]  # [batch, 1 or tokens, 6 · channels]
        temb = temb if temb.shape[1] == 1 else of_groups(temb, base)
        return temb.reshape(len(base), 6, -1)

    def token_timesteps(self, model_kwargs: Mapping[str, Any]) -> Tensor | None:
        hidden, timestep = model_kwargs.get("hidden_states"), model_kwargs.get("timestep")
        if not isinstance(hidden, Tensor) or not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return None
        return None if timestep.numel() == len(hidden) else timestep.reshape(len(hidden), -1)

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config, (frames, height, width) = self.module.config, latents
        return {
            "hidden_states": like.new_empty(batch, self.tokens(latents), config.in_channels),
            "timestep": like.new_empty(batch),
            "encoder_hidden_states": like.new_empty(batch, text, config.caption_channels),
            "encoder_attention_mask": like.new_empty(batch, text, dtype=torch.int64),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (0.32, 32, 32),
        }
