"""The contents of a calibration file.

It says what it holds for: model, steps, noise levels, guidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hicache.basis import Basis
from hicache.model_key import ModelKey
from hicache.plain_data import to_plain
from hicache.run import Run

FORMAT: Final = "hicache calibration"
VERSION: Final = 1
_SIGMAS_EQUAL: Final = 1e-3  # of the highest: schedulers of other dtypes differ by less

Row = tuple[float, ...] | tuple[tuple[float, ...], ...]  # [num_coeffs], or [num_coeffs, features]
Rows = Mapping[str, Mapping[int, Row]]  # context → skipped step → coefficients


@dataclass(frozen=True)
class Entry:
    """What was fitted for one number of steps and one choice of full ones."""

    num_steps: int
    order: int  # highest difference that rows weigh
    warmup: int  # see HiCacheConfig
    full_steps: tuple[int, ...]
    rows: Rows = field(hash=False)
    sigmas: tuple[float, ...] | None = None
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)  # on prompts it was not fitted to

    @property
    def features(self) -> int | None:
        """How many features have rows of their own; None: a row serves all."""
        rows = (row for own in self.rows.values() for row in own.values())
        first = next((row[0] for row in rows), 0.0)
        return len(first) if isinstance(first, tuple) else None

    def why_not(self, run: Run) -> str | None:
        """Why it does not hold for a run; None where it does."""
        if run.num_steps != self.num_steps:
            return f"it is for {self.num_steps} steps, not {run.num_steps}"
        if self.sigmas and run.sigmas and not _close(self.sigmas, run.sigmas[: len(self.sigmas)]):
            return "it is for other noise levels: another scheduler, shift or resolution"
        return None

    def why_rows_not(self, run: Run) -> str | None:
        """Why its rows do not hold for a run with these full steps; None where they do."""
        if run.full_steps != self.full_steps:
            return f"it has no rows for these {len(run.full_steps or ())} full steps"
        if run.order != self.order:
            return f"it is for order={self.order}, not {run.order}"
        if run.warmup != self.warmup:
            return f"it is for warmup={self.warmup}, not {run.warmup}"
        return None


@dataclass(frozen=True)
class Calibration:
    """A calibration file.

    Args:
        models: denoiser → the model it is for.
        guidance: how the pipeline was guided, see :class:`~hicache.run.Run`; None for any.
        prior: the basis it was fitted from, used where it does not hold.
        entries: what was fitted, the preferred first.
        settings: how, for whoever reads the file.
        granularity: what was cached as it was fitted; None for any.
        source: its name, for messages.
    """

    models: Mapping[str, ModelKey] = field(hash=False)
    guidance: str | None
    prior: Basis
    entries: tuple[Entry, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    granularity: str | None = None
    source: str = "a calibration"

    @property
    def by_feature(self) -> bool:
        """Whether features have rows of their own."""
        return any(entry.features is not None for entry in self.entries)

    def save(self, path: str | Path) -> None:
        """Write a file for :func:`hicache.calibration.reader.load`: whole, or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.text(), encoding="utf-8")
        partial.replace(path)

    def text(self) -> str:
        """The file's contents: a row of coefficients a line."""
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "models": {name: key.to_plain() for name, key in self.models.items()},
            "guidance": self.guidance,
            "granularity": self.granularity,
            "prior": to_plain(self.prior),
            "settings": dict(self.settings),
            "entries": [_plain_entry(entry) for entry in self.entries],
        }
        text = json.dumps(plain, indent=1, ensure_ascii=False)
        return (
            re.sub(r"\[[-+\d.eE,\s]+\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
            + "\n"
        )

    def counts(self, num_steps: int) -> list[int]:
        """For how many full steps of a run there are places."""
        return [len(entry.full_steps) for entry in self.entries if entry.num_steps == num_steps]

    def fitting(self, run: Run) -> tuple[list[Entry], str | None]:
        """The entries that hold for a run, or why none does."""
        for name, key in self.models.items():
            given = run.models.get(name)
            differs = None if given is None else key.differs(given)
            if differs is not None:
                return [], differs
        for name in ("guidance", "granularity"):
            mine, given = getattr(self, name), getattr(run, name)
            if None not in (mine, given) and mine != given:
                return [], f"it is for {name}={mine!r}, not {given!r}"
        reasons = [entry.why_not(run) for entry in self.entries]
        found = [entry for entry, reason in zip(self.entries, reasons, strict=True) if reason is None]
        return found, None if found else str(reasons[0])


def _plain_entry(entry: Entry) -> dict[str, Any]:
    return {
        "num_steps": entry.num_steps,
        "order": entry.order,
        "warmup": entry.warmup,
        "full_steps": list(entry.full_steps),
        "sigmas": None if entry.sigmas is None else list(entry.sigmas),
        "scores": dict(entry.scores),
        "rows": {
            context: {str(step): list(row) for step, row in rows.items()}
            for context, rows in entry.rows.items()
        },
    }


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    if len(one) != len(other):
        return False
    allowed = _SIGMAS_EQUAL * max(map(abs, one), default=0.0)
    return all(abs(a - b) <= allowed for a, b in zip(one, other, strict=True))
