"""An order of tokens in which neighbours in the picture are neighbours in the sequence.

Rows of a group share their columns, so they had better look at the same: a square of a picture does, a line
of it less so. Squares of 8 × 8 tokens, in each squares of 4 × 4 (Chipmunk, arXiv 2506.03275). Attention is
the same in any order of its rows.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_SQUARE: Final = 8
_PART: Final = 4
_SIDE: Final = 1 << 16  # more than the squares of a side


def square_order(positions: Tensor) -> Tensor:
    """Where the tokens of a picture or a video come from, square by square. Never waits for the device.

    Args:
        positions: ``[tokens, 3]``: frame, row and column of every token, whole numbers of any dtype.

    Returns:
        ``[tokens]``, int64: ``tokens[order]`` has them in this order, ``order.argsort()`` undoes it.
    """
    frame, row, column = positions.long().unbind(-1)
    key = (frame * _SIDE + row // _SQUARE) * _SIDE + column // _SQUARE
    for size in (_PART, 1):
        side = _SQUARE // _PART if size == _PART else _PART
        key = (key * side + row // size % side) * side + column // size % side
    return key.argsort(stable=True)


def grid_positions(frames: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """The positions of tokens that lie frame by frame, row by row: ``[frames · rows · columns, 3]``."""
    axes = [torch.arange(size, device=device) for size in (frames, rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
