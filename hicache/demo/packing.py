"""Pictures ↔ the token sequences of the bundled model."""

from __future__ import annotations

from typing import Final

import torch

PICTURE_SIZE: Final = 32  # pixels a side
PATCH: Final = 4  # pixels a side of one token
CHANNELS: Final = 3 * PATCH * PATCH  # numbers in one token


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """``[batch, 3, height, width]`` → tokens ``[batch, height/4 · width/4, 48]``, row by row."""
    b, c, h, w = pictures.shape
    grid = pictures.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of :func:`pack`: ``[batch, tokens, 48]`` → ``[batch, 3, height, width]``."""
    grid = tokens.reshape(len(tokens), height // PATCH, width // PATCH, 3, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), 3, height, width)


def position_ids(height: int, width: int) -> torch.Tensor:
    """FLUX's rotary positions ``(0, row, column)`` of each token: float32 ``[tokens, 3]``."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros(len(grid), 1), grid], dim=1)
