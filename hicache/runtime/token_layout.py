"""What is learned of a call's tokens: which are drawn, and how many neighbours share gates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.runtime.reading import reading

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
    changes = (timesteps[:, 1:] != timesteps[:, :-1]).any(0).cpu().nonzero().flatten() + 1
    return math.gcd(timesteps.shape[1], *changes.tolist())


class LayoutCheck:
    """Whether the tokens of a context are still laid out as they were learned. Never waits for a CUDA device.

    Asked at every call; a CUDA device may answer at a later one.

    Args:
        adapter: the family's.
        layout: as learned.
        model_kwargs: the model's arguments that it was learned from.
    """

    def __init__(self, adapter: ModuleAdapter, layout: TokenLayout, model_kwargs: Mapping[str, Any]) -> None:
        self._adapter = adapter
        self._layout = layout
        # held, so that no others take their addresses; copied, as they may be made anew, or written to
        given = {name: model_kwargs.get(name) for name in adapter.drawn_arguments}
        self._kept = {
            name: (value, compat.write_count(value), value.detach().clone())
            for name, value in given.items()
            if isinstance(value, Tensor)
        }
        self._same: Tensor | None = None  # whether all was laid out as learned, left on the device
        self._answer: Callable[[], bool | None] | None = None

    def holds(self, model_kwargs: Mapping[str, Any], gated: bool) -> bool:
        """Whether nothing else is known of this call and those before it.

        Args:
            model_kwargs: the model's arguments.
            gated: whether tokens that share gates have to have one timestep.
        """
        if self._answer is not None and self._answer() is False:
            warnings.warn(
                "hicache: the transformer was called with positions or timesteps of tokens that are not "
                "those of the last full step, and some tokens were forecast as others; this step runs in "
                "full",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        found = [*self._same_pictures(model_kwargs), *(self._same_groups(model_kwargs) if gated else ())]
        if not found:
            return True
        for same in found:
            self._same = same if self._same is None else self._same.logical_and(same.to(self._same.device))
        assert self._same is not None
        self._answer = reading(self._same)
        return self._answer() is not False

    def _same_pictures(self, model_kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """Whether an argument has the same numbers, where it is another tensor or was written to."""
        for name, (kept, writes, numbers) in self._kept.items():
            value = model_kwargs[name]
            if value is not kept or writes is None or compat.write_count(value) != writes:
                yield (value == numbers).all()

    def _same_groups(self, model_kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """Whether the tokens of a group have one timestep."""
        drawn, group = self._layout.drawn, self._layout.group
        timesteps = None if group is None else self._adapter.token_timesteps(model_kwargs)
        if group is not None and timesteps is not None:
            groups = timesteps[:, drawn.start : drawn.stop].unflatten(1, (-1, group))
            yield (groups == groups[..., :1]).all()


def layout_check(
    adapter: ModuleAdapter | None, layout: TokenLayout, model_kwargs: Mapping[str, Any], shape: torch.Size
) -> LayoutCheck | None:
    """What looks out for another layout; None where any other would be served as well.

    Args:
        adapter: the family's.
        layout: as learned.
        model_kwargs: the model's arguments that it was learned from.
        shape: of the hidden state.
    """
    if adapter is None or (layout.group is None and len(layout.drawn) == shape[1]):
        return None
    return LayoutCheck(adapter, layout, model_kwargs)
