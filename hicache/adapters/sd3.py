"""Stable Diffusion 3 and 3.5: ``gate · attn``, ``gate · ff``, and 3.5's second attention, a feature each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hicache.adapters.base import ModuleOutput, repeated
from hicache.adapters.gates import GateRows, Gates
from hicache.adapters.modulated import ModulatedAdapter


class SD3(ModulatedAdapter):
    """Blocks with two attentions have nine modulation vectors, the others six."""

    guidance = (1, 2)
    text_tokens = 333  # of CLIP and of T5

    gate_arguments = ("pooled_projections",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._controlled = [not block.context_pre_only for block in self.module.transformer_blocks]
        self._gates = Gates(
            [
                GateRows(block.norm1, "linear", (2, 5, 8), 9)
                if block.use_dual_attention
                else GateRows(block.norm1, "linear", (2, 5), 6)
                for block in self.module.transformer_blocks
            ]
        )

    def outputs(self) -> Sequence[ModuleOutput]:
        found: list[ModuleOutput] = []
        for block in self.module.transformer_blocks:
            first = len(found)
            found.append(ModuleOutput(block.attn, ((first, None),), element=0))
            found.append(ModuleOutput(block.ff, ((first + 1, None),)))
            if block.use_dual_attention:
                found.append(ModuleOutput(block.attn2, ((first + 2, None),)))
        return found

    def embedding(
        self, model_kwargs: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Tensor:
        pooled = repeated(model_kwargs["pooled_projections"], steps)
        temb: Tensor = self.module.time_text_embed(timesteps, pooled)
        return temb

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
        samples = model_kwargs.get("block_controlnet_hidden_states")
        if not samples:
            return []
        every = len(self._controlled) / len(samples)
        return [samples[int(block / every)] for block, takes in enumerate(self._controlled) if takes]

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config = self.module.config
        return {
            "hidden_states": like.new_empty(batch, config.in_channels, *latents[1:]),
            "timestep": like.new_empty(batch),
            "encoder_hidden_states": like.new_empty(batch, text, config.joint_attention_dim),
            "pooled_projections": like.new_empty(batch, config.pooled_projection_dim),
        }
