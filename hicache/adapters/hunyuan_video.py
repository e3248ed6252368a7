"""HunyuanVideo: attention and MLP of the doubles, the singles' fused output, a feature each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache.adapters.base import ModuleOutput, doubles_and_singles, repeated
from hicache.adapters.gates import GateRows, Gates
from hicache.adapters.modulated import ModulatedAdapter


class HunyuanVideo(ModulatedAdapter):
    """As Flux, with the image before the text."""

    compression = (4, 8)
    text_tokens = 256

    gate_arguments = ("guidance", "pooled_projections")
    embedder = None  # time_text_embed gives another embedding, too

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        rows = [GateRows(block.norm1, "linear", (2, 5), 6) for block in self.module.transformer_blocks]
        rows += [GateRows(block.norm, "linear", (2,), 3) for block in self.module.single_transformer_blocks]
        self._gates = Gates(rows)

    def outputs(self) -> Sequence[ModuleOutput]:
        return doubles_and_singles(self.module, joint="first")

    def embedding(
        self, model_kwargs: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Tensor:
        pooled = repeated(model_kwargs["pooled_projections"], steps)
        guidance = repeated(model_kwargs.get("guidance"), steps)
        temb: Tensor = self.module.time_text_embed(timesteps, pooled, guidance)[0]
        return temb

    def drawn(self, model_kwargs: Mapping[str, Any], tokens: int) -> range:
        config, latents = self.module.config, model_kwargs["hidden_states"]
        # the frame given is the first latent frame, and all of the first tokens' frame
        if config.image_condition_type == "token_replace" and config.patch_size_t == 1:
            *_, frames, height, width = latents.shape
            frame = (height // config.patch_size) * (width // config.patch_size)
            if frames > 1 and frames * frame == tokens:
                return range(frame, tokens)
        return range(tokens)

    def refusal(self, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> str | None:
        tokens = block_kwargs["hidden_states"].shape[1]
        if self.module.config.image_condition_type == "token_replace" and (
            len(self.drawn(model_kwargs, tokens)) == tokens
        ):
            return "the gates of its first frame are not those of the others (token_replace)"
        return None

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config = self.module.config
        return {
            "hidden_states": like.new_empty(batch, config.in_channels, *latents),
            "timestep": like.new_empty(batch),
            "encoder_hidden_states": like.new_empty(batch, text, config.text_embed_dim),
            "encoder_attention_mask": like.new_empty(batch, text),
            "pooled_projections": like.new_empty(batch, config.pooled_projection_dim),
            "guidance": like.new_empty(batch, dtype=torch.float32) if config.guidance_embeds else None,
        }
