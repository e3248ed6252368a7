"""Which columns a group of rows keeps: those that its rows look at most."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: Columns are kept in whole tiles of so many: what a program of the kernel works on at once.
TILE: Final = 64


def kept_columns(tokens: int, text: int, keep: float) -> int:
    """How many columns are kept: all of the text, and a share ``keep`` of the others, in whole tiles.

    Args:
        tokens: of the sequence.
        text: of them, at its beginning.
        keep: share of the others, in (0, 1].
    """
    wanted = text + max(1, round(keep * (tokens - text)))
    return min(tokens, -(-wanted // TILE) * TILE)


def top_columns(sums: Tensor, kept: int, text: int) -> Tensor:
    """The columns with the largest sums, in ascending order; of equal sums the first are taken.

    Args:
        sums: ``[..., tokens]``, as ``column_sums`` gives them.
        kept: how many.
        text: columns at the beginning that are taken in any case.

    Returns:
        ``[..., kept]``, int32.
    """
    tokens = sums.shape[-1]
    sums = sums.index_fill(-1, torch.arange(text, device=sums.device), torch.inf)
    least = sums.topk(kept, dim=-1).values.amin(-1, keepdim=True)
    # topk leaves open which of equals it takes, so they are told apart: larger than all that is left out,
    # or equal to the least that is kept, the first of those first
    place = torch.arange(tokens, device=sums.device, dtype=torch.int32)
    rank = torch.where(sums > least, 2 * tokens, torch.where(sums == least, tokens - place, 0))
    return rank.topk(kept, dim=-1).indices.sort(dim=-1).values.to(torch.int32)
