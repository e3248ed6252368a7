"""The ops in readable torch: any device, any floating dtype, any order. This file is the specification.

Arithmetic is in high precision, which is float64 for float64 and fp32 for every other dtype; a result is
rounded once, when it is stored. Formulas are those of docs/algorithm.md ("Finite differences", "Forecast",
"A skipped step is one sum", "Lazy update").

- ``orders[K, ...]``: ``orders[k]`` holds the difference D_k; the last row holds F while an update is due.
- ``num_differences``: old differences that exist and enter the recursion, 0 … K − 1.
- ``inv_gap``: 1 / h, h the steps between the last two full steps.
- ``coeffs[num_coeffs]``: α_0 …, one for each order that exists; or ``[num_coeffs, features]``, a row for each
  feature of ``orders[K, features, ...]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:  # mypy compares this module with what a backend is
    from hicache_kernels.backend import Backend
    from hicache_kernels.backends import reference as this_module

    _: Backend = this_module

name: Final = "reference"


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``: it runs everywhere."""
    return None


def unsupported(dtypes: tuple[torch.dtype, ...], num_orders: int) -> str | None:
    """Why this backend cannot take these dtypes and this many orders: it takes all."""
    return None


def _high(x: Tensor) -> Tensor:
    """``x`` in the precision arithmetic is done in; ``x`` itself where it has it already."""
    return x if x.dtype == torch.float64 else x.float()


def _cascade(orders: Tensor, inv_gap: Tensor, num_differences: int) -> list[Tensor]:
    """New differences, not rounded: D_0 ← F; D_{i+1} ← (D_i new − D_i old) / h for i < ``num_differences``.

    Args:
        orders: ``[K, ...]``, F in the last row.
        inv_gap: one number.

    Returns:
        ``num_differences + 1`` tensors ``[...]`` in high precision. The first may be a view of the inbox.
    """
    inv_gap = inv_gap.to(_high(orders[:0]).dtype)
    new = [_high(orders[-1])]
    for i in range(num_differences):
        new.append((new[i] - _high(orders[i])) * inv_gap)
    return new


def _evaluate(differences: list[Tensor], coeffs: Tensor) -> Tensor:
    """``Σ_k coeffs[k] · differences[k]``, lowest order first, of the shape of a difference."""
    coeffs = coeffs.to(differences[0].dtype)
    if coeffs.ndim == 2:  # [num_coeffs, features, 1 …]
        coeffs = coeffs.reshape(*coeffs.shape, *[1] * (differences[0].ndim - 1))
    total = differences[0] * coeffs[0]
    for k in range(1, len(differences)):
        total = total + differences[k] * coeffs[k]
    return total


def _store(orders: Tensor, new: list[Tensor]) -> None:
    """Round the new differences into rows 0 … of ``orders[K, ...]``; the other rows stay as they are."""
    # new[0] may be a view of the inbox, which is the last row written: whoever needs it later must read it
    # before
    for k, difference in enumerate(new):
        orders[k].copy_(difference)


def update_(orders: Tensor, inv_gap: Tensor, num_differences: int) -> None:
    """D_0 ← F; D_{i+1} ← (D_i new − D_i old) / h for i < ``num_differences``, in place.

    Every new difference is computed from the ones before it as they were before rounding.

    Args:
        orders: ``[K, ...]``; rows 0 … ``num_differences`` are written.
        inv_gap: one number, 1 / h.
        num_differences: rows 0 … ``num_differences − 1`` hold differences of the full step before; rows from
            there to the inbox are not read.
    """
    _store(orders, _cascade(orders, inv_gap, num_differences))


def forecast(orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
    """``out = Σ_k coeffs[k] · D_k``.

    Args:
        orders: ``[K, ...]``; rows 0 … ``num_coeffs − 1`` are read.
        coeffs: ``[num_coeffs]``, or ``[num_coeffs, features]``.
        out: ``[...]``, a row, of the dtype of ``orders``.
    """
    out.copy_(_evaluate([_high(orders[k]) for k in range(len(coeffs))], coeffs))


def update_forecast_(
    orders: Tensor, inv_gap: Tensor, coeffs: Tensor, num_differences: int, out: Tensor
) -> None:
    """:func:`update_`, and the forecast from the new differences before they are rounded.

    Args:
        orders: ``[K, ...]``; updated in place.
        inv_gap: one number, 1 / h.
        coeffs: ``[num_differences + 1]``, or ``[num_differences + 1, features]``.
        num_differences: as in :func:`update_`.
        out: ``[...]``, a row, of the dtype of ``orders``.
    """
    new = _cascade(orders, inv_gap, num_differences)
    out.copy_(_evaluate(new, coeffs))
    _store(orders, new)


def gated_sum(
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor | None,
    num_differences: int,
    out: Tensor,
) -> None:
    """``out = base + Σ_i gates[i] ⊙ Σ_k coeffs[k] · D_{k,i}``: a whole skipped step.

    With ``inv_gap`` an update is pending: it is done first, as :func:`update_` does, and the sum is of the
    new differences before they are rounded. Features are added one after the other, the first to the base,
    in the high precision of the history or the base, whichever is higher; the sum is rounded once.

    Args:
        base: ``[batch, ..., channels]``.
        orders: ``[K, num_features, slot]``; the first ``base.numel()`` elements of a slot are one feature, in
            base's shape, and the others are neither read nor written.
        gates: ``[num_features, batch, channels]``, one for all elements of a sample and channel; None for
            ones.
        coeffs: ``[num_coeffs]`` or ``[num_coeffs, num_features]``; with an update pending ``num_coeffs`` is
            ``num_differences + 1``.
        inv_gap: one number, 1 / h, or None.
        num_differences: as in :func:`update_`; of no meaning without ``inv_gap``.
        out: of base's shape and dtype; may be ``base`` itself.
    """
    total = _high(base)
    batch, channels = base.shape[0], base.shape[-1]
    for feature in range(orders.shape[1]):
        slot = orders[:, feature, : base.numel()]  # [K, numel]
        if inv_gap is not None:
            differences = _cascade(slot, inv_gap, num_differences)
        else:
            differences = [_high(slot[k]) for k in range(len(coeffs))]
        row = coeffs if coeffs.ndim == 1 else coeffs[:, feature]
        value = _evaluate(differences, row).view(base.shape)
        if inv_gap is not None:
            _store(slot, differences)
        if gates is not None:  # [batch, 1 …, channels]
            value = value * _high(gates[feature]).view(batch, *[1] * (base.ndim - 2), channels)
        total = total + value
    out.copy_(total)
