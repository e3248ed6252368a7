"""What is measured: a method, and the settings it is measured at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hicache.demo.pipeline import ShapesPipeline

INTERVALS: Final = tuple(float(interval) for interval in range(3, 11))
WARMUP: Final = 3  # the first steps are full, whoever counts

# (pipeline, setting, steps of the run): cache the pipeline in place, as the package's user would
Apply = Callable[[ShapesPipeline, float, int], None]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        name: in tables, and for ``--methods``.
        package: the distribution it is in.
        apply: caches a pipeline that nobody else has.
        knob: what its settings are: ``"interval"``, or a threshold.
        settings: values of the knob, from the one that draws best to the fastest.
        runs_blocks: at skipped steps it runs some of the transformer's blocks.
        looks: what it decides or fits depends on what is drawn. Pictures are drawn one by one then, as they
            would be for one who asks for one; else together, which changes nothing but the roundings.
        fitted: its numbers were fitted to the bundled model, so it is measured on no other.
        default: what its package's user gets who sets the interval alone.
    """

    name: str
    package: str
    apply: Apply
    knob: str = "interval"
    settings: tuple[float, ...] = INTERVALS
    runs_blocks: bool = False
    looks: bool = False
    fitted: bool = False
    default: bool = False
