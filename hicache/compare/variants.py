"""What is compared: settings of the cache, modes × intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hicache.basis import known_bases
from hicache.calibration.file import Calibration
from hicache.calibration.shipped import shipped
from hicache.config import HiCacheConfig
from hicache.schedule import full_steps

#: Rows and places that come with the model.
FITTED: Final = "fitted"
#: Modes that are not called as their basis is.
BASES: Final = {"hicache": "hermite", "scaled-taylor": "scaled_taylor"}
#: Those of a comparison that names none, beside :data:`FITTED` where the model comes with rows.
USUAL: Final = ("hicache", "taylor", "reuse")


@dataclass(frozen=True)
class Variant:
    """One way to cache.

    Args:
        mode: a name of :func:`known_modes`.
        config: its settings.
    """

    mode: str
    config: HiCacheConfig

    @property
    def name(self) -> str:
        """Such as ``hicache N=7``."""
        return f"{self.mode} N={self.config.interval}"


def known_modes() -> tuple[str, ...]:
    """Names of modes: of bases, the paper's by the names of its command line, and :data:`FITTED`."""
    renamed = {basis: mode for mode, basis in BASES.items()}
    return (FITTED, *(renamed.get(basis, basis) for basis in known_bases()))


def check_modes(modes: Sequence[str]) -> None:
    """Check names.

    Raises:
        ValueError: one that is not known.
    """
    for mode in modes:
        if mode not in known_modes():
            raise ValueError(f"unknown mode {mode!r}; known modes: {', '.join(known_modes())}")


def variants(
    pipe: Any,
    modes: Sequence[str] | None,
    intervals: Sequence[int],
    num_steps: int,
    base: HiCacheConfig,
    granularity: str = "auto",
) -> list[Variant]:
    """Every mode at every interval, the modes in order.

    Args:
        pipe: the pipeline, for the rows that come with it.
        modes: names of :func:`known_modes`; None takes the usual ones, and what is fitted where it is.
        intervals: N of each.
        num_steps: of a run: rows are fitted to a number of steps.
        base: order, σ, warm-up and the other settings that all variants share.
        granularity: what is to be cached: what was fitted to something else is not taken.

    Raises:
        ValueError: a mode that is not known, none at all, or nothing is fitted for what was asked.
    """
    asked = (FITTED, *USUAL) if modes is None else tuple(dict.fromkeys(modes))
    check_modes(asked)
    configs = [replace(base, interval=interval) for interval in dict.fromkeys(intervals)]
    if not asked or not configs:
        raise ValueError("expected at least one mode and one interval, got none")
    found: list[Variant] = []
    for mode in asked:
        if mode == FITTED:
            found += _fitted(shipped(pipe, granularity), configs, num_steps, strict=modes is not None)
        else:
            basis = BASES.get(mode, mode)
            found += [Variant(mode, replace(config, basis=basis)) for config in configs]
    return found


def _fitted(
    calibrations: Sequence[Calibration], configs: Sequence[HiCacheConfig], num_steps: int, strict: bool
) -> Iterator[Variant]:
    """What was fitted for as many full steps as each interval makes; strict: all of them must be there."""
    for config in configs:
        fitted = config.fitted_in(calibrations, num_steps)
        if fitted is not None:
            yield Variant(FITTED, fitted)
        elif strict:
            count = len(full_steps(config, num_steps))
            counts = sorted({n for calibration in calibrations for n in calibration.counts(num_steps)})
            there = f"it has {', '.join(map(str, counts))}" if counts else "it has none"
            raise ValueError(
                f"mode {FITTED!r}: expected rows that come with the model for {count} full steps of "
                f"{num_steps} (N={config.interval}); {there}"
            )
