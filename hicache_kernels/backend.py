"""What a backend is: a module of :mod:`hicache_kernels.backends` with these names."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Backend(Protocol):
    """One implementation of the four ops.

    Arguments come from :mod:`hicache_kernels.library`, checked: shapes and dtypes as below, everything on
    the device of ``orders``, at aligned addresses, no output over an input but ``out`` on ``base``.
    ``orders`` has ``K`` rows, each contiguous, in strides that do not overlap; the last is the inbox. Each
    op is specified by :mod:`hicache_kernels.backends.reference` and raises only what its device raises.
    """

    @property
    def name(self) -> str:
        """What ``backend=`` calls it: the name of its module."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``; None when it can."""

    def unsupported(self, dtypes: tuple[torch.dtype, ...], num_orders: int) -> str | None:
        """Why it cannot take these dtypes (history, then base where there is one) and ``K`` orders.

        None when it can.
        """

    def update_(self, orders: Tensor, inv_gap: Tensor, num_differences: int) -> None:
        """Update ``orders[K, ...]`` in place; ``inv_gap`` is one number."""

    def forecast(self, orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
        """Write the forecast of ``orders[K, ...]`` with ``coeffs[num_coeffs]`` into ``out[...]``."""

    def update_forecast_(
        self, orders: Tensor, inv_gap: Tensor, coeffs: Tensor, num_differences: int, out: Tensor
    ) -> None:
        """Update ``orders[K, ...]`` in place and write the forecast with ``coeffs[num_differences + 1]``."""

    def gated_sum(
        self,
        base: Tensor,
        orders: Tensor,
        gates: Tensor | None,
        coeffs: Tensor,
        inv_gap: Tensor | None,
        num_differences: int,
        out: Tensor,
    ) -> None:
        """Write the gated sum of ``orders[K, num_features, slot]`` and ``base[batch, ..., channels]``.

        ``gates`` are ``[num_features, batch, channels]``, or None for ones; with ``inv_gap`` an update is
        pending and is done too.
        """
