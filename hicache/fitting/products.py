"""Inner products of the features of a run's steps with one another: all that is kept to choose places."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Products:
    """Sums over runs; the features of one run are held at a time.

    Every run counts as much: its products are divided by the sum of its features' squares.
    """

    partial: set[str] = field(default_factory=set)  # contexts that begin in the middle of a run: left out
    _sums: dict[str, Tensor] = field(default_factory=dict)  # float64 [T, T] of each context
    _held: dict[str, list[Tensor]] = field(default_factory=dict)  # the run's features so far
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)  # its products so far, a step each

    def take(self, context: str, step: int, feature: Tensor) -> None:
        """A full run has come to a step."""
        if step == 0:
            self._add(context)
        elif context not in self._held:
            self.partial.add(context)
            return
        # squares are the largest terms of a residual that may be a millionth of them: fp32's are not enough
        held = self._held[context]
        held.append(feature.detach().flatten().clone())
        self._rows[context].append(torch.stack([one.double() @ held[-1].double() for one in held]).cpu())

    def sums(self) -> dict[str, Tensor]:
        """Symmetric ``[T, T]``, of every context that begins with the run; T steps, or those it has."""
        for context in list(self._rows):
            self._add(context)
        return dict(self._sums)

    def _add(self, context: str) -> None:
        """The run before is over."""
        rows = self._rows.get(context, [])
        if rows:
            lower = torch.stack([torch.cat([row, row.new_zeros(len(rows) - len(row))]) for row in rows])
            whole = lower + lower.tril(-1).T
            self._sums[context] = self._sums.get(context, 0) + whole / whole.trace().clamp_min(1e-300)
        self._held[context], self._rows[context] = [], []
