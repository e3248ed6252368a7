"""The history of a feature and its forecast, in the plain formulas of docs/algorithm.md.

Independent of :mod:`hicache.engine` and its kernels, which are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hicache.basis import evaluate
from hicache.config import HiCacheConfig
from hicache.run import Position

# at a place, the coefficients of the differences that exist
Weigh = Callable[[Position], Sequence[float]]


class History:
    """The finite differences of one feature in one context.

    Arithmetic is in fp32 (float64 for float64 histories), rounded to the history's dtype when it is stored.

    Args:
        config: the cache's settings.
    """

    def __init__(self, config: HiCacheConfig) -> None:
        self.config = config
        self.differences: list[Tensor] = []  # D_0, D_1, …: those that exist, of the feature's shape
        self.gaps: list[int] = []  # steps between the full steps behind the differences, newest first
        self.step = -1  # the last full one

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(difference.numel() * difference.element_size() for difference in self.differences)

    def record(self, step: int, feature: Tensor) -> None:
        """Take in the feature of a full step: the recursion of the differences.

        Args:
            step: ordinal of the full step, later than the last one.
            feature: of any shape and floating dtype, kept as it is; another shape, dtype or device than
                before starts anew.
        """
        config = self.config
        dtype = config.history_dtype or feature.dtype
        self.dtype = feature.dtype  # forecasts are given in it
        newest = feature.detach().to(dtype)  # D_0
        old, gap = self.differences, step - self.step
        if old and (old[0].shape, old[0].device, old[0].dtype) != (newest.shape, newest.device, dtype):
            old = []
        if step <= config.warmup - 2:  # before the last warm-up step no differences are taken
            old = []

        new = [_promoted(newest)]
        for i in range(min(len(old), config.order)):
            new.append((new[i] - _promoted(old[i])) / gap)  # D_{i+1}
        self.gaps = [gap, *self.gaps][: len(new) - 1]
        self.differences = [newest, *(difference.to(dtype) for difference in new[1:])]
        self.step = step

    def forecast(
        self, step: int, position: Callable[..., Position] = Position, weigh: Weigh | None = None
    ) -> Tensor:
        """``Σ_k α_k(x) · D_k`` at distance ``x = step - last full step``, in the feature's dtype.

        Args:
            step: ordinal of the skipped step.
            position: makes the place of the forecast, with what else is known of the run.
            weigh: gives the coefficients at a place; the basis does when None.
        """
        at = position(step, self.step, tuple(self.gaps), len(self.differences))
        alphas = evaluate(self.config.weighed_by, at) if weigh is None else weigh(at)
        total = alphas[0] * _promoted(self.differences[0])
        for alpha, difference in zip(alphas[1:], self.differences[1:], strict=True):
            total = total + alpha * _promoted(difference)
        return total.to(self.dtype)


class Feature:
    """What a submodule gives: a tensor, or a tuple of tensors and None, each tensor with its history.

    Args:
        config: the cache's settings.
    """

    def __init__(self, config: HiCacheConfig) -> None:
        self.config = config
        self._histories: dict[int, History] = {}  # by position in the tuple

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(history.nbytes for history in self._histories.values())

    @property
    def history(self) -> History:
        """Of the only tensor."""
        [history] = self._histories.values()
        return history

    def record(self, step: int, output: Tensor | tuple[Tensor | None, ...]) -> None:
        """Take in what the submodule gave at a full step, see :meth:`History.record`."""
        elements = (output,) if isinstance(output, Tensor) else output
        self._bare, self._length = isinstance(output, Tensor), len(elements)
        before, self._histories = self._histories, {}
        for position, element in enumerate(elements):
            if element is not None:
                history = before.get(position) or History(self.config)
                history.record(step, element)
                self._histories[position] = history

    @property
    def first_difference(self) -> Tensor | None:
        """D1 of the first tensor, where there is one."""
        held = self._histories[0].differences if 0 in self._histories else []
        return held[1] if len(held) > 1 else None

    def forecast(
        self, step: int, position: Callable[..., Position] = Position, weigh: Weigh | None = None
    ) -> Tensor | tuple[Tensor | None, ...]:
        """What the submodule would give at a skipped step, see :meth:`History.forecast`.

        Args:
            step: ordinal of the skipped step.
            position: makes the place of the forecast.
            weigh: gives the coefficients of the first tensor; the basis gives those of others.
        """
        made = {
            index: history.forecast(step, position, None if index else weigh)
            for index, history in self._histories.items()
        }
        return made[0] if self._bare else tuple(map(made.get, range(self._length)))


def _promoted(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
