"""hicache: diffusion transformers that skip most of their steps and still draw the same picture.

>>> import hicache.fast                  # doctest: +SKIP
>>> handle = hicache.fast.apply(pipe)    # doctest: +SKIP
"""

import importlib
from typing import Any, Final

from hicache._version import __version__
from hicache.basis import (
    Basis,
    Hermite,
    Reuse,
    ScaledTaylor,
    Taylor,
    get_basis,
    known_bases,
    register_basis,
    unregister_basis,
)
from hicache.calibration.rules import Fitted, FittedSteps
from hicache.chebyshev import Chebyshev
from hicache.config import ELSEWHERE, HiCacheConfig
from hicache.engine import Engine
from hicache.input_change import InputChange
from hicache.run import Position, Run
from hicache.schedule import Geometric, Interval, Schedule, Steps, bound, full_steps
from hicache.tables import Table

__all__ = [
    "AnalyticHermite",
    "Basis",
    "Chebyshev",
    "Engine",
    "Fitted",
    "FittedSteps",
    "Geometric",
    "Hermite",
    "HiCacheConfig",
    "InputChange",
    "Interval",
    "Position",
    "Reuse",
    "Run",
    "ScaledTaylor",
    "Schedule",
    "Steps",
    "Table",
    "Taylor",
    "__version__",
    "bound",
    "calibrate",
    "full_steps",
    "get_basis",
    "known_bases",
    "register_basis",
    "unregister_basis",
    "wrap",
]

_ELSEWHERE: Final = {"calibrate": "hicache.fitting", "wrap": "hicache.wrapped", **ELSEWHERE}


def __getattr__(name: str) -> Any:
    """What needs diffusers, and companions: imported when they are asked for."""
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module 'hicache' has no attribute {name!r}")
