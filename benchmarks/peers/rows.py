"""The table that is measured: a CSV that is written row by row, so that a run can go on where one ended."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Final

from benchmarks.common.tables import write_csv


@dataclass(frozen=True)
class Row:
    """A method at a setting. What was not measured, or cannot be, is None."""

    method: str
    package: str
    knob: str
    setting: float
    runs_blocks: bool
    note: str = ""  # why the method does not apply here
    pictures: int = 0
    full_steps: float | None = None  # all blocks run: mean over the pictures
    blocks_run: float | None = None  # of the weights of the full run's blocks, the share that was used
    psnr_mean: float | None = None  # dB
    psnr_worst: float | None = None
    ssim_mean: float | None = None
    ssim_worst: float | None = None
    lpips: float | None = None  # not measured: its weights are a download of their own
    skipped_operators: float | None = None  # of a skipped step, median
    full_operators: float | None = None  # of a step of the full run
    cache_bytes: int | None = None
    seconds: float | None = None  # of a loop, median
    full_seconds: float | None = None  # the uncached loop, in the same process
    speedup: float | None = None
    skipped_ms: float | None = None  # of a skipped step, median
    full_ms: float | None = None  # of a step of the full run
    device: str = ""
    driver: str = ""
    versions: str = ""

    @property
    def key(self) -> tuple[str, float]:
        return self.method, self.setting

    def done(self, pictures: int, timed: bool) -> bool:
        """Whether there is nothing left to measure: the method does not apply, or all of it was."""
        measured = self.pictures >= pictures and (self.seconds is not None or not timed)
        return bool(self.note) or measured


_READ: Final[dict[str, Any]] = {
    "str": str,
    "bool": lambda text: text == "True",
    "int": int,
    "float": float,
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
}


def read(path: Path) -> dict[tuple[str, float], Row]:
    """Read a table; an empty one where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = {field.name: _READ[str(field.type)] for field in fields(Row)}
    found = [Row(**{name: kinds[name](text) for name, text in line.items()}) for line in lines]
    return {row.key: row for row in found}


def write(path: Path, rows: Iterable[Row], order: Iterable[str]) -> None:
    """Write a table, methods in an order; a run that ends here leaves the old one.

    Rows of methods that are not in the order are those of a method that was taken out: they go.
    """
    place = {name: index for index, name in enumerate(order)}
    kept = sorted(
        (row for row in rows if row.method in place), key=lambda row: (place[row.method], row.setting)
    )
    new = path.with_suffix(".new")
    write_csv(new, [field.name for field in fields(Row)], [astuple(row) for row in kept])
    new.replace(path)
