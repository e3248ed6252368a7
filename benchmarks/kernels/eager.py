"""The ops as a reader of the paper writes them in torch: what the kernels are measured against.

Everything is in the history's own dtype and rounded after every operator. ``eager_*`` go feature by feature;
``foreach_*`` use torch's operators over lists of tensors; ``whole_*`` work on all features as one tensor, the
form that suits ``torch.compile`` best; ``product_*`` are one product of coefficients and history, where an op
is that. In float64 the eager forms are what correctness is judged by.

Arguments: ``orders[k][i]`` is the k-th difference of feature i; ``gap`` the steps since the last full step;
``weights`` the forecast's α, lowest order first; ``gates`` broadcast to a feature, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = Sequence[Sequence[Tensor]]


def _cascade(orders: Sequence[Tensor], gap: float) -> list[Tensor]:
    new = [orders[-1].clone()]  # its memory is overwritten
    for k in range(len(orders) - 1):
        new.append((new[k] - orders[k]) / gap)
    return new


def _update(orders: Sequence[Tensor], gap: float) -> list[Tensor]:
    new = _cascade(orders, gap)
    for kept, difference in zip(orders, new, strict=True):
        kept.copy_(difference)
    return new


def _weigh(differences: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = differences[0] * weights[0]
    for difference, weight in zip(differences[1:], weights[1:], strict=True):
        total = total + difference * weight
    return total


def eager_update(orders: Rows, gap: float) -> None:
    """``update_``."""
    for column in zip(*orders, strict=True):
        _update(column, gap)


def eager_forecast(orders: Rows, weights: Sequence[float], out: Sequence[Tensor]) -> None:
    """``forecast``."""
    for column, result in zip(zip(*orders, strict=True), out, strict=True):
        result.copy_(_weigh(column, weights))


def eager_update_forecast(orders: Rows, gap: float, weights: Sequence[float], out: Sequence[Tensor]) -> None:
    """``update_forecast_``."""
    for column, result in zip(zip(*orders, strict=True), out, strict=True):
        result.copy_(_weigh(_update(column, gap), weights))


def eager_gated_sum(
    base: Tensor, orders: Rows, gates: Sequence[Tensor] | None, weights: Sequence[float], gap: float | None
) -> Tensor:
    """``gated_sum``; with a gap, the pending update too."""
    hidden = base
    for index, column in enumerate(zip(*orders, strict=True)):
        value = _weigh(column if gap is None else _update(column, gap), weights)
        hidden = hidden + (value if gates is None else gates[index] * value)
    return hidden


def _foreach_cascade(orders: Rows, gap: float) -> list[list[Tensor]]:
    # torch 2.11 has no _foreach_clone
    inbox = [torch.empty_like(feature) for feature in orders[-1]]
    torch._foreach_copy_(inbox, list(orders[-1]))
    new = [inbox]
    for k in range(len(orders) - 1):
        difference = list(torch._foreach_sub(new[k], list(orders[k])))
        torch._foreach_div_(difference, gap)
        new.append(difference)
    return new


def _foreach_weigh(differences: Rows, weights: Sequence[float]) -> list[Tensor]:
    total = list(torch._foreach_mul(list(differences[0]), weights[0]))
    for difference, weight in zip(differences[1:], weights[1:], strict=True):
        torch._foreach_add_(total, list(difference), alpha=weight)
    return total


def foreach_update(orders: Rows, gap: float) -> list[list[Tensor]]:
    """``update_``; the new differences."""
    new = _foreach_cascade(orders, gap)
    for kept, difference in zip(orders, new, strict=True):
        torch._foreach_copy_(list(kept), difference)
    return new


def foreach_forecast(orders: Rows, weights: Sequence[float], out: Sequence[Tensor]) -> None:
    """``forecast``."""
    torch._foreach_copy_(list(out), _foreach_weigh(orders, weights))


def foreach_update_forecast(
    orders: Rows, gap: float, weights: Sequence[float], out: Sequence[Tensor]
) -> None:
    """``update_forecast_``."""
    foreach_forecast(foreach_update(orders, gap), weights, out)


def foreach_gated_sum(
    base: Tensor, orders: Rows, gates: Sequence[Tensor] | None, weights: Sequence[float], gap: float | None
) -> Tensor:
    """``gated_sum``; with a gap, the pending update too. No operator over lists sums a list up."""
    values = _foreach_weigh(orders if gap is None else foreach_update(orders, gap), weights)
    if gates is not None:
        torch._foreach_mul_(values, list(gates))
    hidden = base.clone()
    for value in values:
        hidden.add_(value)
    return hidden


_OPS = ("update_", "forecast", "update_forecast_", "gated_sum")
_EAGER = (eager_update, eager_forecast, eager_update_forecast, eager_gated_sum)
_FOREACH = (foreach_update, foreach_forecast, foreach_update_forecast, foreach_gated_sum)
# contestant → op → its form
FORMS: dict[str, dict[str, Callable[..., Any]]] = {
    "eager": dict(zip(_OPS, _EAGER, strict=True)),
    "foreach": dict(zip(_OPS, _FOREACH, strict=True)),
}


def whole_update_forecast(orders: Tensor, gap: float, weights: Sequence[float], out: Tensor) -> None:
    """``update_forecast_`` of ``orders [K, numel]`` into ``out [numel]``."""
    eager_update_forecast([[row] for row in orders.unbind()], gap, weights, [out])


def whole_gated_sum(
    base: Tensor, orders: Tensor, gates: Tensor | None, weights: Sequence[float], gap: float | None
) -> Tensor:
    """``gated_sum`` of ``orders [K, features, batch, tokens, channels]`` with gates
    ``[features, batch, 1, channels]``."""
    differences = orders.unbind()
    value = _weigh(differences if gap is None else _update(differences, gap), weights)
    return base + (value if gates is None else value * gates).sum(0)


def product_forecast(orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
    """``forecast`` of ``orders [K, numel]`` with ``coeffs [1, K]`` into ``out [numel]``."""
    torch.mm(coeffs, orders, out=out[None])


def product_gated_sum(base: Tensor, orders: Tensor, coeffs: Tensor) -> Tensor:
    """``gated_sum`` without gates, of ``orders [K * features, numel]`` with ``coeffs [1, K * features]``."""
    return torch.addmm(base.view(1, -1), coeffs, orders).view_as(base)
