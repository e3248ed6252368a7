"""The numbers that the steps of a run are weighed with, on the device: each is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from hicache.config import HiCacheConfig
from hicache.differences import Differences, Span
from hicache.feature_rows import FeatureRows
from hicache.numbers import Numbers, numbers_of_rows, planned_nbytes

_MOST: Final = 4096  # places that are kept; runs whose full steps always fall elsewhere would have ever more

# where in a run: what exists there, the skipped step, and whether all orders are weighed; of a full step's
# update, its differences alone
_Place = tuple[Differences, int, bool] | Differences


class RunNumbers:
    """Coefficients and gaps of the runs that an engine serves.

    They follow from settings and place alone, so runs with equal settings find those of earlier ones.
    """

    def __init__(self) -> None:
        self._numbers = Numbers()
        self._found: dict[_Place, Tensor] = {}
        self._settled: tuple[HiCacheConfig, Span] | None = None
        self._features: FeatureRows | None = None  # of the run, once its features are known
        self._by_feature: dict[_Place, Tensor] = {}  # that hold until the next full step

    def settle(self, config: HiCacheConfig, span: Span) -> None:
        """A run begins, with these settings and steps."""
        if (config, span) != self._settled or len(self._found) > _MOST:
            self._found.clear()
        self._settled = config, span
        self._features = None
        self._by_feature.clear()

    def begin_full(self, layers: Sequence[str | None], first: Tensor | None, device: torch.device) -> None:
        """A full step begins; for bases that have rows by feature.

        Args:
            layers: see :meth:`hicache.Basis.for_features`.
            first: the last full step's first differences, see :meth:`FeatureRows.measure`; None where there
                are none.
            device: of the features.
        """
        assert self._settled is not None
        if self._features is None:
            self._features = self._settled[0].weighed_by.for_features(layers, device)
        if first is not None:
            self._features.measure(first)
        self._by_feature.clear()

    @property
    def told(self) -> dict[str, float]:
        """What rows by feature are made of; reads the device."""
        return {} if self._features is None else self._features.told

    def coeffs(self, differences: Differences, step: int, padded: bool, like: Tensor) -> Tensor:
        """Coefficients of a skipped step, of all orders if ``padded``: ``[num_coeffs]`` or ``[…, features]``.

        Args:
            differences: that exist there.
            step: the skipped step.
            padded: with zeros for orders that do not exist yet.
            like: the history; numbers are on its device, in the dtype its arithmetic is done in.
        """
        place = differences, step, padded
        if self._features is not None:
            if place not in self._by_feature:
                self._make(self._features, differences, step, padded, like)
            return self._by_feature[place]
        found = self._found.get(place)
        if found is None:
            assert self._settled is not None
            config, span = self._settled
            self._bring({place: differences.coeffs(step, config, span, padded)}, differences, like)
            found = self._found[place]
        return found

    def _make(
        self, features: FeatureRows, differences: Differences, step: int, padded: bool, like: Tensor
    ) -> None:
        """Make the rows of a skipped step, with those of the steps up to the next full one."""
        assert self._settled is not None
        config, span = self._settled
        coming = itertools.takewhile(lambda one: not one[1], differences.ahead(config, span))
        steps = sorted({step, *(one for one, _, _ in coming)})
        rows = features.rows([differences.position(one, span) for one in steps])
        made = numbers_of_rows(rows, config.order + 1 if padded else differences.filled, like.dtype)
        self._by_feature.update(
            {(differences, one, padded): row for one, row in zip(steps, made, strict=True)}
        )

    def inv_gap(self, differences: Differences, like: Tensor) -> Tensor:
        """What the update of the last full step multiplies by: one number."""
        if differences not in self._found:
            self._bring({differences: differences.inv_gap}, differences, like)
        return self._found[differences].view(())

    def _bring(self, wanted: dict[_Place, tuple[float, ...]], after: Differences, like: Tensor) -> None:
        """Bring numbers to the device, with those of the rest of the run, where its length is known."""
        wanted |= dict(self._coming(after))
        self._found.update(zip(wanted, self._numbers.of(list(wanted.values()), like), strict=True))

    def _coming(self, after: Differences) -> Iterator[tuple[_Place, tuple[float, ...]]]:
        """The numbers of all steps to come, and their places."""
        assert self._settled is not None
        config, span = self._settled
        for step, full, differences in after.ahead(config, span):
            if full:
                yield differences, differences.inv_gap
            else:
                for padded in (False, True):
                    yield (differences, step, padded), differences.coeffs(step, config, span, padded)

    def clear(self) -> None:
        """Free them: the history has moved."""
        self._found.clear()
        self._numbers.clear()
        self._features = None
        self._by_feature.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the device that they take."""
        return self._numbers.nbytes + sum(row.nbytes for row in self._by_feature.values())

    def planned_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that a run takes at most, of known length and with features of this dtype."""
        assert self._settled is not None
        config, _ = self._settled
        first = Differences().after(0, config)
        return planned_nbytes((numbers for _, numbers in self._coming(first)), config.history_dtype or dtype)
