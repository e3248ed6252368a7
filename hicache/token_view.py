"""Which tokens of a hidden state are recorded and forecast, and which of them share gates.

Editing models work on the tokens of the picture drawn and of pictures given, one after the other; only the
drawn ones reach the output. A video model may have another timestep, and so other gates, in every frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hicache import compat


@dataclass(frozen=True)
class TokenView:
    """How the features of a call see its hidden state.

    Its tensors have no memory: only their sizes are read, which torch.compile may leave open.

    Args:
        whole: ``[batch, tokens, channels]``, the hidden state.
        part: ``[batch, drawn tokens, channels]``; None where all are drawn.
        groups: ``[batch · groups, tokens of a group, channels]``, the drawn tokens by groups of neighbours
            that share gates; None where all of a sample do.
        first: whether the drawn tokens are the first; else they are the last.
    """

    whole: Tensor
    part: Tensor | None = None
    groups: Tensor | None = None
    first: bool = True

    @classmethod
    def of(cls, hidden: Tensor, drawn: range, group: int | None) -> TokenView | None:
        """The view of a hidden state ``[batch, tokens, channels]``; None where there is nothing to view.

        Args:
            hidden: the hidden state.
            drawn: its drawn tokens: its first, its last, or all.
            group: how many neighbours share gates, of which the drawn tokens are a multiple; None: all.
        """
        batch, tokens, channels = hidden.shape
        count = len(drawn)
        grouped = group is not None and group != count
        if count == tokens and not grouped:
            return None
        return cls(
            _size(hidden, hidden.shape),
            None if count == tokens else _size(hidden, (batch, count, channels)),
            _size(hidden, (batch * count // group, group, channels)) if group and grouped else None,
            drawn.start == 0,
        )

    @property
    def ungrouped(self) -> TokenView | None:
        """The same for features without gates; None where there is nothing to view."""
        return None if self.part is None else replace(self, groups=None)

    def drawn(self, hidden: Tensor) -> Tensor:
        """The drawn tokens of ``[batch, tokens, channels]``, a view."""
        if self.part is None:
            return hidden
        count = self.part.shape[1]
        return hidden[:, :count] if self.first else hidden[:, hidden.shape[1] - count :]

    def grouped(self, drawn: Tensor) -> Tensor:
        """Drawn tokens as a sum sees them: every sample, or every group, with gates of its own."""
        return drawn if self.groups is None else drawn.reshape(self.groups.shape)

    def filled(self, base: Tensor, made: Tensor) -> Tensor:
        """A hidden state of base's shape: ``made`` in the place of its drawn tokens, the others base's."""
        if self.part is None:
            return made.view(base.shape)
        drawn, count = made if self.groups is None else made.view(self.part.shape), self.part.shape[1]
        if self.first:
            return torch.cat([drawn, base[:, count:]], dim=1)
        return torch.cat([base[:, : base.shape[1] - count], drawn], dim=1)

    def of_any_size(self) -> TokenView:
        """The same view for torch.compile, which makes one graph of it whatever the picture's size."""
        sizes = compat.of_any_size((self.whole, self.part, self.groups))
        return replace(self, **dict(zip(("whole", "part", "groups"), sizes, strict=True)))

    @property
    def form(self) -> tuple[Any, ...]:
        """What must be equal for a CUDA graph to serve."""
        sizes = [None if size is None else size.shape for size in (self.whole, self.part, self.groups)]
        return (*sizes, self.first)


def _size(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty((), dtype=like.dtype, device=like.device).expand(tuple(shape))
