"""What a user chooses about the cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from hicache.basis import Basis, Hermite, Named, ScaledTaylor, Taylor, get_basis
from hicache.calibration.file import FORMAT, Calibration
from hicache.calibration.reader import parse
from hicache.calibration.rules import Fitted, FittedSteps
from hicache.checks import check_positive, check_whole
from hicache.plain_data import from_plain, to_plain
from hicache.run import Run
from hicache.schedule import Geometric, Interval, Schedule, full_steps
from hicache.tables import TABLES, Table

HISTORY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_ORDER = 4  # the kernels are compiled for up to five orders of differences
# bases that are imported when they are asked for → where they are
ELSEWHERE: Final = {"AnalyticHermite": "hicache.companions.analytic"}
SCHEDULES: Final = ("uniform", "geometric", *TABLES)  # by name


@dataclass(frozen=True)
class HiCacheConfig:
    """How often the transformer runs and how the steps between are forecast.

    The defaults are the paper's for FLUX.1-dev: 50 steps make 9 full ones.

    Args:
        interval: N: of N steps, one is full. 1 means that nothing is skipped. Of no use with another
            ``schedule``.
        order: O, highest finite difference kept, 0 … 4.
        sigma: contraction σ of the dual scaling of a basis given by name, > 0 (0.5 for FLUX.1-dev, 0.3 for
            schnell).
        warmup: w >= 1: the first w steps are full ("first enhance" upstream), and no differences are taken
            before the last of them. Another ``schedule`` has its own full steps.
        basis: ``"hermite"``, ``"taylor"``, ``"scaled_taylor"``, ``"reuse"``, one of
            :func:`hicache.register_basis`, the path of a calibration (``"….json"``), or a
            :class:`hicache.Basis`.
        schedule: which steps are full: None or ``"uniform"`` is the interval; ``"geometric"``; the name of a
            table of :mod:`hicache.tables`; the path of a calibration; or a :class:`hicache.Schedule`.
        last_step_full: run the transformer at the last step too, whatever the interval says.
        history_dtype: dtype the differences are kept in; None keeps the features' own, ``torch.float32``
            costs twice the memory of bf16 and loses no digits in the differences.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range, an unknown basis or schedule, or a calibration that cannot be read.
    """

    interval: int = 7
    order: int = 2
    sigma: float = 0.5
    warmup: int = 3
    basis: str | Basis = "hermite"
    schedule: str | Schedule | None = None
    last_step_full: bool = False
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._whole("interval", 1, None)
        self._whole("order", 0, MAX_ORDER)
        self._whole("warmup", 1, None)
        check_positive("HiCacheConfig.sigma", self.sigma)
        object.__setattr__(self, "sigma", float(self.sigma))  # NumPy's numbers become Python's
        if not isinstance(self.basis, (str, Basis)):
            raise TypeError(
                f"HiCacheConfig.basis: expected the name of a basis or a Basis, got {self.basis!r}"
            )
        if isinstance(self.basis, str) and self.basis.endswith(".json"):
            object.__setattr__(self, "basis", Fitted.load(self.basis))
        elif isinstance(self.basis, str):
            get_basis(self.basis)
        self._check_schedule()
        if not isinstance(self.last_step_full, bool):
            raise TypeError(
                f"HiCacheConfig.last_step_full: expected True or False, got {self.last_step_full!r}"
            )
        dtype = self.history_dtype
        if dtype is not None and dtype not in HISTORY_DTYPES:
            names = ", ".join(str(known) for known in HISTORY_DTYPES)
            raise TypeError(f"HiCacheConfig.history_dtype: expected {names} or None, got {dtype!r}")

    def _whole(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        check_whole(f"HiCacheConfig.{name}", value, low, high)
        object.__setattr__(self, name, int(value))

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule is not None and not isinstance(schedule, (str, Schedule)):
            raise TypeError(f"HiCacheConfig.schedule: expected a name, a Schedule or None, got {schedule!r}")
        if isinstance(schedule, str) and schedule.endswith(".json"):
            object.__setattr__(self, "schedule", FittedSteps.load(schedule))
        elif isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; known schedules: {', '.join(SCHEDULES)}")

    @cached_property
    def places_by(self) -> Schedule:
        """What says which steps are full."""
        if isinstance(self.schedule, Schedule):
            return self.schedule
        if self._uniform:
            return Interval(self.interval, self.warmup, self.last_step_full)
        if self.schedule == "geometric":
            return Geometric(max(9, self.warmup + 1), self.warmup)
        assert self.schedule is not None
        return Table(self.schedule)

    @cached_property
    def weighed_by(self) -> Basis:
        """What says how differences are weighed.

        The paper's bases are taken to the letter with the paper's schedule; with others, whose gaps may
        shrink, orders that would overshoot are left out (:class:`hicache.Hermite`).
        """
        if isinstance(self.basis, Basis):
            return self.basis
        named = Named(self.basis, self.sigma)
        if self._uniform:
            return named
        careful = {
            "hermite": Hermite(self.sigma),
            "scaled_taylor": ScaledTaylor(self.sigma),
            "taylor": Taylor(),
        }
        return careful.get(self.basis, named)

    @property
    def _uniform(self) -> bool:
        return self.schedule in (None, "uniform") or isinstance(self.schedule, Interval)

    @property
    def fitted_by(self) -> str | None:
        """What was cached as the basis was fitted, where it was."""
        return self.basis.calibration.granularity if isinstance(self.basis, Fitted) else None

    @property
    def by_feature(self) -> bool:
        """Whether features have rows of their own."""
        return self.weighed_by.by_feature

    @property
    def reads_sigmas(self) -> bool:
        """Whether the scheduler's noise levels matter."""
        return self.weighed_by.reads_sigmas or self.places_by.reads_sigmas

    @property
    def fallbacks(self) -> list[str]:
        """Why what was asked for is not used in this run, where it is not."""
        found = [self.places_by.fallback, self.weighed_by.fallback]
        return list(dict.fromkeys(reason for reason in found if reason is not None))

    def with_schedule(self, schedule: Schedule) -> HiCacheConfig:
        """The same settings with another schedule."""
        if isinstance(schedule, Interval) and not isinstance(self.schedule, Interval) and self._uniform:
            return replace(self, interval=schedule.interval)
        return replace(self, schedule=schedule)

    def for_run(self, run: Run) -> HiCacheConfig:
        """The settings of a run: itself, unless its basis or its schedule depends on the run."""
        schedule, config = self.places_by.for_run(run), self
        if schedule is not self.places_by:
            config = replace(config, schedule=schedule, basis=self.weighed_by)
        places = None if run.num_steps is None else tuple(full_steps(config, run.num_steps))
        basis = config.weighed_by.for_run(
            replace(run, full_steps=places, order=self.order, warmup=self.warmup)
        )
        return config if basis is config.weighed_by else replace(config, basis=basis)

    def to_json(self) -> str:
        """The settings as JSON, with all that bases and schedules are made of.

        Raises:
            TypeError: a basis or a schedule of your own that is neither a dataclass nor has ``to_plain()``.
        """
        return json.dumps({field.name: _plain(getattr(self, field.name)) for field in fields(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HiCacheConfig:
        """What :meth:`to_json` made.

        Raises:
            ValueError: it is none, or has settings that are not known.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"HiCacheConfig: line {error.lineno}: not JSON: {error.msg}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or not data.keys() <= names:
            got = ", ".join(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"HiCacheConfig: expected settings of {', '.join(sorted(names))}, got {got}")
        return cls(**{name: _from_plain(name, value) for name, value in data.items()})

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HiCacheConfig:
        """Read what :meth:`save` wrote, or a calibration: its rows, its full steps, its order and warm-up.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is neither, or damaged.
        """
        path = Path(path)
        text = path.read_text(encoding="utf-8")
        if FORMAT not in text[:200]:
            return cls.from_json(text)
        return cls.of(parse(path.name, text))

    @classmethod
    def of(cls, calibration: Calibration, full_steps: int = 0) -> HiCacheConfig:
        """A calibration's rows, full steps, order and warm-up.

        Args:
            calibration: what was fitted.
            full_steps: how many are wanted, see :class:`FittedSteps`.
        """
        first = calibration.entries[0]
        return cls(
            order=first.order,
            warmup=first.warmup,
            basis=Fitted(calibration),
            schedule=FittedSteps(calibration, full_steps),
        )

    def fitted_in(self, calibrations: Iterable[Calibration], num_steps: int) -> HiCacheConfig | None:
        """Rows and places for as many full steps as these settings make; None: there are none.

        Args:
            calibrations: what was fitted, the preferred first.
            num_steps: of a run.
        """
        count = len(full_steps(self, num_steps))
        for calibration in calibrations:
            if count in calibration.counts(num_steps):
                return replace(HiCacheConfig.of(calibration, count), interval=self.interval)
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, (Basis, Schedule)):
        return to_plain(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _from_plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        base: type[Any] = Basis if name == "basis" else Schedule
        return from_plain(value, base, f"HiCacheConfig.{name}", ELSEWHERE)
    if name == "history_dtype" and value is not None:
        return {str(dtype).removeprefix("torch."): dtype for dtype in HISTORY_DTYPES}.get(value, value)
    return value
