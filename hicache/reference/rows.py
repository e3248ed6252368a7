"""Rows by feature, eagerly: what of a context's features is measured, and the row each is forecast with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hicache.basis import Basis, evaluate
from hicache.feature_rows import FeatureRows
from hicache.reference.blocks import Part
from hicache.reference.history import Feature
from hicache.run import Position

# (path of a submodule, how often it had run before in this call of the transformer)
Key = tuple[str, int]


class Rows:
    """The rows of one context in one run.

    Features of the picture are measured and have rows of their own. Others, of the text or of what else is
    added, have the basis' row for all: what they are does not reach the picture at a skipped step.

    Args:
        basis: of the run.
    """

    def __init__(self, basis: Basis) -> None:
        self._basis = basis
        self._features: FeatureRows | None = None
        self._keys: list[Key] = []

    def begin_full(
        self,
        parts: Mapping[str, Part],
        outputs: Sequence[Key],
        held: Mapping[Key, Feature],
        device: torch.device,
    ) -> None:
        """A full step's outputs are about to be taken in.

        Args:
            parts: the submodules that are cached, by path.
            outputs: which of them gave something.
            held: the features of the last full step.
            device: of what they gave.
        """
        if not self._basis.by_feature:
            return
        places = {path: place for place, (path, part) in enumerate(parts.items()) if part.picture is not None}
        keys = sorted((key for key in outputs if key[0] in places), key=lambda key: (places[key[0]], key[1]))
        found = [(parts[key[0]], held[key].first_difference) for key in keys if key in held]
        measured = [(part, first) for part, first in found if first is not None]
        if self._features is None or keys != self._keys:
            layers = [parts[path].layer for path, _ in keys]
            self._features, self._keys = self._basis.for_features(layers, device), keys
        if measured and len(measured) == len(keys):
            tokens = measured[0][1].shape[-2]
            self._features.measure(torch.stack([_of_picture(part, one, tokens) for part, one in measured]))

    def weights(self, key: Key, at: Position) -> Sequence[float]:
        """The coefficients of a submodule's first tensor."""
        if self._features is None or key not in self._keys:
            return evaluate(self._basis, at)
        row: list[float] = self._features.rows([at])[0, :, self._keys.index(key)].tolist()
        return row

    @property
    def told(self) -> dict[str, float]:
        """See :attr:`FeatureRows.told`."""
        return {} if self._features is None else self._features.told


def _of_picture(part: Part, value: Tensor, tokens: int) -> Tensor:
    return value[..., :tokens, :] if part.picture == "first" else value[..., -tokens:, :]
