"""Rows by ridge regression on full runs: no gradients, and features of one history in memory.

For a skipped step with the K newest snapshots F_i, ``G_ij = Σ ⟨F_i, F_j⟩`` and ``b_i = Σ ⟨F_i, F_s⟩`` over
runs, tokens and samples are all that is kept, of each feature; weights are
``w = w₀ + (G + λ tr(G)/K I)⁻¹ (b − G w₀)``, with those of the prior for w₀ (L2P, CVPR 2026, in closed form).
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
    _of_snapshots: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # float64 [features, K, K]
    _with_target: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # float64 [features, K]
    _held: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # the newest snapshots of the run, by context

    def take(self, context: str, step: int, feature: Tensor) -> None:
        """A full run has come to a step."""
        layout = self.layout
        if step == 0:
            self._held[context] = []
        if step in layout.positions:
            held = self._held[context][: layout.positions[step].num_coeffs]
            snapshots = torch.stack([one.flatten(1) for one in held], 1).double()  # [features, K, numbers]
            key, aim = (context, step), feature.flatten(1).double()
            # every run counts as much
            share = aim.square().sum(1).clamp_min(1e-300)[:, None]
            gram, with_aim = snapshots @ snapshots.mT, (snapshots @ aim[..., None])[..., 0]
            self._of_snapshots[key] = self._of_snapshots.get(key, 0) + (gram / share[..., None]).cpu()
            self._with_target[key] = self._with_target.get(key, 0) + (with_aim / share).cpu()
        if step in layout.full_steps:
            self._held[context] = [feature.detach().clone(), *self._held[context]][: layout.order + 1]

    def rows(self, prior: Basis, ridge: float = RIDGE) -> dict[str, dict[int, Tensor]]:
        """Coefficients, float64, by context and skipped step, of the layout's form.

        Args:
            prior: at a large ridge the rows are its, bit for bit.
            ridge: λ >= 0; zero gives the least squares' own.
        """
        found: dict[str, dict[int, Tensor]] = {}
        for context, step in self._of_snapshots:
            gram, aim = self._of_snapshots[context, step], self._with_target[context, step]
            gaps, alphas = self.layout.positions[step].gaps, self.layout.row(prior, step)
            weights = differences_of_snapshots(gaps).T @ alphas
            if math.isfinite(ridge):
                move = _move(gram, aim, weights if alphas.ndim == 2 else weights[:, None], ridge)
                # the move alone goes through the inverse of M: without one the prior is left as it is
                alphas = alphas + coefficients_of_weights(move.view_as(weights), gaps)
            found.setdefault(context, {})[step] = alphas
        return found


def _move(gram: Tensor, aim: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """By how much weights of snapshots, ``[K, features]``, are moved."""
    count = gram.shape[-1]
    traces = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    damped = gram + ridge * traces / count * torch.eye(count, dtype=torch.float64)
    missed = aim[..., None] - gram @ weights.T[..., None]
    # least squares where snapshots are the same but for rounding, as a constant feature's are
    found: Tensor = torch.linalg.lstsq(damped, missed, driver="gelsd").solution
    return found[..., 0].T


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
