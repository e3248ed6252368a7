"""Ours: what a user gets by default, the bundled model's own file, and the fixed bases over σ and order.

A further method is one entry: a name, and a function from the interval to the arguments of
:func:`hicache.fast.apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import hicache.fast
from benchmarks.peers.method import INTERVALS, WARMUP, Method
from hicache import HiCacheConfig
from hicache.calibration.reader import load
from hicache.calibration.shipped import NAME, name_for
from hicache.demo import MODEL
from hicache.demo.pipeline import ShapesPipeline

Arguments = Callable[[float], dict[str, Any]]

PACKAGE: Final = "hicache"
SIGMAS: Final = (0.3, 0.4, 0.5, 0.6)
ORDERS: Final = (1, 2, 3)
# of the file by output: 39, 26, 24, 17 and 16 full steps, and at the end 6, beside those of whole intervals
OUTPUT_INTERVALS: Final = tuple(sorted((1.3, 2.0, 2.2, 3.3, 3.5, *INTERVALS, 12.0)))


def method(name: str, arguments: Arguments, **more: Any) -> Method:
    """Make the entry of one of our methods.

    Args:
        name: of the method.
        arguments: interval → keywords of :func:`hicache.fast.apply`.
        more: of :class:`~benchmarks.peers.method.Method`.
    """

    def apply(pipe: ShapesPipeline, setting: float, steps: int) -> None:
        hicache.fast.apply(pipe, **arguments(setting))

    return Method(name, PACKAGE, apply, **more)


def fixed(granularity: str, **settings: Any) -> Arguments:
    """Return the arguments of a basis with settings of its own."""
    return lambda interval: {
        "config": HiCacheConfig(interval=int(interval), warmup=WARMUP, **settings),
        "granularity": granularity,
    }


def fitted(file: str) -> Arguments:
    """Return the arguments of a file of the bundled model's, with as many full steps as the interval makes.

    They are what ``speedup=`` alone takes of it; what is cached is what the file was fitted to. An interval
    need not be whole.
    """

    def arguments(interval: float) -> dict[str, Any]:
        calibration = load(MODEL / file)
        count = WARMUP + int((calibration.entries[0].num_steps - WARMUP) / interval)
        return {"config": HiCacheConfig.of(calibration, count)}

    return arguments


METHODS: Final = (
    method(
        "hicache, default", lambda interval: {"config": HiCacheConfig(interval=int(interval))}, default=True
    ),
    method("hicache, fitted", fitted(NAME), fitted=True),
    # that file alone has rows for as many full steps as near peers have, and as few as fast ones
    method(
        "hicache, fitted, output",
        fitted(name_for("output")),
        fitted=True,
        settings=OUTPUT_INTERVALS,
    ),
    method("hicache, module", fixed("module")),
    method("hicache, output", fixed("output")),
    *(
        method(f"hicache, stack, Hermite σ={sigma} O={order}", fixed("stack", sigma=sigma, order=order))
        for sigma in SIGMAS
        for order in ORDERS
    ),
    *(
        method(f"hicache, stack, {basis} O={order}", fixed("stack", basis=basis, order=order))
        for basis in ("taylor", "scaled_taylor")
        for order in ORDERS
    ),
    method("hicache, stack, reuse", fixed("stack", basis="reuse", order=0)),
)
