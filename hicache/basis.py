"""Forecasting bases: from the gaps between full steps and the distance ahead to the weights of the
differences.

A forecast is ``F̂ = Σ_k α_k · D_k`` over the differences that exist; a basis is the rule for α. Weights are
computed in float64 on the host. Everything that is linear in past snapshots can be written this way, so a new
predictor is a new basis and nothing else:

>>> from hicache import register_basis
>>> @register_basis("damped")
... def damped(gaps, distance, num_coeffs, sigma):
...     return [sigma**k * distance**k for k in range(num_coeffs)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar


class Basis(Protocol):
    """A rule for the coefficients of a forecast."""

    def __call__(
        self, gaps: Sequence[float], distance: float, num_coeffs: int, sigma: float, /
    ) -> Sequence[float]:
        """``num_coeffs`` coefficients, lowest order first.

        Args:
            gaps: steps between the full steps behind the differences, newest first: ``num_coeffs - 1``.
            distance: steps since the last full step, > 0.
            num_coeffs: number of differences that exist, >= 1.
            sigma: contraction σ of the dual scaling.
        """


AnyBasis = TypeVar("AnyBasis", bound=Basis)
_BASES: Final[dict[str, Basis]] = {}


def register_basis(name: str) -> Callable[[AnyBasis], AnyBasis]:
    """Decorator that makes a basis usable as ``HiCacheConfig(basis=name)``.

    Raises:
        TypeError: no name: ``@register_basis`` without parentheses.
        ValueError: the name is empty or already taken by another function.
    """
    if not isinstance(name, str):
        raise TypeError(f'register_basis: expected a name, @register_basis("mine"), got {name!r}')
    if not name:
        raise ValueError("register_basis: expected a name, got an empty string")

    def register(function: AnyBasis) -> AnyBasis:
        if name in _BASES:
            raise ValueError(f"register_basis: {name!r} is taken; known bases: {', '.join(_BASES)}")
        _BASES[name] = function
        return function

    return register


def unregister_basis(name: str) -> None:
    """Forget a basis.

    Raises:
        ValueError: no such basis.
    """
    get_basis(name)
    del _BASES[name]


def get_basis(name: str) -> Basis:
    """The basis of this name.

    Raises:
        ValueError: no such basis; the message lists the known ones.
    """
    if name not in _BASES:
        raise ValueError(f"unknown basis {name!r}; known bases: {', '.join(_BASES)}")
    return _BASES[name]


def coefficients(
    name: str, gaps: Sequence[float], distance: float, num_coeffs: int, sigma: float
) -> list[float]:
    """Evaluate a basis and check what it returns.

    Args:
        name: a registered basis.
        gaps: steps between the full steps behind the differences, newest first, ``num_coeffs - 1`` of them.
        distance: steps ahead of the last full step, > 0.
        num_coeffs: number of differences that exist, >= 1.
        sigma: contraction σ of the dual scaling.

    Raises:
        ValueError: unknown basis, or it returned another number of weights or a weight that is not finite.
    """
    weights = [float(weight) for weight in get_basis(name)(gaps, distance, num_coeffs, sigma)]
    if len(weights) != num_coeffs or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"basis {name!r}: expected {num_coeffs} finite weights at distance {distance}, got {weights}"
        )
    return weights


@register_basis("hermite")
def hermite(gaps: Sequence[float], distance: float, num_coeffs: int, sigma: float) -> list[float]:
    """HiCache: Hermite polynomials with dual scaling, ``α_k = σ^k · H_k(σ x) / k!`` (arXiv 2508.16984).

    H are the physicists' polynomials: 1, 2z, 4z² − 2, 8z³ − 12z, …
    """
    z = sigma * distance
    values = [1.0, 2.0 * z]
    for k in range(1, num_coeffs - 1):
        values.append(2.0 * z * values[k] - 2.0 * k * values[k - 1])
    return [sigma**k * values[k] / math.factorial(k) for k in range(num_coeffs)]


@register_basis("taylor")
def taylor(gaps: Sequence[float], distance: float, num_coeffs: int, sigma: float) -> list[float]:
    """TaylorSeer: ``α_k = x^k / k!`` (arXiv 2503.06923)."""
    return [distance**k / math.factorial(k) for k in range(num_coeffs)]


@register_basis("scaled_taylor")
def scaled_taylor(gaps: Sequence[float], distance: float, num_coeffs: int, sigma: float) -> list[float]:
    """Dual scaling alone on Taylor: ``α_k = σ^{2k} · x^k / k!`` (arXiv 2508.16984, ablation)."""
    return [sigma ** (2 * k) * distance**k / math.factorial(k) for k in range(num_coeffs)]


@register_basis("reuse")
def reuse(gaps: Sequence[float], distance: float, num_coeffs: int, sigma: float) -> list[float]:
    """FORA: the last feature, unchanged."""
    return [1.0] + [0.0] * (num_coeffs - 1)


def known_bases() -> tuple[str, ...]:
    """Names of all registered bases."""
    return tuple(_BASES)
