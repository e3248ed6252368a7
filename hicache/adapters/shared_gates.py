"""Models whose gates are a constant of the block plus a vector all blocks share.

``Σ_i (T_i + g(t)) ⊙ F_i = Σ_i T_i ⊙ F_i + g(t) ⊙ Σ_i F_i``, exactly: two or three features whatever the depth
(docs/algorithm.md, "Shared gates collapse").
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache.adapters.base import Features, ModuleAdapter, ModuleOutput


class TableAdapter(ModuleAdapter):
    """Blocks with a ``scale_shift_table``: shift, scale, gate of the attention, then of the MLP.

    Three features: everything with a constant gate, the attentions, the MLPs. A subclass names its modules
    and says where the shared vectors ``[batch, 6, channels]`` are.

    Args:
        module: the transformer.
        collapse: False makes every output a feature of its own: the same sum, for comparison.
    """

    BLOCKS = "transformer_blocks"
    ATTENTION, CROSS, MLP = "attn1", "attn2", "ff"

    def __init__(self, module: nn.Module, collapse: bool = True) -> None:
        super().__init__(module)
        self.collapse = collapse
        self._blocks = list(getattr(module, self.BLOCKS))

    def shared(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        """The vectors all blocks share: ``[batch, 6, channels]``."""
        raise NotImplementedError

    def mlp(self, block: Any, features: Features) -> ModuleOutput:
        """The output of a block's MLP."""
        return ModuleOutput(getattr(block, self.MLP), features)

    def outputs(self) -> Sequence[ModuleOutput]:
        found: list[ModuleOutput] = []
        for index, block in enumerate(self._blocks):
            attention: Features = ((0, functools.partial(_row, block, 2)), (1, None))
            mlp: Features = ((0, functools.partial(_row, block, 5)), (2, None))
            cross = 0
            if not self.collapse:
                attention, mlp, cross = ((3 * index, None),), ((3 * index + 1, None),), 3 * index + 2
            found.append(ModuleOutput(getattr(block, self.ATTENTION), attention))
            found.append(self.mlp(block, mlp))
            if getattr(block, self.CROSS) is not None:
                found.append(ModuleOutput(getattr(block, self.CROSS), ((cross, None),)))
        return found

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        attention, mlp = self.shared(block_kwargs, base)[:, 2::3].unbind(1)  # [B, channels] each
        if self.collapse:
            return torch.stack([torch.ones_like(attention), attention, mlp]).to(base.dtype)
        gates: list[Tensor] = []
        for block in self._blocks:
            own = [_row(block, part).to(attention.device) for part in (2, 5)]
            gates += [own[0] + attention, own[1] + mlp, torch.ones_like(attention)]
        return torch.stack(gates).to(base.dtype)


def of_groups(embedded: Tensor, base: Tensor) -> Tensor:
    """What tokens of a group have in common.

    Args:
        embedded: of every token, ``[batch, tokens, ...]``.
        base: ``[batch · groups, tokens of a group, channels]``.

    Returns:
        ``[batch · groups, ...]``.
    """
    groups = len(base) // len(embedded)
    grouped: Tensor = embedded.unflatten(1, (groups, -1))
    return grouped[:, :, 0].flatten(0, 1)


def _row(block: Any, part: int) -> Tensor:
    """What a block's table adds to one of the shared vectors."""
    row: Tensor = block.scale_shift_table.detach().view(6, -1)[part]
    return row
