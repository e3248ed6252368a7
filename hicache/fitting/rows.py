"""Rows that are being fitted, and the rules that run a pipeline by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hicache.basis import Basis, evaluate
from hicache.config import HiCacheConfig
from hicache.differences import positions
from hicache.run import Position
from hicache.schedule import full_steps
from hicache.snapshots import differences_of_snapshots


@dataclass(frozen=True)
class Layout:
    """Which steps of a run are full, what each skipped one has to forecast from, and the form of its row.

    A row is ``[num_coeffs]``, for all features, or ``[num_coeffs, features]``.
    """

    num_steps: int
    order: int
    warmup: int
    full_steps: tuple[int, ...]
    positions: Mapping[int, Position]  # of the skipped steps
    features: int | None = None  # that have rows of their own; None: one row serves all

    @classmethod
    def of(cls, config: HiCacheConfig, num_steps: int, features: int | None = None) -> Layout:
        """That of a config's schedule."""
        places = tuple(full_steps(config, num_steps))
        return cls(num_steps, config.order, config.warmup, places, positions(config, num_steps), features)

    def row(self, basis: Basis, step: int) -> Tensor:
        """A basis's coefficients at a skipped step, float64."""
        return self._for_all(torch.tensor(evaluate(basis, self.positions[step]), dtype=torch.float64))

    def scale(self, step: int) -> Tensor:
        """How much a change of each coefficient matters: by the distance, as in Taylor's polynomial."""
        at = self.positions[step]
        scales = [at.distance**k / math.factorial(k) for k in range(at.num_coeffs)]
        return self._for_all(torch.tensor(scales).double())

    def _for_all(self, row: Tensor) -> Tensor:
        return row if self.features is None else row[:, None].repeat(1, self.features)


@dataclass
class ByRows:
    """Forecasts by rows of coefficients (:class:`hicache.fitting.replay.Rule`).

    Args:
        layout: the full steps.
        row: coefficients of a context at a skipped step, of the layout's form.
    """

    layout: Layout
    row: Callable[[str, int], Tensor]
    _snapshots: dict[str, list[Tensor]] = field(default_factory=dict)

    def is_full(self, step: int) -> bool:
        return step in self.layout.full_steps

    def record(self, context: str, step: int, feature: Tensor) -> None:
        self._snapshots[context] = [feature, *self._snapshots.get(context, [])][: self.layout.order + 1]

    def forecast(self, context: str, step: int) -> Tensor:
        """``Σ_j w_j F_j`` with ``w = Mᵀ α``."""
        snapshots = self.snapshots(context, step)
        weights = differences_of_snapshots(self.layout.positions[step].gaps).T @ self.row(context, step)
        terms = [
            weight.to(snapshot.device, snapshot.dtype).view(-1, *[1] * (snapshot.ndim - 1)) * snapshot
            for weight, snapshot in zip(weights, snapshots, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def snapshots(self, context: str, step: int) -> list[Tensor]:
        """What a skipped step forecasts from, newest first."""
        return self._snapshots[context][: self.layout.positions[step].num_coeffs]


class InFull:
    """Every step is full (:class:`hicache.fitting.replay.Rule`); features go to whoever asks for them."""

    def __init__(self, take: Callable[[str, int, Tensor], None] | None = None) -> None:
        self._take = take

    def is_full(self, step: int) -> bool:
        return True

    def record(self, context: str, step: int, feature: Tensor) -> None:
        if self._take is not None:
            self._take(context, step, feature)

    def forecast(self, context: str, step: int) -> Tensor:
        raise AssertionError("no step is skipped")
