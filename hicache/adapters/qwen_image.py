"""Qwen-Image and its editing models: ``gate1 · attn`` and ``gate2 · img_mlp``, a feature each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hicache.adapters.base import ModuleOutput, repeated
from hicache.adapters.controlnet import spread
from hicache.adapters.gates import GateRows, Gates
from hicache.adapters.modulated import ModulatedAdapter


class QwenImage(ModulatedAdapter):
    """The image stream of 60 double blocks."""

    guidance = (2, 1)

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

    def refusal(self, block_kwargs: Mapping[str, Any]) -> str | None:
        if block_kwargs.get("modulate_index") is not None:
            return "its gates differ between the picture drawn and the pictures given (zero_cond_t)"
        return None

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
        return spread(model_kwargs.get("controlnet_block_samples"), len(self.module.transformer_blocks))

    def tokens(self, latent_shape: Sequence[int]) -> int:
        frames, height, width = latent_shape  # the pipeline packs 2 × 2 of them
        return frames * (height // 2) * (width // 2)
