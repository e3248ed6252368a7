"""The clusters of one context, in memory that stays where it is."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hicache.companions.clusca.draws import Draws, Groups
from hicache.companions.clusca.settings import ClusCa


class Places:
    """Where a context's clusters are.

    Args:
        settings: of the clusters.
        draws: the numbers to begin with.
        shape: of what is clustered, ``[batch, tokens, channels]``.
        dtype: of that.
        device: of that.
    """

    def __init__(
        self, settings: ClusCa, draws: Draws, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._settings = settings
        self._draws = draws
        self.found = False  # in this run
        self.groups = Groups.empty(shape, settings.clusters, dtype, device)

    def find(self, hidden: Tensor) -> None:
        """Find clusters in ``[batch, tokens, channels]``, from those of the run on, if there are any."""
        before = self.groups.centroids if self.found else None
        found = Groups.of(hidden, self._draws.first, before, self._settings.iterations)
        for memory, field in zip(self.memory, dataclasses.fields(found), strict=True):
            memory.copy_(getattr(found, field.name))

    @property
    def memory(self) -> list[Tensor]:
        """All tensors of the clusters."""
        return [getattr(self.groups, field.name) for field in dataclasses.fields(self.groups)]
