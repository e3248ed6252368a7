"""The memory of past features: K orders of every slot in one allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ALIGNMENT = 128  # bytes: one cache line of a GPU's L2, and every 16-byte vector access stays aligned


def history_nbytes(shapes: Sequence[Sequence[int]], order: int, dtype: torch.dtype) -> int:
    """Bytes a :class:`History` of these features would allocate."""
    return (order + 1) * _offsets(shapes, dtype)[-1] * dtype.itemsize


def _offsets(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[int]:
    """Where every feature begins in a row, in elements, and where the row ends."""
    per_line = ALIGNMENT // dtype.itemsize
    offsets = [0]
    for shape in shapes:
        offsets.append(offsets[-1] + math.ceil(math.prod(shape) / per_line) * per_line)
    return offsets


class History:
    """Finite differences of a fixed set of features, as one tensor ``orders[K, numel]`` with fixed addresses.

    Row ``k`` holds the k-th difference of every feature, each in a slot of its own, at a multiple of 128
    bytes; a whole history is updated or forecast in one launch. The row of the highest order doubles as the
    inbox: a new feature is written there, and :func:`hicache_kernels.update_` turns it into differences (the
    old highest difference never enters the recursion, so nothing is lost). The memory is not initialised.

    Args:
        shapes: shape of each feature, in slot order.
        order: highest difference kept, ``O``; ``K = O + 1`` rows are allocated.
        dtype: a floating-point dtype, for all slots.
        device: where the memory lives.

    Raises:
        ValueError: no shapes, a negative order, or a dtype that is not floating point.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        order: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not shapes:
            raise ValueError("History: expected at least one feature shape, got none")
        if order < 0:
            raise ValueError(f"History: expected order >= 0, got {order}")
        if not dtype.is_floating_point:
            raise ValueError(f"History: expected a floating-point dtype, got {dtype}")
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.order = order
        *self._offsets, end = _offsets(self.shapes, dtype)
        # A history outlives the mode of the run that made it: an inference tensor could not be updated
        # outside.
        with torch.inference_mode(False):
            self.orders = torch.empty(order + 1, end, dtype=dtype, device=device)  # [K, numel]
            # asked for at every skipped step
            alike = len(set(self.shapes)) == 1
            self._by_feature = self.orders.view(order + 1, len(self.shapes), -1) if alike else None
        # padding is read by kernels that work on whole rows; stale bytes there must not raise or slow
        # arithmetic
        for offset, shape, stop in zip(self._offsets, self.shapes, [*self._offsets[1:], end], strict=True):
            self.orders[:, offset + shape.numel() : stop].zero_()

    def slot(self, index: int, order: int) -> torch.Tensor:
        """View of one difference of one feature, in the feature's shape."""
        return self._view(self.orders[order], index)

    def inbox(self, index: int) -> torch.Tensor:
        """View of the slot that receives feature ``index`` at a full step."""
        return self.slot(index, self.order)

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Views of a row of forecasts ``[numel]``, one a feature, in the features' shapes."""
        return [self._view(row, index) for index in range(len(self.shapes))]

    def orders_by_feature(self) -> torch.Tensor:
        """View of the history as ``[K, num_features, slot]``, for :func:`hicache_kernels.gated_sum`.

        All features have one shape; ``slot`` is a feature's elements and its padding.

        Raises:
            ValueError: the features differ in shape.
        """
        if self._by_feature is None:
            raise ValueError(
                "History.orders_by_feature: expected features of one shape, got "
                f"{[tuple(s) for s in self.shapes]}"
            )
        return self._by_feature

    def terms(self) -> torch.Tensor:
        """The name :meth:`orders_by_feature` had."""
        return self.orders_by_feature()

    def _view(self, row: torch.Tensor, index: int) -> torch.Tensor:
        offset, shape = self._offsets[index], self.shapes[index]
        return row[offset : offset + shape.numel()].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: all orders, padding included."""
        return self.orders.nbytes

    def __repr__(self) -> str:
        return (
            f"History({len(self.shapes)} features, order={self.order}, {self.orders.dtype}, "
            f"{self.orders.device}, {self.nbytes:,} bytes)"
        )
