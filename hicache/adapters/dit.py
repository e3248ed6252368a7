"""DiT: ``gate_msa · attn1`` and ``gate_mlp · ff``; every block embeds timestep and class itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache.adapters.base import ModuleAdapter, ModuleOutput, repeated
from hicache.adapters.gates import GateRows, Gates


class DiT(ModuleAdapter):
    """Blocks of class-conditional DiT, ``norm_type="ada_norm_zero"``."""

    guidance = (1, 2)

    gate_arguments = ("class_labels",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._norms = [block.norm1 for block in self.module.transformer_blocks]
        self._gates = Gates([GateRows(norm, "linear", (2, 5), 6) for norm in self._norms])

    def outputs(self) -> Sequence[ModuleOutput]:
        found = []
        for index, block in enumerate(self.module.transformer_blocks):
            found.append(ModuleOutput(block.attn1, ((2 * index, None),)))
            found.append(ModuleOutput(block.ff, ((2 * index + 1, None),)))
        return found

    @property
    def returned(self) -> int:
        return int(self.module.proj_out_2.out_features)

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        def embedded(norm: Any) -> Tensor:
            timestep, label = block_kwargs["timestep"], block_kwargs["class_labels"]
            return nn.functional.silu(norm.emb(timestep, label, hidden_dtype=base.dtype))

        return self._gates.of_each([functools.partial(embedded, norm) for norm in self._norms], base)

    def gate_modules(self) -> Sequence[nn.Module]:
        return [*(norm.emb for norm in self._norms), *self._gates.layers]

    def gate_inputs(
        self,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        timesteps: Tensor,
        steps: int,
        like: Tensor,
    ) -> Mapping[str, Any]:
        return {"timestep": timesteps, "class_labels": repeated(model_kwargs["class_labels"], steps)}

    def example(self, latents: Sequence[int], batch: int, text: int, like: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": like.new_empty(batch, self.module.config.in_channels, *latents[1:]),
            "timestep": like.new_empty(batch, dtype=torch.int64),
            "class_labels": like.new_empty(batch, dtype=torch.int64),
        }
