"""HunyuanVideo: attention and MLP of the doubles, the singles' fused output, one term each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hicache.models.features import Feature, ModuleAdapter, doubles_and_singles, repeated
from hicache.models.gates import GateRows, Gates


class HunyuanVideo(ModuleAdapter):
    """As Flux, with the image before the text."""

    compression = (4, 8)

    constants = ("guidance", "pooled_projections")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        rows = [GateRows(block.norm1, "linear", (2, 5), 6) for block in self.module.transformer_blocks]
        rows += [GateRows(block.norm, "linear", (2,), 3) for block in self.module.single_transformer_blocks]
        self._gates = Gates(rows)

    def features(self) -> Sequence[Feature]:
        return doubles_and_singles(self.module, joint="first")

    def gates(self, call: Mapping[str, Any], base: Tensor) -> Tensor:
        return self._gates.of(nn.functional.silu(call["temb"]), base.shape[-1])

    def coming(
        self, call: Mapping[str, Any], named: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Mapping[str, Any]:
        pooled = repeated(named["pooled_projections"], steps)
        guidance = repeated(named.get("guidance"), steps)
        return {**call, "temb": self.module.time_text_embed(timesteps, pooled, guidance)[0]}

    def refusal(self, call: Mapping[str, Any]) -> str | None:
        if self.module.config.image_condition_type == "token_replace":
            return "the gates of its first frame are not those of the others (token_replace)"
        return None
