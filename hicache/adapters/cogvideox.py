"""CogVideoX: ``gate · attn1`` and ``gate · ff``, each with a modulation layer of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache.adapters.base import ModuleOutput, repeated
from hicache.adapters.gates import GateRows, Gates
from hicache.adapters.modulated import ModulatedAdapter


class CogVideoX(ModulatedAdapter):
    """The feed-forward layer works on text and video together, text first."""

    guidance = (1, 2)
    compression = (4, 8)
    text_tokens = 226

    gate_arguments = ("timestep_cond", "ofs")
    embedders = ("time_embedding", "ofs_embedding")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # shift, scale, gate of the video; shift, scale, gate of the text
        norms = [norm for block in self.module.transformer_blocks for norm in (block.norm1, block.norm2)]
        self._gates = Gates([GateRows(norm, "linear", (2,), 6) for norm in norms])

    def outputs(self) -> Sequence[ModuleOutput]:
        found = []
        for index, block in enumerate(self.module.transformer_blocks):
            found.append(ModuleOutput(block.attn1, ((2 * index, None),), element=0))
            found.append(ModuleOutput(block.ff, ((2 * index + 1, None),), joint="last"))
        return found

    def embedding(
        self, model_kwargs: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Tensor:
        model = self.module
        projected = model.time_proj(timesteps).to(like.dtype)
        temb: Any = model.time_embedding(projected, repeated(model_kwargs.get("timestep_cond"), steps))
        if model.ofs_embedding is not None:
            ofs = model.ofs_proj(model_kwargs["ofs"]).to(like.dtype)
            temb = temb + repeated(model.ofs_embedding(ofs), steps)
        embedded: Tensor = temb
        return embedded

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config, frames = self.module.config, self._padded(latents[0])
        rotary = like.new_empty(self.tokens(latents), config.attention_head_dim, dtype=torch.float32)
        learned = not config.use_rotary_positional_embeddings
        return {
            "hidden_states": like.new_empty(batch, frames, config.in_channels, *latents[1:]),
            "timestep": like.new_empty(batch, dtype=torch.int64),
            "encoder_hidden_states": like.new_empty(batch, text, config.text_embed_dim),
            "ofs": None if self.module.ofs_embedding is None else like.new_empty(1),
            "image_rotary_emb": None if learned else (rotary, rotary.clone()),
        }

    def tokens(self, latent_shape: Sequence[int]) -> int:
        frames, height, width = latent_shape
        return super().tokens((self._padded(frames), height, width))

    def _padded(self, frames: int) -> int:
        """Latent frames that the pipeline draws: that of CogVideoX 1.5 adds some up to a whole patch."""
        step = self.module.config.patch_size_t or 1
        return math.ceil(frames / step) * step
