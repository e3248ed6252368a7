"""What the calls of one context have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hicache.runtime.token_layout import TokenLayout
from hicache.token_view import TokenView


@dataclass
class CallForm:
    """What the calls of one context have in common, learned from the first."""

    entered: torch.Size  # shape of the hidden state that enters the first block, [batch, tokens, channels]
    shape: torch.Size  # of a feature: the drawn tokens of it
    dtype: torch.dtype
    device: torch.device
    layout: TokenLayout
    view: TokenView | None  # None: all tokens are drawn, and share the gates of their sample
    num_features: int = 0  # by module; 0 where nobody knows the modules
    refusal: str | None = None  # why they cannot be cached by module
    block_kwargs: dict[str, Any] = field(default_factory=dict)  # of the first block, no hidden states
    missing: tuple[int, ...] = ()  # features without an output
    embeds_ahead: bool = False  # whether the embedding of a timestep comes out as computed ahead
    ones: int = 0  # features after the family's, with gates of one: what a ControlNet adds

    @classmethod
    def of(cls, hidden: Tensor, layout: TokenLayout) -> CallForm:
        """The form of a call whose tokens are laid out like this."""
        view = None if hidden.ndim != 3 else TokenView.of(hidden, layout.drawn, layout.group)
        shape = hidden.shape if view is None else view.drawn(hidden).shape
        return cls(hidden.shape, shape, hidden.dtype, hidden.device, layout, view)

    @property
    def num_outputs(self) -> int:
        """Features of the family's modules: without what a ControlNet adds."""
        return self.num_features - self.ones

    def like(self) -> Tensor:
        """Something ``[batch, 1, channels]`` of the hidden state's dtype and device, without memory."""
        nothing = torch.empty((), dtype=self.dtype, device=self.device)
        return nothing.expand(self.shape[0], 1, self.shape[-1])
