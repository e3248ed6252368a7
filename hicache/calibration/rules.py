"""A calibration in use: as a basis, and as a schedule.

Where a run is not what it was fitted to, the basis it was fitted from takes its place, and a warning says so.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hicache.basis import Basis, evaluate
from hicache.calibration.file import Calibration, Entry, Row
from hicache.calibration.reader import load, parse
from hicache.feature_rows import FeatureRows
from hicache.numbers import uploaded
from hicache.run import Position, Run
from hicache.schedule import Instead, Interval, Schedule, Steps


@dataclass(frozen=True)
class Fitted(Basis):
    """Rows of coefficients fitted to a model: ``basis="file.json"``.

    Args:
        calibration: the file's contents.
        entry: the part of it that holds for a run; None where none does, or none is chosen yet.
        fallback: why none does.
    """

    calibration: Calibration
    entry: Entry | None = None
    fallback: str | None = None

    reads_sigmas: ClassVar[bool] = True

    @classmethod
    def load(cls, path: str | Path) -> Fitted:
        """Read a file.

        Raises:
            CalibrationError: see :func:`~hicache.calibration.reader.load`.
        """
        return cls(load(path))

    def for_run(self, run: Run) -> Fitted:
        entries, reason = self.calibration.fitting(run)
        reasons = [entry.why_rows_not(run) for entry in entries]
        found = [entry for entry, why in zip(entries, reasons, strict=True) if why is None]
        if found:
            return replace(self, entry=found[0], fallback=None)
        why = reason or str(reasons[0])
        prior = f"{self.calibration.source} is not used, as {why}: {self.calibration.prior} is"
        return replace(self, entry=None, fallback=prior)

    @property
    def by_feature(self) -> bool:
        if self.entry is not None:
            return self.entry.features is not None
        return self.fallback is None and self.calibration.by_feature

    def coefficients(self, at: Position) -> Sequence[float]:
        """The row for a place, which serves all features; the prior's where there is none that does."""
        row = None if self.by_feature else self.row(at)
        return evaluate(self.calibration.prior, at) if row is None else cast("tuple[float, ...]", row)

    def for_features(self, layers: Sequence[str | None], device: torch.device) -> FittedRows:
        return FittedRows(self, len(layers), device)

    def row(self, at: Position) -> Row | None:
        """The row for a place; None where the context has other differences, as one that began late has."""
        entry = self.entry
        if entry is None:
            return None
        rows = entry.rows.get(at.context) if at.context else next(iter(entry.rows.values()), None)
        if rows is None or at.num_steps != entry.num_steps or len(rows.get(at.step, ())) != at.num_coeffs:
            return None
        past = [step for step in entry.full_steps if step < at.step]
        gaps = [new - old for old, new in itertools.pairwise(past)][::-1]
        same = past[-1] == at.last_full and tuple(gaps[: len(at.gaps)]) == tuple(at.gaps)
        return rows[at.step] if same else None

    def __str__(self) -> str:
        return f"fitted ({self.calibration.source})"

    def to_plain(self) -> dict[str, Any]:
        """For :mod:`hicache.plain_data`: the file's contents, so that nothing else need be kept."""
        return {"file": self.calibration.source, "text": self.calibration.text()}

    @classmethod
    def from_plain(cls, file: str, text: str) -> Fitted:
        """For :mod:`hicache.plain_data`."""
        return cls(parse(file, text))


class FittedRows(FeatureRows):
    """The rows of one context in one run, where features have rows of their own.

    Args:
        basis: settled for the run.
        features: of the context. Where those are others than rows were fitted to, all have the prior's.
        device: of the features.
    """

    def __init__(self, basis: Fitted, features: int, device: torch.device) -> None:
        self._basis, self._features, self._device = basis, features, device
        fitted = None if basis.entry is None else basis.entry.features
        self._fit = fitted == features
        if not self._fit:
            calibration = basis.calibration
            warnings.warn(
                f"hicache: {calibration.source} is not used, as it has rows for {fitted} features, not "
                f"{features}: {calibration.prior} is",
                RuntimeWarning,
                stacklevel=2,
            )

    def rows(self, places: Sequence[Position]) -> Tensor:
        return uploaded(torch.tensor([self._row(at) for at in places], dtype=torch.float64), self._device)

    def _row(self, at: Position) -> Sequence[Sequence[float]]:
        row = self._basis.row(at) if self._fit else None
        if row is not None:
            return cast("tuple[tuple[float, ...], ...]", row)
        prior = evaluate(self._basis.calibration.prior, at)
        return [[weight] * self._features for weight in prior]


@dataclass(frozen=True)
class FittedSteps(Schedule):
    """Full steps where a calibration has them: ``schedule="file.json"``.

    Args:
        calibration: the file's contents.
        count: full steps wanted: the places of the largest number up to it, none where that is more or fewer
            than the file has places for; 0 takes the file's first.
    """

    calibration: Calibration
    count: int = 0

    reads_sigmas: ClassVar[bool] = True

    @classmethod
    def load(cls, path: str | Path) -> FittedSteps:
        """Read a file.

        Raises:
            CalibrationError: see :func:`~hicache.calibration.reader.load`.
        """
        return cls(load(path))

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        return self.for_run(Run(num_steps)).is_full(step, last_full, num_steps)

    def for_run(self, run: Run) -> Schedule:
        entries, reason = self.calibration.fitting(run)
        if reason is None:
            if not self.count:
                return Steps(*entries[0].full_steps)
            places = sorted((entry.full_steps for entry in entries), key=len)
            few_enough = [one for one in places if len(one) <= self.count]
            if few_enough and self.count <= len(places[-1]):
                return Steps(*few_enough[-1])
            reason = f"it has no places for {self.count} full steps"
        first = self.calibration.entries[0]
        count = self.count or max(1, round(len(first.full_steps) / first.num_steps * (run.num_steps or 0)))
        taken = Interval().with_full_steps(count, run) if run.num_steps else Interval()
        why = f"{self.calibration.source} is not used, as {reason}: full steps are as in {taken}"
        return Instead(taken, why)

    def with_full_steps(self, count: int, run: Run) -> Schedule:
        return replace(self, count=count)

    def __str__(self) -> str:
        return f"fitted ({self.calibration.source})"

    def to_plain(self) -> dict[str, Any]:
        """For :mod:`hicache.plain_data`."""
        return {"file": self.calibration.source, "text": self.calibration.text(), "count": self.count}

    @classmethod
    def from_plain(cls, file: str, text: str, count: int) -> FittedSteps:
        """For :mod:`hicache.plain_data`."""
        return cls(parse(file, text), count)
