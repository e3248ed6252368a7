"""Calibrations whose rows are a named basis's, and a number more."""

from __future__ import annotations

from typing import Any, Final

from hicache import HiCacheConfig
from hicache.basis import Named
from hicache.calibration.file import Calibration, Entry
from hicache.calibration.matching import model_keys
from hicache.fitting.rows import Layout
from hicache.fitting.trajectory import plain
from hicache.pipeline import find_denoisers

PRIOR: Final = Named("hermite", 0.5)


def entry_of(change: float, config: HiCacheConfig, steps: int) -> Entry:
    """Rows of :data:`PRIOR`, changed by a number, for a run with a config's full steps."""
    layout = Layout.of(config, steps)
    rows = {step: layout.row(PRIOR, step) + change for step in layout.positions}
    return Entry(steps, config.order, config.warmup, layout.full_steps, plain({"transformer[0]": rows}))


def file_of(pipe: Any, entry: Entry, granularity: str) -> Calibration:
    """A calibration of a pipeline's models."""
    return Calibration(model_keys(find_denoisers(pipe)), None, PRIOR, (entry,), {}, granularity)
