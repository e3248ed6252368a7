"""Rows by ridge regression on full runs: no gradients, and features of one history in memory.

For a skipped step with the K newest snapshots F_i, ``G_ij = Σ ⟨F_i, F_j⟩`` and ``b_i = Σ ⟨F_i, F_s⟩`` over
runs, tokens and samples are all that is kept; weights are ``w = w₀ + (G + λ tr(G)/K I)⁻¹ (b − G w₀)``, with
those of the prior for w₀ (L2P, CVPR 2026, in closed form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from hicache.basis import Basis
from hicache.fitting.pictures import Pictures
from hicache.fitting.replay import Replay
from hicache.fitting.rows import InFull, Layout
from hicache.snapshots import coefficients_of_weights, differences_of_snapshots

RIDGE: Final = 1e-3


@dataclass
class Grams:
    """Products of what skipped steps forecast from with one another, and with what they should give.

    Args:
        layout: the full steps.
    """

    layout: Layout
    _of_snapshots: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # float64 [K, K]
    _with_target: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # float64 [K]
    _held: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # the newest snapshots of the run, by context

    def take(self, context: str, step: int, feature: Tensor) -> None:
        """A full run has come to a step."""
        layout = self.layout
        if step == 0:
            self._held[context] = []
        if step in layout.positions:
            snapshots = torch.stack(
                [held.flatten() for held in self._held[context][: layout.positions[step].num_coeffs]]
            ).double()
            key, aim = (context, step), feature.flatten().double()
            share = aim.square().sum().clamp_min(1e-300)  # every run counts as much
            self._of_snapshots[key] = self._of_snapshots.get(key, 0) + (snapshots @ snapshots.T / share).cpu()
            self._with_target[key] = self._with_target.get(key, 0) + (snapshots @ aim / share).cpu()
        if step in layout.full_steps:
            self._held[context] = [feature.detach().clone(), *self._held[context]][: layout.order + 1]

    def rows(self, prior: Basis, ridge: float = RIDGE) -> dict[str, dict[int, Tensor]]:
        """Coefficients, float64 ``[num_coeffs]``, by context and skipped step.

        Args:
            prior: at a large ridge the rows are its, bit for bit.
            ridge: λ >= 0; zero gives the least squares' own.
        """
        found: dict[str, dict[int, Tensor]] = {}
        for context, step in self._of_snapshots:
            gram, aim = self._of_snapshots[context, step], self._with_target[context, step]
            gaps = self.layout.positions[step].gaps
            alphas = self.layout.row(prior, step)
            weights = alphas @ differences_of_snapshots(gaps)
            count = len(gram)
            move = torch.zeros(count, dtype=torch.float64)
            if math.isfinite(ridge):
                damped = gram + ridge * gram.trace() / count * torch.eye(count, dtype=torch.float64)
                # least squares where snapshots are the same but for rounding, as a constant feature's are
                move = torch.linalg.lstsq(damped, aim - gram @ weights, driver="gelsd").solution
            # the move alone goes through the inverse of M: without one the prior is left as it is
            found.setdefault(context, {})[step] = alphas + coefficients_of_weights(move, gaps)
        return found


def fit(
    replay: Replay, layout: Layout, prior: Basis, pictures: Pictures, ridge: float = RIDGE
) -> dict[str, dict[int, Tensor]]:
    """Rows of every context that begins with the run, from full runs of all pictures.

    Args:
        replay: the pipeline, entered.
        layout: the full steps.
        prior: see :meth:`Grams.rows`.
        pictures: to fit to.
        ridge: likewise.
    """
    grams = Grams(layout)
    for batch in pictures.batches():
        replay.run(InFull(grams.take), pictures.arguments(batch, "latent"))
    return grams.rows(prior, ridge)
