"""The settings of sparse full steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hicache.checks import check_whole, is_number
from hicache.companions.sparse.companion import SparseSteps
from hicache.companions.sparse.layer import Sparsity


@dataclass(frozen=True)
class SparseAttention:
    """Sparse full steps: see docs/companions.md, "Sparse full steps".

    Args:
        keep: share of the picture's columns that a group of rows attends to, in (0, 1]; columns of the text
            are kept in any case. 1 is dense.
        group: rows that share their columns.
        refresh: of the full steps after warm-up, every such one is dense, and takes columns and remainder
            anew.
        dense_layers: attentions at the beginning that are always dense.
        sample: of the rows of a group, every such one is asked which columns those are; ``group`` is a
            multiple of it. All of them cost two passes more at every refresh, and few tell much the same.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    keep: float = 0.15
    group: int = 192
    refresh: int = 3
    dense_layers: int = 2
    sample: int = 4

    def __post_init__(self) -> None:
        if not is_number(self.keep):
            raise TypeError(f"SparseAttention: expected keep to be a number, got {self.keep!r}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"SparseAttention: expected 0 < keep <= 1, got {self.keep!r}")
        check_whole("SparseAttention: group", self.group)
        check_whole("SparseAttention: refresh", self.refresh)
        check_whole("SparseAttention: dense_layers", self.dense_layers, 0)
        check_whole("SparseAttention: sample", self.sample)
        if self.group % self.sample:
            raise ValueError(
                f"SparseAttention: expected group to be a multiple of sample={self.sample}, got {self.group}"
            )

    def beside(self, denoiser: nn.Module) -> SparseSteps:
        """See :class:`hicache.companion.CompanionSettings`."""
        sparsity = Sparsity(float(self.keep), self.group, self.sample)
        return SparseSteps(denoiser, sparsity, self.refresh, self.dense_layers)
