"""PixArt-α and Σ: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hicache.adapters.shared_gates import TableAdapter


class PixArt(TableAdapter):
    """Self-attention and feed-forward are gated, cross-attention is not."""

    guidance = (1, 2)
    text_tokens = 300

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        timestep: Tensor = block_kwargs["timestep"]  # embedded: [batch, 6 · channels]
        return timestep.reshape(len(base), 6, -1)

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config = self.module.config
        return {
            "hidden_states": like.new_empty(batch, config.in_channels, *latents[1:]),
            "timestep": like.new_empty(batch, dtype=torch.int64),
            "encoder_hidden_states": like.new_empty(batch, text, config.caption_channels),
            "encoder_attention_mask": like.new_empty(batch, text, dtype=torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
