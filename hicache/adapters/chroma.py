"""Chroma: Flux's features; all modulation vectors come out of one small network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.adapters.base import ModuleAdapter, ModuleOutput, doubles_and_singles, packed
from hicache.adapters.controlnet import flux_controlnet

_OTHER_STEPS: Final = "modulation vectors of other steps"


class Chroma(ModuleAdapter):
    """Its network gives ``[batch, vectors, channels]``: 3 a single, 6 a double (image), 6 a double (text)."""

    guidance = (2, 1)
    foretell = True  # of the timestep alone

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        doubles, singles = len(self.module.transformer_blocks), len(self.module.single_transformer_blocks)
        first = 3 * singles
        gates = [first + 6 * block + part for block in range(doubles) for part in (2, 5)]
        self._index = torch.tensor([*gates, *(3 * block + 2 for block in range(singles))])
        self._vectors: Tensor | None = None

    def outputs(self) -> Sequence[ModuleOutput]:
        return doubles_and_singles(self.module, joint="last")

    def hooks(self) -> list[Callable[[], None]]:
        def keep(network: nn.Module, args: Any, output: Tensor) -> None:
            self._vectors = output

        def forget() -> None:
            self._vectors = None

        return [self.module.distilled_guidance_layer.register_forward_hook(keep).remove, forget]

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        vectors = block_kwargs.get(_OTHER_STEPS, self._vectors)
        assert vectors is not None
        if self._index.device != vectors.device:
            self._index = self._index.to(vectors.device)
        gates: Tensor = vectors.transpose(0, 1)[self._index].to(base.dtype)
        return gates

    def gate_inputs(
        self,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        timesteps: Tensor,
        steps: int,
        like: Tensor,
    ) -> Mapping[str, Any]:
        embedded = self.module.time_text_embed(timesteps.to(like.dtype) * 1000)
        # not by way of the hook: what that keeps is the running call's
        return {_OTHER_STEPS: self.module.distilled_guidance_layer.forward(embedded)}

    def gate_modules(self) -> Sequence[nn.Module]:
        return [self.module.time_text_embed, self.module.distilled_guidance_layer]

    def refusal(self, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> str | None:
        if "ip_hidden_states" in (block_kwargs.get("joint_attention_kwargs") or {}):
            return "IP-Adapter outputs of Chroma are not recorded"
        return None

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
        return flux_controlnet(self.module, model_kwargs)

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config, tokens = self.module.config, packed(latents)
        return {
            "hidden_states": like.new_empty(batch, tokens, config.in_channels),
            "timestep": like.new_empty(batch),
            "encoder_hidden_states": like.new_empty(batch, text, config.joint_attention_dim),
            "txt_ids": like.new_empty(text, 3),
            "img_ids": like.new_empty(tokens, 3),
            "attention_mask": like.new_empty(batch, text + tokens, dtype=torch.bool),
        }

    def tokens(self, latent_shape: Sequence[int]) -> int:
        return packed(latent_shape)
