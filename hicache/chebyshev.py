"""A damped fit of the last snapshots, for what extrapolating polynomials overshoot."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hicache.basis import Basis
from hicache.checks import check_positive, check_whole
from hicache.run import Position
from hicache.snapshots import coefficients_of_weights, times


@dataclass(frozen=True)
class Chebyshev(Basis):
    """Ridge regression of the snapshots on Chebyshev polynomials, through the newest one.

    What is fitted is how snapshots differ from the newest: at a large ridge that is reuse of it, at a ridge
    of zero the polynomial through all. Gaps may be as unequal as they like. After Spectrum (CVPR 2026), which
    fits all snapshots of a run; here the ``order + 1`` newest, which are what the history holds.

    Args:
        ridge: λ >= 0.
        degree: of the polynomial, >= 1; no more than the snapshots determine is used.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    ridge: float = 0.1
    degree: int = 3

    def __post_init__(self) -> None:
        check_positive("Chebyshev.ridge", self.ridge, zero=True)
        check_whole("Chebyshev.degree", self.degree)

    def coefficients(self, at: Position) -> Sequence[float]:
        return _fit(tuple(at.gaps), float(at.distance), float(self.ridge), int(self.degree))


@functools.lru_cache(maxsize=1024)
def _fit(gaps: tuple[float, ...], distance: float, ridge: float, degree: int) -> tuple[float, ...]:
    if not gaps:
        return (1.0,)
    taken = times(gaps)
    degree = min(degree, len(gaps))
    ahead = torch.tensor([distance], dtype=torch.float64)
    # the span of the snapshots and the forecast becomes [-1, 1]
    middle, half = (taken[-1] + distance) / 2, (distance - taken[-1]) / 2
    newest = _polynomials(-middle / half, degree)
    fitted = _polynomials((taken[1:] - middle) / half, degree) - newest  # [K - 1, degree]
    damped = fitted.T @ fitted + ridge * torch.eye(degree, dtype=torch.float64)
    inverse = torch.linalg.solve(damped, fitted.T) if ridge else torch.linalg.pinv(fitted)
    weights = ((_polynomials((ahead - middle) / half, degree) - newest) @ inverse)[0]
    return tuple(coefficients_of_weights(torch.cat([1 - weights.sum()[None], weights]), gaps).tolist())


def _polynomials(at: Tensor, degree: int) -> Tensor:
    """T_1 … T_degree, ``[..., degree]``, of times in [-1, 1]."""
    return torch.stack([torch.special.chebyshev_polynomial_t(at, n) for n in range(1, degree + 1)], dim=-1)
