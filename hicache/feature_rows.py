"""Rows of coefficients by feature: for a basis that weighs the differences of each feature in its own way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hicache.run import Position


class FeatureRows:
    """What a basis gives in one context of one run, where features have rows of their own.

    The rows may follow from what is measured of the features. Nothing here waits for a CUDA device: what is
    measured stays there, and rows are made of it there. Each tensor is a new one, never written in place.
    """

    def rows(self, places: Sequence[Position]) -> Tensor:
        """Coefficients at places that all come after one full step: ``[places, num_coeffs, features]``.

        In float64, on the device of the features. Every place has the same ``num_coeffs``.
        """
        raise NotImplementedError

    def measure(self, first: Tensor) -> None:
        """The next full step begins, and the last one has these first differences D1.

        Args:
            first: ``[features, batch, tokens, channels]``, on their device, before they are overwritten.
        """

    @property
    def told(self) -> dict[str, float]:
        """What rows are made of, by the features' layers, for ``stats``; reads the device."""
        return {}
