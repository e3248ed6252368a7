"""Qwen-Image and its editing models: ``gate1 · attn`` and ``gate2 · img_mlp``, a feature each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hicache.adapters import given_pictures
from hicache.adapters.base import ModuleOutput, repeated
from hicache.adapters.controlnet import spread
from hicache.adapters.gates import GateRows, Gates
from hicache.adapters.modulated import ModulatedAdapter


class QwenImage(ModulatedAdapter):
    """The image stream of 60 double blocks."""

    guidance = (2, 1)
    edits = True

    gate_arguments = ("guidance", "additional_t_cond")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # img_mod is SiLU, then a linear layer: shift, scale, gate of the attention and of the MLP
        self._gates = Gates(
            [GateRows(block.img_mod, "1", (2, 5), 6) for block in self.module.transformer_blocks]
        )

    def outputs(self) -> Sequence[ModuleOutput]:
        found = []
        for index, block in enumerate(self.module.transformer_blocks):
            found.append(ModuleOutput(block.attn, ((2 * index, None),), element=0))
            found.append(ModuleOutput(block.img_mlp, ((2 * index + 1, None),)))
        return found

    def embedding(
        self, model_kwargs: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Tensor:
        guidance = repeated(model_kwargs.get("guidance"), steps)
        inputs = [timesteps.to(like.dtype)]
        inputs += [] if guidance is None else [guidance.to(like.dtype) * 1000]
        more = repeated(model_kwargs.get("additional_t_cond"), steps)
        temb: Tensor = self.module.time_text_embed(*inputs, like, more)
        return temb

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        if block_kwargs.get("modulate_index") is not None:
            # zero_cond_t: the second half is of timestep zero, for the tokens of given pictures
            block_kwargs = {**block_kwargs, "temb": block_kwargs["temb"].chunk(2)[0]}
        return super().gates(block_kwargs, base)

    def gate_inputs(
        self,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        timesteps: Tensor,
        steps: int,
        like: Tensor,
    ) -> Mapping[str, Any]:
        inputs = super().gate_inputs(block_kwargs, model_kwargs, timesteps, steps, like)
        return {**inputs, "modulate_index": None}

    def drawn(self, model_kwargs: Mapping[str, Any], tokens: int) -> range:
        layered = self.module.config.use_layer3d_rope
        return given_pictures.by_shapes(model_kwargs.get("img_shapes"), tokens, layered)

    def refusal(self, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> str | None:
        if block_kwargs.get("modulate_index") is None:
            return None
        # the first picture has the gates of now
        sizes = [math.prod(shape) for shape in model_kwargs["img_shapes"][0]]
        tokens = block_kwargs["hidden_states"].shape[1]
        if tokens != sum(sizes) or len(self.drawn(model_kwargs, tokens)) != sizes[0]:
            return "its gates differ between pictures, and the first is not all that is drawn (zero_cond_t)"
        return None

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
        return spread(model_kwargs.get("controlnet_block_samples"), len(self.module.transformer_blocks))

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config, (frames, height, width) = self.module.config, latents
        return {
            "hidden_states": like.new_empty(batch, self.tokens(latents), config.in_channels),
            "timestep": like.new_empty(batch),
            "encoder_hidden_states": like.new_empty(batch, text, config.joint_attention_dim),
            "img_shapes": [[(frames, height // 2, width // 2)]] * batch,
        }

    def tokens(self, latent_shape: Sequence[int]) -> int:
        frames, height, width = latent_shape  # the pipeline packs 2 × 2 of them
        return frames * (height // 2) * (width // 2)
