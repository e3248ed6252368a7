"""Which tokens are those of the picture drawn, in models that are also given pictures."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hicache import compat


class ByIds:
    """The tokens drawn, by position ids whose first column is the place in time: zero for the picture drawn.

    That one is first. Reads the device: once where calls are given the same ids, as those of a step are.

    Args:
        given: whether a place in time is one of those that given pictures have.
    """

    def __init__(self, given: Callable[[Tensor], Tensor]) -> None:
        self._given = given
        # ids, how often they had been written to, the tokens drawn
        self._last: tuple[weakref.ref[Tensor], int, range] | None = None

    def __call__(self, ids: Any, tokens: int) -> range:
        """The tokens drawn of ``tokens``; all of them where the ids are anything else.

        Args:
            ids: ``[tokens, axes]`` or ``[batch, tokens, axes]``.
            tokens: of the hidden state.
        """
        if not isinstance(ids, Tensor) or ids.ndim not in (2, 3) or ids.shape[-2] != tokens:
            return range(tokens)
        last, writes = self._last, compat.write_count(ids)
        if last is not None and last[0]() is ids and last[1] == writes:
            return last[2]
        drawn = self._read(ids[..., 0].reshape(-1, tokens).cpu(), tokens)
        self._last = None if writes is None else (weakref.ref(ids), writes, drawn)
        return drawn

    def _read(self, times: Tensor, tokens: int) -> range:
        count = int((times[0] == 0).sum())
        before, after = times[:, :count], times[:, count:]
        if count and count < tokens and bool((before == 0).all()) and bool(self._given(after).all()):
            return range(count)
        return range(tokens)


def by_shapes(shapes: Any, tokens: int, layered: bool) -> range:
    """Of Qwen-Image's ``img_shapes``: (frames, height, width) in tokens, of every picture of every sample.

    Args:
        shapes: of all samples.
        tokens: of the hidden state.
        layered: whether the last picture is given and the others are drawn; else the first is drawn and the
            others are given.

    Returns:
        All tokens where they are anything else.
    """
    first = shapes[0] if isinstance(shapes, (list, tuple)) and shapes else None
    if not isinstance(first, (list, tuple)) or not all(map(_is_shape, first)):
        return range(tokens)
    sizes = [math.prod(shape) for shape in first]
    drawn = sum(sizes[:-1] if layered else sizes[:1])
    if sum(sizes) != tokens or drawn < 1 or any(sample != first for sample in shapes):
        return range(tokens)
    return range(drawn)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, Sequence) and len(shape) == 3 and all(isinstance(size, int) for size in shape)
