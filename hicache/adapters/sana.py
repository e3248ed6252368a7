"""Sana: three features whatever the depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hicache.adapters.base import Features, ModuleOutput
from hicache.adapters.shared_gates import TableAdapter


class Sana(TableAdapter):
    """The feed-forward layer is a convolution over the picture: ``[batch, channels, height, width]``."""

    guidance = (1, 2)
    text_tokens = 300
    compression = (1, 32)

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        timestep: Tensor = block_kwargs["timestep"]  # embedded: [batch, 6 · channels]
        return timestep.reshape(len(base), 6, -1)

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
        # one after every block but the first, as many as there are
        return (model_kwargs.get("controlnet_block_samples") or ())[: len(self._blocks) - 1]

    def mlp(self, block: Any, features: Features) -> ModuleOutput:
        return ModuleOutput(block.ff, features, view=lambda output: output.flatten(2, 3).permute(0, 2, 1))

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config = self.module.config
        return {
            "hidden_states": like.new_empty(batch, config.in_channels, *latents[1:]),
            "timestep": like.new_empty(batch),
            "encoder_hidden_states": like.new_empty(batch, text, config.caption_channels),
            "encoder_attention_mask": like.new_empty(batch, text, dtype=torch.int64),
        }
