"""K-means with L1 distances, on the device and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

# Centroids that moved by less than this, relative to their size, have come to rest.
_AT_REST = 1e-4


def k_means(points: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster every sample by itself.

    A centroid is the mean of its members; one that has none stays where it was. A sample whose centroids have
    come to rest is done, but nobody waits to hear of it: further iterations leave it as it is.

    Args:
        points: ``[batch, tokens, channels]``, in fp32 or float64.
        centroids: ``[batch, clusters, channels]``, of the same dtype, to start from.
        iterations: at most.

    Returns:
        The cluster of every token, int64 ``[batch, tokens]``, and the centroids.
    """
    indices = torch.arange(centroids.shape[1], device=points.device)
    moving = torch.ones(len(points), 1, 1, dtype=torch.bool, device=points.device)
    labels = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    for _ in range(iterations):
        labels = torch.cdist(points, centroids, p=1.0).argmin(-1)
        members = (labels[..., None] == indices).to(points.dtype)  # [B, T, C]
        counts = members.sum(1)[..., None]  # [B, C, 1]
        means = members.transpose(1, 2) @ points / counts.clamp(min=1)
        means = torch.where(counts > 0, means, centroids)
        change = torch.linalg.vector_norm(means - centroids, dim=(1, 2), keepdim=True)
        size = torch.linalg.vector_norm(centroids, dim=(1, 2), keepdim=True)
        centroids = torch.where(moving, means, centroids)
        moving = moving & (change > _AT_REST * size)
    return labels, centroids
