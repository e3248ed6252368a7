"""What is learned of a call's tokens: which are drawn, and how many neighbours share gates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hicache.adapters.base import ModuleAdapter
from hicache.runtime.finite import reading

_TOKEN_BY_TOKEN = "its gates differ from token to token (a timestep for every token)"


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a hidden state."""

    drawn: range  # those that reach the output: the first, the last, or all
    group: int | None = None  # how many neighbours share gates; None: all of a sample
    refusal: str | None = None  # why there are no such groups


def token_layout(
    adapter: ModuleAdapter | None, model_kwargs: Mapping[str, Any], shape: torch.Size
) -> TokenLayout:
    """The layout of a call's tokens; may read the device.

    Args:
        adapter: the family's; None: nothing is known of it, and all tokens are drawn.
        model_kwargs: the model's arguments by name.
        shape: of the hidden state that enters the first block; of tokens spread over several processes, those
            that this one has.

    Raises:
        ValueError: the adapter says of tokens in the middle, or of none, that they are drawn.
    """
    if adapter is None or len(shape) != 3:
        return TokenLayout(range(shape[1] if len(shape) > 1 else 0))
    tokens = shape[1]
    drawn = adapter.drawn(model_kwargs, tokens)
    ends = (range(len(drawn)), range(tokens - len(drawn), tokens))
    if not 0 < len(drawn) <= tokens or drawn not in ends:
        raise ValueError(
            f"hicache: expected {type(adapter).__name__}.drawn() to give a range of the first or the last of "
            f"{tokens} tokens, got {drawn!r}"
        )
    timesteps = adapter.token_timesteps(model_kwargs)
    if timesteps is None:
        return TokenLayout(drawn)
    if timesteps.shape != shape[:2]:
        return TokenLayout(drawn, refusal=_TOKEN_BY_TOKEN)
    group = _run_length(timesteps[:, drawn.start : drawn.stop])
    # as many gates as numbers of a feature are more to read than they are worth
    return TokenLayout(drawn, group) if group > 1 else TokenLayout(drawn, refusal=_TOKEN_BY_TOKEN)


def _run_length(timesteps: Tensor) -> int:
    """The longest length of which all runs of equal neighbours, in every sample, are multiples."""
    changes = (timesteps[:, 1:] != timesteps[:, :-1]).any(0).nonzero().flatten() + 1
    return math.gcd(timesteps.shape[1], *changes.tolist())


class GroupCheck:
    """Whether the tokens of a group still have one timestep, in one context. Never waits for a CUDA device.

    Asked at every skipped step; a CUDA device may answer at a later one.
    """

    def __init__(self) -> None:
        self._off: Tensor | None = None  # whether there was another timestep in a group, left on the device
        self._answer: Callable[[], bool | None] | None = None

    def holds(self, timesteps: Tensor, group: int) -> bool:
        """Whether nothing else is known of this step and those before it.

        Args:
            timesteps: of the drawn tokens, ``[batch, tokens]``.
            group: how many neighbours share gates.
        """
        if self._answer is not None and self._answer():
            warnings.warn(
                "hicache: the transformer was called with other timesteps for tokens that had the same: the "
                "last skipped steps gave some of them the gates of others; the next step runs in full",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        groups = timesteps.unflatten(1, (-1, group))
        off = (groups != groups[..., :1]).any()
        self._off = off if self._off is None else self._off.logical_or(off)
        self._answer = reading(self._off)
        return not self._answer()
