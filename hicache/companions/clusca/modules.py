"""The MLPs of a transformer's double blocks, and what of its history stands before each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hicache.adapters.base import ModuleAdapter
from hicache.adapters.gates import GateRows
from hicache.companions.clusca.families import Family, double_blocks, find_family


@dataclass(frozen=True)
class Mlp:
    """One MLP of the image stream.

    Args:
        block: has it.
        feature: in which its output is recorded.
        before: features that the block adds before the MLP runs.
        modulation: gives shift and scale of what it is given.
    """

    block: Any
    feature: int
    before: tuple[int, ...]
    modulation: GateRows


class Mlps:
    """All of them, in the order they run in.

    Args:
        adapter: of the transformer: what is recorded of it.

    Raises:
        ValueError: the double blocks of the transformer are not known.
    """

    def __init__(self, adapter: ModuleAdapter) -> None:
        self.family: Family = find_family(adapter.module)
        self.all: list[Mlp] = []
        features: dict[Any, list[int]] = {}  # module → in which features its outputs are
        for output in adapter.outputs():
            features.setdefault(output.module, []).extend(feature for feature, _ in output.features)
        blocks = double_blocks(adapter.module)
        of_blocks = [
            [feature for module in block.modules() for feature in features.get(module, ())]
            for block in blocks
        ]
        found = [feature for own in of_blocks for feature in own]
        # what image prompts add in all blocks is in one feature: nobody knows what one block added
        self.shared = {feature for feature in found if found.count(feature) > 1}
        for block, own in zip(blocks, of_blocks, strict=True):
            [feature] = features[getattr(block, self.family.mlp)]
            before = tuple(sorted(set(own) - {feature} - self.shared))
            self.all.append(Mlp(block, feature, before, _modulation(self.family, block)))

    def present(self, missing: Sequence[int]) -> list[Mlp]:
        """Those of a form of call, some of whose features have no output: their blocks are left out."""
        return [mlp for mlp in self.all if mlp.feature not in missing]

    def on_rows(
        self, mlps: Sequence[Mlp], block_kwargs: Mapping[str, Any], like: Tensor
    ) -> list[Callable[[Tensor], Tensor]]:
        """What each of them makes of rows ``[batch, rows, channels]`` of its block's hidden state.

        Args:
            mlps: of those of the model.
            block_kwargs: the first block's arguments by name, at the current timestep.
            like: ``[batch, ..., channels]``, of the hidden state's dtype and device.
        """
        embed = self.family.embeddings([mlp.block for mlp in mlps], block_kwargs, like)
        return [_on_rows(self.family, mlp, one, like) for mlp, one in zip(mlps, embed, strict=True)]


def _modulation(family: Family, block: Any) -> GateRows:
    """The fourth and fifth of the vectors of a block, of which there are nine where it has two attentions."""
    parts = 9 if getattr(block, "use_dual_attention", False) else 6
    return GateRows(getattr(block, family.modulated), family.layer, (3, 4), parts)


def _on_rows(
    family: Family, mlp: Mlp, embed: Callable[[], Tensor], like: Tensor
) -> Callable[[Tensor], Tensor]:
    norm, module = getattr(mlp.block, family.norm), getattr(mlp.block, family.mlp)

    def run(rows: Tensor) -> Tensor:
        activated = embed()
        parts = like.new_empty(2, len(activated), like.shape[-1])
        mlp.modulation.write(activated, parts)
        shift, scale = parts[:, :, None]  # [B, 1, D] each
        value: Tensor = module(norm(rows) * (1 + scale) + shift)
        return value

    return run


def history_by_tokens(orders: Tensor, shape: torch.Size) -> Tensor:
    """``[K, features, slot]`` as ``[K, features, batch, tokens, channels]``, a view."""
    by_tokens: Tensor = orders[:, :, : shape.numel()].unflatten(-1, shape)
    return by_tokens
