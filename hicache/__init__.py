"""hicache: diffusion transformers that skip most of their steps and still draw the same picture.

>>> import hicache.fast                  # doctest: +SKIP
>>> handle = hicache.fast.apply(pipe)    # doctest: +SKIP
"""

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
from hicache.config import HiCacheConfig
from hicache.engine import Engine
from hicache.run import Position, Run
from hicache.schedule import Geometric, Interval, Schedule, Steps, bound, full_steps
from hicache.tables import Table

__all__ = [
    "Basis",
    "Chebyshev",
    "Engine",
    "Fitted",
    "FittedSteps",
    "Geometric",
    "Hermite",
    "HiCacheConfig",
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
    "full_steps",
    "get_basis",
    "known_bases",
    "register_basis",
    "unregister_basis",
]
