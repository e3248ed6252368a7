"""Finite differences as combinations of snapshots: coefficients of the one from weights of the other.

``D = M F`` with an invertible matrix M of the gaps, so that a forecast ``Σ_j w_j F_j`` from the newest K
snapshots is ``Σ_k α_k D_k`` with ``Mᵀ α = w``. In float64 on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def times(gaps: Sequence[float]) -> Tensor:
    """When the snapshots were taken, newest first, the newest at zero: 0, −g₀, −g₀−g₁, … (float64)."""
    return -torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)


def differences_of_snapshots(gaps: Sequence[float]) -> Tensor:
    """M, float64 ``[K, K]``: row k has D_k of the newest snapshot by snapshots, newest first.

    Args:
        gaps: ``K - 1``, newest first. The recursion divides by the newest gap at every order.
    """
    rows = torch.eye(len(gaps) + 1, dtype=torch.float64)  # D_0 at each snapshot, newest first
    matrix = [rows[0]]
    for order in range(len(gaps)):
        spans = torch.tensor(gaps[: len(gaps) - order], dtype=torch.float64)
        rows = (rows[:-1] - rows[1:]) / spans[:, None]
        matrix.append(rows[0])
    return torch.stack(matrix)


def coefficients_of_weights(weights: Tensor, gaps: Sequence[float]) -> Tensor:
    """α of the differences, lowest order first, from weights of the snapshots, newest first."""
    found: Tensor = torch.linalg.solve(differences_of_snapshots(gaps).T, weights)
    return found
