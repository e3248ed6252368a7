"""Whether what a full step recorded makes what the blocks made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Unfit(Exception):
    """What a full step recorded cannot stand for the blocks; the message says why."""


class NotFinite(Exception):
    """A full step made numbers that nothing can be told from."""


def check_sum(
    base: Tensor, hidden: Tensor, features: Sequence[Tensor], gates: Tensor, between: Sequence[Tensor]
) -> None:
    """Checks that base + Σ gate ⊙ feature, and what is added between the blocks, is what those made.

    Args:
        base: ``[batch, tokens, channels]``, what enters the blocks.
        hidden: of base's shape, what leaves them.
        features: of base's shape each.
        gates: ``[features, batch, channels]``.
        between: of base's shape each.

    Raises:
        Unfit: it is not.
        NotFinite: what the blocks made is NaN or infinite: it may still be.
    """
    accumulated = torch.promote_types(base.dtype, torch.float32)
    total = base.to(accumulated)
    for feature, gate in zip(features, gates[:, :, None], strict=True):  # [batch, 1, channels] each
        total = total + feature.to(accumulated) * gate
    for residual in between:
        total = total + residual
    # a model of low precision rounds after every block, this sum once; such a history rounds features
    lowest = min((base.dtype, features[0].dtype), key=lambda dtype: dtype.itemsize)
    allowed = 0.1 if lowest.itemsize < 4 else 1e-3
    off, moved = (total - hidden).norm().item(), (hidden.to(accumulated) - base).norm().item()
    rounding = 8 * torch.finfo(lowest).eps * total.norm().item()
    if not math.isfinite(moved):
        raise NotFinite
    if not off <= allowed * moved + rounding:
        raise Unfit(
            f"does not add gate · feature of its modules alone (off by {off:.3g} of {moved:.3g}): is one of "
            "its blocks or attention processors not its own?"
        )
