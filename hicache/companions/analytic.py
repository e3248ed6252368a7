"""Analytic σ ("HiCache-Analytic"): a contraction for every layer, from the size of its first differences.

Hermite's coefficients suit a variable of scale 1/σ, and a token's first difference is taken for that scale:

    n  = mean over tokens of ‖D1‖₂ over channels
    q ← n at first, then sqrt((1 − β) q² + β n²)
    σ  = min(σ_max, α / (√2 q + ε)),    α_k(x) = σ^k H_k(σ x) / k!

A D1 is measured when the next full step begins, which is when it is at rest, and counts from the forecasts
after that one on. Until then, and in features that are of no one layer, σ is the fixed one. What it is worth
is said in docs/companions.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from hicache.basis import Basis, hermite
from hicache.checks import check_positive
from hicache.feature_rows import FeatureRows
from hicache.numbers import uploaded
from hicache.run import Position

KEYS: Final = ("layer", "feature")


@dataclass(frozen=True)
class AnalyticHermite(Basis):
    """HiCache's polynomials (:func:`hicache.basis.hermite`) with σ by layer, measured in the run.

    Args:
        alpha: α > 0, what σ is of the inverse of q.
        maximum: σ_max > 0.
        beta: β, by how much a full step moves q², at most 1; at 0 or below nothing is measured, and q is 1.
        eps: ε > 0, which keeps σ finite where nothing moves.
        quantile: in (0, 1): of the tokens' norms, in place of their mean.
        smooth: γ in [0, 1): log σ is γ of the last one's and 1 − γ of the new one's, at every measurement.
        key: ``"layer"``, the features of a block have one q, which each moves in turn (attention, then MLP);
            or ``"feature"``.
        sigma: the fixed σ > 0 of forecasts before anything is measured.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    alpha: float = 1.28
    maximum: float = 1.0
    beta: float = 0.01
    eps: float = 1e-6
    quantile: float | None = None
    smooth: float = 0.0
    key: str = "layer"
    sigma: float = 0.5

    @property
    def by_feature(self) -> bool:
        return True

    def __post_init__(self) -> None:
        for name in ("alpha", "maximum", "eps", "sigma"):
            check_positive(f"AnalyticHermite.{name}", getattr(self, name))
        check_positive("AnalyticHermite.smooth", self.smooth, zero=True)
        if self.smooth >= 1:
            raise ValueError(f"AnalyticHermite.smooth: expected a number in [0, 1), got {self.smooth!r}")
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)):
            raise TypeError(f"AnalyticHermite.beta: expected a number, got {self.beta!r}")
        if not self.beta <= 1:
            raise ValueError(f"AnalyticHermite.beta: expected a number up to 1, got {self.beta!r}")
        if self.quantile is not None:
            check_positive("AnalyticHermite.quantile", self.quantile)
            if self.quantile >= 1:
                raise ValueError(
                    f"AnalyticHermite.quantile: expected a number in (0, 1) or None, got {self.quantile!r}"
                )
        if self.key not in KEYS:
            raise ValueError(f"AnalyticHermite.key: expected one of {', '.join(KEYS)}, got {self.key!r}")

    def coefficients(self, at: Position) -> Sequence[float]:
        """Those of the fixed σ."""
        return hermite(at.gaps, at.distance, at.num_coeffs, self.sigma)

    def for_features(self, layers: Sequence[str | None], device: torch.device) -> AnalyticRows:
        return AnalyticRows(self, layers, device)

    def norm(self, first: Tensor) -> Tensor:
        """n of first differences ``[features, batch, tokens, channels]``: ``[features]``, in float64."""
        dtype = torch.promote_types(first.dtype, torch.float32)
        norms = torch.linalg.vector_norm(first, dim=-1, dtype=dtype).flatten(1)
        if self.quantile is None:
            taken: Tensor = norms.mean(1).double()
            return taken
        place = self.quantile * (norms.shape[1] - 1)  # torch.quantile makes a tensor of it at every call
        inorder: Tensor = norms.sort(1).values.double()
        return inorder[:, math.floor(place)].lerp(inorder[:, math.ceil(place)], place % 1)

    def moved(self, q: Tensor, n: Tensor) -> Tensor:
        """q after norms n; NaN is a q that there is not yet, or a norm that counts for nothing."""
        later = ((1 - self.beta) * q.square() + self.beta * n.square()).sqrt()
        return torch.where(n.isfinite(), torch.where(q.isnan(), n, later), q)

    def sigmas(self, q: Tensor, before: Tensor) -> Tensor:
        """σ of q, after those ``before`` it; NaN where there is none."""
        # torch multiplies by the reciprocal where a number is divided by a tensor
        new = (torch.full_like(q, self.alpha) / (math.sqrt(2) * q + self.eps)).clamp(max=self.maximum)
        if not self.smooth:
            return new
        return torch.where(
            before.isnan(), new, (self.smooth * before.log() + (1 - self.smooth) * new.log()).exp()
        )


class AnalyticRows(FeatureRows):
    """The σ of one context in one run.

    Args:
        basis: its settings.
        layers: of every feature; None where it is of several.
        device: of the features.
    """

    def __init__(self, basis: AnalyticHermite, layers: Sequence[str | None], device: torch.device) -> None:
        self._basis = basis
        self._layers = tuple(layers)
        keys: list[str | int] = [
            layer if layer is not None and basis.key == "layer" else feature
            for feature, layer in enumerate(layers)
        ]
        self._names = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        self._places = [self._names[key] for key in keys]  # of a feature among the q's
        self._rounds = [[uploaded(torch.tensor(part), device) for part in pair] for pair in self._turns()]
        self._of_feature = uploaded(torch.tensor(self._places), device)
        self._fixed = uploaded(torch.tensor([layer is None for layer in layers]), device)
        # β ≤ 0: q is never moved, and stays 1
        start = math.nan if basis.beta > 0 else 1.0
        self._q = uploaded(torch.full((len(self._names),), start, dtype=torch.float64), device)
        self._sigma = basis.sigmas(self._q, torch.full_like(self._q, math.nan))

    def _turns(self) -> list[tuple[list[int], list[int]]]:
        """Features that move a q of their own, and those q's: first the first of each, then the second, …"""
        turns: list[tuple[list[int], list[int]]] = []
        for feature, (place, layer) in enumerate(zip(self._places, self._layers, strict=True)):
            if layer is not None:
                turn = self._places[:feature].count(place)
                turns += [([], [])] * (turn == len(turns))
                turns[turn] = ([*turns[turn][0], feature], [*turns[turn][1], place])
        return turns

    def measure(self, first: Tensor) -> None:
        if self._basis.beta <= 0:
            return
        norms = self._basis.norm(first)
        for features, places in self._rounds:
            q = self._basis.moved(self._q.index_select(0, places), norms.index_select(0, features))
            self._q = self._q.index_copy(0, places, q)
        self._sigma = self._basis.sigmas(self._q, self._sigma)

    def rows(self, places: Sequence[Position]) -> Tensor:
        sigma = self._sigma.index_select(0, self._of_feature)
        sigma = torch.where(sigma.isnan() | self._fixed, self._basis.sigma, sigma)  # [features]
        distances: Any = uploaded(
            torch.tensor([[float(at.distance)] for at in places]).double(), sigma.device
        )
        # the same arithmetic as with numbers
        weights: Any = hermite(places[0].gaps, distances, places[0].num_coeffs, cast(Any, sigma))
        return torch.stack([weight.expand(len(places), -1) for weight in weights], dim=1)

    @property
    def told(self) -> dict[str, float]:
        """σ by layer, or by layer and place in it; those that are measured."""
        sigmas = self._sigma.tolist()
        found: dict[str, float] = {}
        for feature, layer in enumerate(self._layers):
            sigma = sigmas[self._places[feature]]
            if layer is None or math.isnan(sigma):
                continue
            name = layer if self._basis.key == "layer" else f"{layer}#{self._layers[:feature].count(layer)}"
            found[name] = sigma
        return found
