"""What a user chooses about the cache."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch

from hicache.basis import get_basis

HISTORY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_ORDER = 4  # the kernels are compiled for up to five orders of differences


@dataclass(frozen=True)
class HiCacheConfig:
    """How often the transformer runs and how the steps between are forecast.

    The defaults are the paper's for FLUX.1-dev: 50 steps make 9 full ones.

    Args:
        interval: N: of N steps, one is full. 1 means that nothing is skipped.
        order: O, highest finite difference kept, 0 … 4.
        sigma: contraction σ of the Hermite basis's dual scaling, > 0 (0.5 for FLUX.1-dev, 0.3 for schnell).
        warmup: w >= 1: the first w steps are full ("first enhance" upstream).
        basis: ``"hermite"``, ``"taylor"``, ``"scaled_taylor"``, ``"reuse"``, or one of
            :func:`hicache.register_basis`.
        last_step_full: run the transformer at the last step too, whatever the interval says.
        history_dtype: dtype the differences are kept in; None keeps the features' own, ``torch.float32``
            costs twice the memory of bf16 and loses no digits in the differences.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range, or an unknown basis.
    """

    interval: int = 7
    order: int = 2
    sigma: float = 0.5
    warmup: int = 3
    basis: str = "hermite"
    last_step_full: bool = False
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._whole("interval", 1, None)
        self._whole("order", 0, MAX_ORDER)
        self._whole("warmup", 1, None)
        if not is_number(self.sigma):
            raise TypeError(f"HiCacheConfig.sigma: expected a number > 0, got {self.sigma!r}")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"HiCacheConfig.sigma: expected a finite number > 0, got {self.sigma!r}")
        object.__setattr__(self, "sigma", float(self.sigma))  # NumPy's numbers become Python's
        if not isinstance(self.basis, str):
            raise TypeError(f"HiCacheConfig.basis: expected the name of a basis, got {self.basis!r}")
        get_basis(self.basis)
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
        wanted = f"an int >= {low}" if high is None else f"an int from {low} to {high}"
        if not is_whole(value):
            raise TypeError(f"HiCacheConfig.{name}: expected {wanted}, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"HiCacheConfig.{name}: expected {wanted}, got {value}")
        object.__setattr__(self, name, int(value))


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
