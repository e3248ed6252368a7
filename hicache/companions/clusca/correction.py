"""What a skipped step with clusters does beside its sum: the MLPs of double blocks on drawn tokens.

With tokens drawn once a step, what they change in the hidden state after all blocks is the same for every
token of a cluster but the drawn one: a table ``[batch, 2 · clusters, channels]``, added with one gather to
the one sum over the history (docs/companions.md has the algebra).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hicache.companions.clusca.draws import Groups
from hicache.companions.clusca.modules import Mlp, Mlps, history_by_tokens
from hicache.companions.clusca.places import Places
from hicache.companions.clusca.settings import ClusCa
from hicache.engine import Sum


@dataclass(frozen=True)
class ClusterCorrection:
    """Of one skipped step; a :class:`~hicache.step_plan.Correction`.

    Args:
        settings: of the clusters.
        mlps: of the model.
        present: those of them that this call has.
        places: has the clusters.
        weights: how much each feature's forecast counts in the sum, float64 ``[num_features]``; None: all of
            it.
        numbers: that tokens are drawn by, ``[blocks or 1, clusters]``.
        finds: whether clusters are to be found in this step, in what enters the first block.
    """

    settings: ClusCa
    mlps: Mlps
    present: tuple[Mlp, ...]
    places: Places
    weights: Tensor | None
    numbers: Tensor
    finds: bool

    @property
    def inputs(self) -> list[Tensor]:
        return [self.numbers]

    def with_inputs(self, tensors: list[Tensor]) -> ClusterCorrection:
        [numbers] = tensors
        return dataclasses.replace(self, numbers=numbers)

    @property
    def form(self) -> tuple[Any, ...]:
        return self.finds, *(mlp.feature for mlp in self.present)

    @property
    def fixed(self) -> list[Tensor]:
        return self.places.memory if self.weights is None else [*self.places.memory, self.weights]

    def __call__(self, total: Sum, base: Tensor, gates: Tensor, block_kwargs: Mapping[str, Any]) -> Tensor:
        if self.finds:
            self.places.find(base)
        groups = self.places.groups
        if self.settings.variant == "upstream":
            self._edit(groups, total, base, gates, block_kwargs)
            return total(base, gates)
        drawn = groups.draw(self.numbers[0])
        others, own = self._tables(total, drawn, base, gates, block_kwargs)
        table = torch.cat([others, own], dim=1)  # [B, 2 · C, D]
        index = groups.labels + others.shape[1] * groups.are_drawn(drawn)
        if self.weights is not None:
            rows = total.coeffs if total.coeffs.ndim == 2 else total.coeffs[:, None]
            coeffs = (rows * self.weights).to(rows.dtype)  # [num_coeffs, num_features]
            total = dataclasses.replace(total, coeffs=coeffs)
        return total(base, gates).add_(_rows(table, index))

    def _tables(
        self, total: Sum, drawn: Tensor, base: Tensor, gates: Tensor, block_kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What is added for the other tokens of each cluster, and for the drawn one, ``[B, C, D]`` each."""
        count = 1 + max(mlp.feature for mlp in self.present)
        features = history_by_tokens(total.orders[:, :count], base.shape)
        samples = torch.arange(len(base), device=base.device)[:, None]
        ahead = total.ahead(features[:, :, samples, drawn]).to(base.dtype)  # [features, B, C, D]
        run = self.mlps.on_rows(self.present, block_kwargs, base)
        hidden = _rows(base, drawn)
        computed = torch.zeros_like(hidden, dtype=_wide(base.dtype))  # Σ gate ⊙ v
        off = torch.zeros_like(computed)  # Σ gate ⊙ (v − forecast)
        for mlp, on_rows in zip(self.present, run, strict=True):
            for feature in mlp.before:
                hidden = hidden + gates[feature][:, None] * ahead[feature]
            value, gate = on_rows(hidden), gates[mlp.feature][:, None]
            hidden = hidden + gate * value
            computed = torch.addcmul(computed, gate, value)
            off = torch.addcmul(off, gate, value.to(off.dtype) - ahead[mlp.feature])
        if self.settings.variant == "residual":
            return self.settings.kappa * off, off
        rho = self.settings.rho
        return rho * computed, rho * computed + (1 - rho) * off

    def _edit(
        self, groups: Groups, total: Sum, base: Tensor, gates: Tensor, block_kwargs: Mapping[str, Any]
    ) -> None:
        """Write values into the newest features of the history, block by block: a later one sees them."""
        samples = torch.arange(len(base), device=base.device)[:, None]
        run = self.mlps.on_rows(self.present, block_kwargs, base)
        passed: list[int] = []
        blocks = [self.mlps.all.index(mlp) for mlp in self.present]
        for block, mlp, on_rows in zip(blocks, self.present, run, strict=True):
            passed += mlp.before
            drawn = groups.draw(self.numbers[block])
            features = history_by_tokens(total.orders[:, : max(*passed, mlp.feature) + 1], base.shape)
            ahead = total.ahead(features[:, :, samples, drawn]).to(base.dtype)
            hidden = _rows(base, drawn)
            for feature in passed:
                hidden = hidden + gates[feature][:, None] * ahead[feature]
            value = on_rows(hidden)
            passed.append(mlp.feature)
            newest = features[0, mlp.feature]
            wide = _wide(newest.dtype)
            own = _rows(value.to(wide), groups.labels)
            blended = self.settings.rho * own + (1 - self.settings.rho) * newest.to(wide)
            newest.copy_(torch.where(groups.are_drawn(drawn)[..., None], own, blended))


def _rows(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Rows of ``[batch, tokens, channels]``, by their indices ``[batch, rows]``."""
    return hidden.gather(1, tokens[..., None].expand(-1, -1, hidden.shape[-1]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What values are blended in."""
    return torch.promote_types(dtype, torch.float32)
