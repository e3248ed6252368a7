"""The ops in readable torch: any device, any floating dtype, any order. This file is the specification.

Arithmetic is in fp32 (float64 for float64 histories) and is rounded once, on store.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``; None when it can."""
    return None


def unsupported(dtypes: tuple[torch.dtype, ...], num_orders: int) -> str | None:
    """Why this backend cannot take these dtypes and this many orders; None when it can."""
    return None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cascade(orders: Tensor, inv_gap: Tensor, filled: int) -> list[Tensor]:
    """New differences, unrounded: D0 ← F, D(i+1) ← (Di new − Di old) / gap (docs/algorithm.md)."""
    new = [_wide(orders[-1])]
    for i in range(filled):
        new.append((new[i] - _wide(orders[i])) * inv_gap)
    return new


def _evaluate(differences: list[Tensor], coeffs: Tensor) -> Tensor:
    total = differences[0] * coeffs[0]
    for k in range(1, len(differences)):
        total = total + differences[k] * coeffs[k]
    return total


def _store(orders: Tensor, new: list[Tensor]) -> None:
    # new[0] may be a view of the inbox, which is the last row written: whoever needs it later must read it
    # before
    for k, difference in enumerate(new):
        orders[k].copy_(difference)


def update_(orders: Tensor, inv_gap: Tensor, filled: int) -> None:
    _store(orders, _cascade(orders, inv_gap.to(_wide(orders[:0]).dtype), filled))


def forecast(orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
    kept = [_wide(orders[k]) for k in range(len(coeffs))]
    out.copy_(_evaluate(kept, coeffs.to(kept[0].dtype)))


def update_forecast_(orders: Tensor, inv_gap: Tensor, coeffs: Tensor, filled: int, out: Tensor) -> None:
    new = _cascade(orders, inv_gap.to(_wide(orders[:0]).dtype), filled)
    out.copy_(_evaluate(new, coeffs.to(new[0].dtype)))
    _store(orders, new)


def gated_sum(
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor | None,
    filled: int,
    out: Tensor,
) -> None:
    total = _wide(base)
    batch, channels = base.shape[0], base.shape[-1]
    for term in range(orders.shape[1]):
        slot = orders[:, term, : base.numel()]  # [K, numel]
        if inv_gap is not None:
            differences = _cascade(slot, inv_gap.to(_wide(slot[:0]).dtype), filled)
        else:
            differences = [_wide(slot[k]) for k in range(len(coeffs))]
        value = _evaluate(differences, coeffs.to(differences[0].dtype)).view(base.shape)
        if inv_gap is not None:
            _store(slot, differences)
        if gates is not None:
            value = value * _wide(gates[term]).view(batch, *[1] * (base.ndim - 2), channels)
        total = total + value
    out.copy_(total)
