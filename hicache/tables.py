"""Places of the full steps that others found for well-known models. Not measured here.

They were found for reuse of the whole stack's residual, by search over pictures and videos of these models at
50 steps: BudCache (ICML 2026), MeanCache (ICLR 2026) and the study of golden paths (2026) that compares them.
All have most full steps at the start, where their shifted schedulers have most of the noise; that depends on
the shift, so other numbers of steps are matched by noise level, never by ordinal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from hicache.checks import check_whole
from hicache.run import Run
from hicache.schedule import Instead, Interval, Schedule, Steps

STEPS: Final = 50  # of the runs that the places were found in


@dataclass(frozen=True)
class _Model:
    """What was found for one model."""

    what: str  # the model and its settings
    shift: float  # s of the scheduler: σ = s t / (1 + (s - 1) t)
    places: tuple[tuple[int, ...], ...]
    terminal: float | None = None  # the last noise level, where the scheduler stretches them to one

    def sigmas(self) -> list[float]:
        """The noise levels of the runs that the places were found in."""
        times = [1 - step / STEPS for step in range(STEPS)]
        shifted = [self.shift * t / (1 + (self.shift - 1) * t) for t in times]
        if self.terminal is None:
            return shifted
        stretch = (1 - shifted[-1]) / (1 - self.terminal)
        return [1 - (1 - sigma) / stretch for sigma in shifted]


def _places(start: int, *others: int) -> tuple[int, ...]:
    return (*range(start), *others)


TABLES: Final[Mapping[str, _Model]] = {
    "flux-dev": _Model(
        "FLUX.1-dev, 1024 x 1024, guidance 3.5",
        shift=3.158,  # e^1.15
        places=(
            _places(3, 4, 6, 11, 24, 41, 49),
            _places(6, 7, 8, 11, 15, 23, 39, 49),
            _places(12, 13, 14, 16, 19, 23, 29, 37, 45, 49),
        ),
    ),
    "qwen-image": _Model(
        "Qwen-Image, 1328 x 1328, guidance 4",
        shift=2.303,  # e^0.834
        terminal=0.02,
        places=(
            _places(3, 4, 6, 9, 17, 31, 49),
            _places(7, 8, 11, 14, 22, 35, 49),
            _places(11, 12, 14, 16, 19, 22, 26, 33, 40, 46, 49),
        ),
    ),
    "hunyuan-video": _Model(
        "HunyuanVideo, 640 x 480",
        shift=7.0,
        places=(_places(5, 8, 19, 34, 49), _places(7, 8, 11, 16, 26, 39, 49)),
    ),
    "wan": _Model(
        "Wan 2.1 1.3B, UniPC, shift 5",
        shift=5.0,
        places=(
            _places(7, 8, 12, 18, 27, 38, 49),
            _places(12, 13, 16, 19, 23, 28, 33, 39, 45, 49),
        ),
    ),
}


@dataclass(frozen=True)
class Table(Schedule):
    """The places found for a model (:data:`TABLES`), by name: ``HiCacheConfig(schedule="flux-dev")``.

    A run of 50 steps has them as they are. Another one whose scheduler tells its noise levels has the steps
    that are nearest to them in noise level, its first three and its last one; without noise levels it has the
    interval with as many full steps, and a warning.

    Args:
        name: of the table.
        count: full steps wanted: the places of the largest number up to it, else of the smallest.

    Raises:
        ValueError: no such table.
    """

    name: str
    count: int = 0

    reads_sigmas: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise ValueError(f"Table: expected one of {', '.join(TABLES)}, got {self.name!r}")
        check_whole("Table.count", self.count, 0)

    @property
    def places(self) -> tuple[int, ...]:
        """The places of a run of 50 steps."""
        found = TABLES[self.name].places
        return max((one for one in found if len(one) <= self.count), key=len, default=min(found, key=len))

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        return self.for_run(Run(num_steps)).is_full(step, last_full, num_steps)

    def for_run(self, run: Run) -> Schedule:
        if run.num_steps == STEPS:
            return Steps(*self.places)
        if run.num_steps is None or run.sigmas is None:
            count = round(len(self.places) / STEPS * (run.num_steps or STEPS))
            taken = Interval().with_full_steps(max(1, count), replace(run, num_steps=run.num_steps or STEPS))
            why = f"schedule={self.name!r} is for {STEPS} steps, and this scheduler tells no noise levels"
            return Instead(taken, f"{why}: full steps are as in {taken}")
        known, sigmas = TABLES[self.name].sigmas(), run.sigmas[: run.num_steps]
        nearest = {
            min(range(run.num_steps), key=lambda step: abs(sigmas[step] - known[place]))
            for place in self.places
        }
        return Steps(*sorted({*nearest, *range(min(3, run.num_steps)), run.num_steps - 1}))

    def with_full_steps(self, count: int, run: Run) -> Schedule:
        return replace(self, count=count)
