"""FLUX.1 and Kontext: attention, MLP and the singles' fused output, a feature each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache.adapters import given_pictures
from hicache.adapters.base import ModuleOutput, doubles_and_singles, packed, repeated
from hicache.adapters.controlnet import flux_controlnet
from hicache.adapters.gates import GateRows, Gates
from hicache.adapters.modulated import ModulatedAdapter

_BY_IDS: Final = given_pictures.ByIds(lambda times: times == 1)  # Kontext's given picture is at time one


class Flux(ModulatedAdapter):
    """Doubles: ``gate_msa · attn``, ``gate_mlp · ff``; singles: ``gate · proj_out``; IP-Adapters ungated."""

    edits = True
    drawn_arguments = ("img_ids",)

    gate_arguments = ("guidance", "pooled_projections")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        doubles, singles = self.module.transformer_blocks, self.module.single_transformer_blocks
        # shift, scale, gate of the attention; shift, scale, gate of the MLP
        rows = [GateRows(block.norm1, "linear", (2, 5), 6) for block in doubles]
        rows += [GateRows(block.norm, "linear", (2,), 3) for block in singles]
        self._ungated = sum(row.count for row in rows)  # the feature of what IP-Adapters add, all together
        self._gates = Gates(rows)
        self._gates_with_ip = Gates(rows, ones=1)

    def outputs(self) -> Sequence[ModuleOutput]:
        doubles = self.module.transformer_blocks
        ip = [ModuleOutput(block.attn, ((self._ungated, None),), element=2) for block in doubles]
        return [*doubles_and_singles(self.module, joint="last"), *ip]

    def num_features(self, block_kwargs: Mapping[str, Any]) -> int:
        return self._ungated + _has_ip_adapter(block_kwargs)

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        gates = self._gates_with_ip if _has_ip_adapter(block_kwargs) else self._gates
        return gates.of(nn.functional.silu(block_kwargs["temb"]), base.shape[-1])

    def embedding(
        self, model_kwargs: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Tensor:
        pooled = repeated(model_kwargs["pooled_projections"], steps)
        guidance = repeated(model_kwargs.get("guidance"), steps)
        inputs = [timesteps.to(like.dtype) * 1000]
        inputs += [] if guidance is None else [guidance.to(like.dtype) * 1000]
        temb: Tensor = self.module.time_text_embed(*inputs, pooled)
        return temb

    def drawn(self, model_kwargs: Mapping[str, Any], tokens: int) -> range:
        return _BY_IDS(model_kwargs.get("img_ids"), tokens)

    def between(self, model_kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
        return flux_controlnet(self.module, model_kwargs)

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        config, tokens = self.module.config, packed(latents)
        return {
            "hidden_states": like.new_empty(batch, tokens, config.in_channels),
            "timestep": like.new_empty(batch),
            "guidance": like.new_empty(batch, dtype=torch.float32) if config.guidance_embeds else None,
            "pooled_projections": like.new_empty(batch, config.pooled_projection_dim),
            "encoder_hidden_states": like.new_empty(batch, text, config.joint_attention_dim),
            "txt_ids": like.new_empty(text, 3),
            "img_ids": like.new_empty(tokens, 3),
        }

    def tokens(self, latent_shape: Sequence[int]) -> int:
        return packed(latent_shape)


def _has_ip_adapter(block_kwargs: Mapping[str, Any]) -> bool:
    return "ip_hidden_states" in (block_kwargs.get("joint_attention_kwargs") or {})
