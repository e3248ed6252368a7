"""Forecasting bases: from where a forecast is made to the weights of the differences.

A forecast is ``F̂ = Σ_k α_k · D_k`` over the differences that exist; a basis is the rule for α. Weights are
computed in float64 on the host. Everything that is linear in past snapshots can be written this way, so a new
predictor is a new basis and nothing else. One with settings of its own is a class:

>>> import dataclasses
>>> from hicache import Basis
>>> @dataclasses.dataclass(frozen=True)
... class Fading(Basis):
...     strength: float = 0.1
...
...     def coefficients(self, at):
...         return [1 / (1 + self.strength * at.distance), *[0.0] * (at.num_coeffs - 1)]

and one without may be a function with a name:

>>> from hicache import register_basis
>>> @register_basis("damped")
... def damped(gaps, distance, num_coeffs, sigma):
...     return [sigma**k * distance**k for k in range(num_coeffs)]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeVar

import torch

from hicache.checks import check_positive
from hicache.feature_rows import FeatureRows
from hicache.run import Position, Run


class Basis(ABC):
    """A rule for the coefficients of a forecast, with settings of its own."""

    #: Whether it looks at the scheduler's noise levels, which are read from the device once a run.
    reads_sigmas: ClassVar[bool] = False
    #: Why it gives another rule's coefficients in this run, if it does.
    fallback: str | None = None

    @property
    def by_feature(self) -> bool:
        """Whether features have rows of their own, see :meth:`for_features`: modules are cached, then."""
        return False

    @abstractmethod
    def coefficients(self, at: Position) -> Sequence[float]:
        """``at.num_coeffs`` coefficients, lowest order first.

        They follow from the settings and the place: asked for once, and used in later runs as well.
        """

    def for_run(self, run: Run) -> Basis:
        """What is used in a run; itself, unless it depends on the run."""
        return self

    def for_features(self, layers: Sequence[str | None], device: torch.device) -> FeatureRows:
        """What gives the rows of one context in one run, where ``by_feature``.

        Args:
            layers: of every feature the block of the model that it is of, such as ``"transformer_blocks.3"``;
                None where it is of several, or of none.
            device: of the features.
        """
        raise NotImplementedError(f"{type(self).__name__} has one row for all features")


class BasisFunction(Protocol):
    """A rule with a name for the coefficients of a forecast."""

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


AnyBasis = TypeVar("AnyBasis", bound=BasisFunction)
_BASES: Final[dict[str, BasisFunction]] = {}


def register_basis(name: str) -> Callable[[AnyBasis], AnyBasis]:
    """Decorator that makes a function usable as ``HiCacheConfig(basis=name)``.

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


def get_basis(name: str) -> BasisFunction:
    """The basis of this name.

    Raises:
        ValueError: no such basis; the message lists the known ones.
    """
    if name not in _BASES:
        raise ValueError(f"unknown basis {name!r}; known bases: {', '.join(_BASES)}")
    return _BASES[name]


def known_bases() -> tuple[str, ...]:
    """Names of all registered bases."""
    return tuple(_BASES)


def evaluate(basis: Basis, at: Position) -> list[float]:
    """The coefficients of a forecast, checked.

    Raises:
        ValueError: the basis returned another number of weights or a weight that is not finite.
    """
    weights = [float(weight) for weight in basis.coefficients(at)]
    if len(weights) != at.num_coeffs or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"basis {str(basis)!r}: expected {at.num_coeffs} finite weights at distance {at.distance}, "
            f"got {weights}"
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


@dataclass(frozen=True)
class Named(Basis):
    """A registered function, to the letter, at one σ: what ``HiCacheConfig(basis="…")`` means.

    Raises:
        ValueError: no such basis.
    """

    name: str
    sigma: float = 0.5

    def __post_init__(self) -> None:
        get_basis(self.name)

    def coefficients(self, at: Position) -> Sequence[float]:
        return get_basis(self.name)(at.gaps, at.distance, at.num_coeffs, self.sigma)

    def __str__(self) -> str:
        return self.name


class _Polynomial(Basis):
    """A polynomial in the distance, whose orders end where its differences would overshoot.

    The recursion divides by the newest gap at every order, as the paper's does. Where gaps are equal that
    makes derivatives; where an older gap is longer than a newer one, D2 and above are too large, by
    ``(newer + older) / (2 · newer)`` at order 2: beyond a ratio of gaps of ``max_gap_ratio``, an order and
    all above it are left out. A longer newer gap makes them too small, which does no harm.
    """

    max_gap_ratio: float

    def coefficients(self, at: Position) -> Sequence[float]:
        held = orders_that_hold(at.gaps, at.num_coeffs, self.max_gap_ratio)
        weights = self._weights(at.gaps, at.distance, held)
        return [*weights, *[0.0] * (at.num_coeffs - held)]

    def _weights(self, gaps: Sequence[float], distance: float, num_coeffs: int) -> Sequence[float]:
        raise NotImplementedError


@dataclass(frozen=True)
class Hermite(_Polynomial):
    """HiCache's polynomials (:func:`hermite`).

    Args:
        sigma: contraction σ of the dual scaling, > 0.
        max_gap_ratio: of an older gap to a newer one, for orders >= 2 to count.

    Raises:
        TypeError, ValueError: σ or the ratio is no number > 0.
    """

    sigma: float = 0.5
    max_gap_ratio: float = 2.0

    def __post_init__(self) -> None:
        check_positive("Hermite.sigma", self.sigma)
        check_positive("Hermite.max_gap_ratio", self.max_gap_ratio)

    def _weights(self, gaps: Sequence[float], distance: float, num_coeffs: int) -> Sequence[float]:
        return hermite(gaps, distance, num_coeffs, self.sigma)


@dataclass(frozen=True)
class Taylor(_Polynomial):
    """TaylorSeer's polynomials (:func:`taylor`).

    Args:
        max_gap_ratio: see :class:`Hermite`.

    Raises:
        TypeError, ValueError: the ratio is no number > 0.
    """

    max_gap_ratio: float = 2.0

    def __post_init__(self) -> None:
        check_positive("Taylor.max_gap_ratio", self.max_gap_ratio)

    def _weights(self, gaps: Sequence[float], distance: float, num_coeffs: int) -> Sequence[float]:
        return taylor(gaps, distance, num_coeffs, 1.0)


@dataclass(frozen=True)
class ScaledTaylor(_Polynomial):
    """Taylor with HiCache's dual scaling (:func:`scaled_taylor`).

    Args:
        sigma: see :class:`Hermite`.
        max_gap_ratio: likewise.

    Raises:
        TypeError, ValueError: σ or the ratio is no number > 0.
    """

    sigma: float = 0.5
    max_gap_ratio: float = 2.0

    def __post_init__(self) -> None:
        check_positive("ScaledTaylor.sigma", self.sigma)
        check_positive("ScaledTaylor.max_gap_ratio", self.max_gap_ratio)

    def _weights(self, gaps: Sequence[float], distance: float, num_coeffs: int) -> Sequence[float]:
        return scaled_taylor(gaps, distance, num_coeffs, self.sigma)


@dataclass(frozen=True)
class Reuse(Basis):
    """The last feature, unchanged (:func:`reuse`)."""

    def coefficients(self, at: Position) -> Sequence[float]:
        return reuse(at.gaps, at.distance, at.num_coeffs, 1.0)


def orders_that_hold(gaps: Sequence[float], num_coeffs: int, max_gap_ratio: float) -> int:
    """How many coefficients, from order 0 on, have no older gap over so many times the newer one."""
    held = min(2, num_coeffs)
    while held < num_coeffs and gaps[held - 1] <= max_gap_ratio * gaps[held - 2]:
        held += 1
    return held
