"""Random numbers of a run, all drawn before they are needed, and the tokens that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hicache.companions.clusca.kmeans import k_means
from hicache.companions.clusca.settings import ClusCa
from hicache.numbers import uploaded

# Steps that have numbers of their own; later ones have those of the first again.
_STEPS: Final = 256


class Draws:
    """The numbers of one run, in [0, 1), on the device.

    They are the same for every sample and every call of a step: what is drawn of a picture does not depend on
    which others are drawn beside it, nor on whether guidance is one call or two.

    Args:
        settings: number of clusters, seed, whether every block has draws of its own.
        blocks: that have draws.
        device: where they are wanted.
    """

    def __init__(self, settings: ClusCa, blocks: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        shape = _STEPS, blocks if settings.draws_in_blocks else 1, settings.clusters
        first = torch.rand(settings.clusters, generator=generator, dtype=torch.float64)
        steps = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.first = uploaded(first, device)  # [C], for the tokens that clusters begin with
        self._steps = uploaded(steps, device)  # [S, blocks or 1, C]

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.first.nbytes + self._steps.nbytes

    def of(self, step: int) -> Tensor:
        """The numbers of a step, ``[blocks or 1, clusters]``."""
        return self._steps[step % len(self._steps)]


@dataclass
class Groups:
    """The clusters of a call's tokens.

    Args:
        labels: the cluster of every token, int64 ``[batch, tokens]``.
        centroids: ``[batch, clusters, channels]``.
        tokens: those of the first cluster, then those of the second, …, int64 ``[batch, tokens]``.
        starts: where each cluster begins in that, int64 ``[batch, clusters]``.
        counts: its tokens, int64 ``[batch, clusters]``.
    """

    labels: Tensor
    centroids: Tensor
    tokens: Tensor
    starts: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, shape: torch.Size, clusters: int, dtype: torch.dtype, device: torch.device) -> Groups:
        """Memory for the clusters of points ``[batch, tokens, channels]`` of this shape and dtype."""
        batch, tokens, channels = shape
        clusters = min(tokens, clusters)
        centroids = torch.empty(batch, clusters, channels, dtype=_wide(dtype), device=device)
        labels = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        counts = torch.zeros(batch, clusters, dtype=torch.int64, device=device)
        return cls(labels, centroids, labels.clone(), counts, counts.clone())

    @classmethod
    def of(cls, points: Tensor, first: Tensor, before: Tensor | None, iterations: int) -> Groups:
        """Find clusters.

        Args:
            points: ``[batch, tokens, channels]`` of any floating dtype.
            first: numbers in [0, 1) that choose the tokens to begin with, one of each of as many stretches of
                neighbours; of fewer tokens than numbers, each is a cluster.
            before: centroids of the last time, to begin with in place of tokens; None: there are none.
            iterations: of k-means, at most.
        """
        points = points.to(_wide(points.dtype))
        batch, tokens, _ = points.shape
        clusters = min(tokens, len(first))
        indices = torch.arange(clusters, device=points.device)
        if clusters == tokens:
            labels, centroids = indices.expand(batch, tokens).contiguous(), points.clone()
        else:
            chosen = ((indices + first[:clusters]) * (tokens / clusters)).long().clamp(max=tokens - 1)
            labels, centroids = k_means(points, points[:, chosen] if before is None else before, iterations)
        counts = (labels[..., None] == indices).sum(1)  # [B, C]
        return cls(labels, centroids, labels.argsort(stable=True), counts.cumsum(1) - counts, counts)

    def draw(self, numbers: Tensor) -> Tensor:
        """A token of each cluster, int64 ``[batch, clusters]``; of an empty one, a token that is not in it.

        Args:
            numbers: in [0, 1), as many as clusters or more.
        """
        clusters = self.counts.shape[1]
        place = (numbers[:clusters] * self.counts).long()
        place = torch.minimum(place, (self.counts - 1).clamp(min=0)) + self.starts
        return self.tokens.gather(1, place.clamp(max=self.tokens.shape[1] - 1))

    def are_drawn(self, drawn: Tensor) -> Tensor:
        """Whether each token is the one drawn of its own cluster, ``[batch, tokens]``.

        Args:
            drawn: what :meth:`draw` gave. The token that stands for an empty cluster is not of it, so that it
                never counts as drawn on that one's account.
        """
        tokens = torch.arange(self.labels.shape[1], device=drawn.device)
        return drawn.gather(1, self.labels) == tokens


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What points of a dtype are clustered in."""
    return torch.promote_types(dtype, torch.float32)
