"""DiT: ``gate_msa · attn1`` and ``gate_mlp · ff``; every block embeds timestep and class itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hicache.models.features import Feature, ModuleAdapter, repeated
from hicache.models.gates import GateRows, Gates


class DiT(ModuleAdapter):
    """Blocks of class-conditional DiT, ``norm_type="ada_norm_zero"``."""

    guidance = (1, 2)

    constants = ("class_labels",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        norms = [block.norm1 for block in self.module.transformer_blocks]
        self._gates = Gates([GateRows(norm, "linear", (2, 5), 6) for norm in norms])
        self._embedders = [norm.emb for norm in norms]

    def features(self) -> Sequence[Feature]:
        found = []
        for index, block in enumerate(self.module.transformer_blocks):
            found.append(Feature(block.attn1, ((2 * index, None),)))
            found.append(Feature(block.ff, ((2 * index + 1, None),)))
        return found

    def gates(self, call: Mapping[str, Any], base: Tensor) -> Tensor:
        embedded = [
            embed(call["timestep"], call["class_labels"], hidden_dtype=base.dtype)
            for embed in self._embedders
        ]
        return self._gates.of([nn.functional.silu(one) for one in embedded], base.shape[-1])

    def coming(
        self, call: Mapping[str, Any], named: Mapping[str, Any], timesteps: Tensor, steps: int, like: Tensor
    ) -> Mapping[str, Any]:
        return {"timestep": timesteps, "class_labels": repeated(named["class_labels"], steps)}
