"""The public ops: each validates its arguments and calls the registered op, which picks a backend.

Everywhere, ``orders`` is ``[K, ...]``: K = O + 1 rows of one history, row ``k`` the k-th finite difference,
each row contiguous. The last row is also the inbox, where a full step writes its new features (see
:class:`hicache_kernels.History`). ``filled`` is num_differences: how many differences exist from earlier
full steps and enter the recursion, 0 … O; rows beyond them are never read, so their memory may hold
anything. ``inv_gap`` is 1 / (steps since the last full step) and ``coeffs`` the forecast's coefficients α,
lowest order first; both are tensors on the device of ``orders``. Differences and forecasts are computed in
fp32 (float64 for float64) and rounded once, on store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicache_kernels.library import BACKENDS, backend_status

__all__ = ["BACKENDS", "backend_status", "forecast", "gated_sum", "update_", "update_forecast_"]

_OPS = torch.ops.hicache


def update_(orders: Tensor, inv_gap: Tensor, filled: int, *, backend: str = "auto") -> None:
    """Take the features in the inbox into the history: the difference cascade, in place, one pass for all
    slots.

    D0 ← F; D(i+1) ← (Di new − Di old) · inv_gap for i < ``filled`` (arXiv 2503.06923; docs/algorithm.md).
    Rows 0 … ``filled`` are written, the others left alone.

    Args:
        orders: ``[K, ...]``, any floating dtype.
        inv_gap: one number, 1 / steps.
        filled: differences of the previous full step that take part, 0 … K − 1.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the named backend cannot run here.
    """
    _check_orders("update_", orders)
    _check_update("update_", inv_gap, filled, orders)
    _OPS.update_.default(orders, inv_gap, filled, backend)


def forecast(orders: Tensor, coeffs: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Forecast every slot: ``out = Σ_k coeffs[k] · orders[k]`` over the rows ``coeffs`` names
    (docs/algorithm.md).

    Args:
        orders: ``[K, ...]``, any floating dtype.
        coeffs: ``[number of rows that exist]``, 1 … K of them.
        out: row-shaped result of the history's dtype; allocated when None.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        ``[...]``, one row of forecasts.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``out`` overlaps ``orders``.
        RuntimeError: the named backend cannot run here.
    """
    _check_orders("forecast", orders)
    _check_coeffs("forecast", coeffs, orders, None)
    out = _output("forecast", out, orders[0])
    _OPS.forecast.default(orders, coeffs, out, backend)
    return out


def update_forecast_(
    orders: Tensor,
    inv_gap: Tensor,
    coeffs: Tensor,
    filled: int,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`update_` and :func:`forecast` in one pass: each input is read once and each output written once.

    Args:
        orders: ``[K, ...]``, any floating dtype; updated in place.
        inv_gap: one number, 1 / steps.
        coeffs: ``[filled + 1]``.
        filled: differences of the previous full step that take part, 0 … K − 1.
        out: row-shaped result of the history's dtype; allocated when None.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        ``[...]``, one row of forecasts, from the differences before they are rounded.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``out`` overlaps ``orders``.
        RuntimeError: the named backend cannot run here.
    """
    _check_orders("update_forecast_", orders)
    _check_update("update_forecast_", inv_gap, filled, orders)
    _check_coeffs("update_forecast_", coeffs, orders, filled + 1)
    out = _output("update_forecast_", out, orders[0])
    _OPS.update_forecast_.default(orders, inv_gap, coeffs, filled, out, backend)
    return out


def gated_sum(
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    *,
    inv_gap: Tensor | None = None,
    filled: int = 0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A whole skipped step: ``base + Σ_i gates[i] ⊙ Σ_k coeffs[k] · orders[k, i]``.

    See docs/algorithm.md, "A skipped step is one sum".

    With ``inv_gap`` given, an update is pending: it is done in the same pass, as :func:`update_forecast_`
    would (docs/algorithm.md, "Lazy update").

    Args:
        base: ``[batch, ..., channels]``, the hidden state that enters the blocks.
        orders: ``[K, num_features, slot]`` with ``slot >= base.numel()``, of any floating dtype; the first
            ``base.numel()`` elements of a slot are one feature.
            :meth:`hicache_kernels.History.orders_by_feature` gives it.
        gates: ``[num_features, batch, channels]`` of base's dtype, or None for gates of one.
        coeffs: ``[number of rows that exist]``; ``[filled + 1]`` with an update pending.
        inv_gap: one number, 1 / steps, when an update is pending.
        filled: with an update pending, the differences of the previous full step that take part.
        out: result of base's shape and dtype; allocated when None.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        ``[batch, ..., channels]`` of base's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``out`` overlaps ``orders``.
        RuntimeError: the named backend cannot run here.
    """
    _check_orders("gated_sum", orders)
    if orders.ndim != 3 or orders.shape[1] < 1:
        raise ValueError(
            "gated_sum: expected orders [K, num_features, slot] with num_features >= 1, got shape "
            f"{tuple(orders.shape)}"
        )
    if base.ndim < 2 or not base.is_contiguous():
        raise ValueError(f"gated_sum: expected a contiguous base [batch, ..., channels], got {_layout(base)}")
    _check_device("gated_sum", "base", base, orders)
    if not base.dtype.is_floating_point:
        raise ValueError(f"gated_sum: expected a floating-point base, got {base.dtype}")
    if orders.shape[2] < base.numel():
        raise ValueError(
            f"gated_sum: expected slots of at least {base.numel()} elements, got {orders.shape[2]}"
        )
    if gates is not None:
        expected = (orders.shape[1], base.shape[0], base.shape[-1])
        if tuple(gates.shape) != expected or gates.dtype != base.dtype or not gates.is_contiguous():
            raise ValueError(
                f"gated_sum: expected contiguous gates {expected} of {base.dtype}, got shape "
                f"{tuple(gates.shape)} of {gates.dtype} with strides {gates.stride()}"
            )
        _check_device("gated_sum", "gates", gates, orders)
    if inv_gap is not None:
        _check_update("gated_sum", inv_gap, filled, orders)
    elif filled:
        raise ValueError(f"gated_sum: expected filled=0 when inv_gap is None, got {filled}")
    _check_coeffs("gated_sum", coeffs, orders, None if inv_gap is None else filled + 1)
    out = _output("gated_sum", out, base)
    if inv_gap is None:
        _OPS.gated_sum.default(base, orders, gates, coeffs, out, backend)
    else:
        _OPS.gated_sum_update_.default(base, orders, gates, coeffs, inv_gap, filled, out, backend)
    return out


def _layout(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"


def _check_orders(op: str, orders: Tensor) -> None:
    if not isinstance(orders, Tensor):
        raise TypeError(f"{op}: expected orders to be a tensor, got {type(orders).__name__}")
    if orders.ndim < 2 or orders.shape[0] < 1 or not orders.dtype.is_floating_point:
        raise ValueError(
            f"{op}: expected floating-point orders [K, ...] with K >= 1, got {orders.dtype} of shape "
            f"{tuple(orders.shape)}"
        )
    row = orders[0]
    if not row.is_contiguous() or (orders.shape[0] > 1 and orders.stride(0) < row.numel()):
        raise ValueError(
            f"{op}: expected orders with contiguous rows that do not overlap, got {_layout(orders)}"
        )


def _check_device(op: str, name: str, tensor: Tensor, orders: Tensor) -> None:
    if tensor.device != orders.device:
        raise ValueError(f"{op}: expected {name} on {orders.device}, as orders, got {tensor.device}")


def _check_update(op: str, inv_gap: Tensor, filled: int, orders: Tensor) -> None:
    if not isinstance(inv_gap, Tensor) or inv_gap.numel() != 1 or not inv_gap.dtype.is_floating_point:
        raise TypeError(
            f"{op}: expected inv_gap to be a floating-point tensor of one number, got {inv_gap!r}"
        )
    _check_device(op, "inv_gap", inv_gap, orders)
    if isinstance(filled, bool) or not isinstance(filled, int):
        raise TypeError(f"{op}: expected filled to be an int, got {filled!r}")
    if not 0 <= filled < orders.shape[0]:
        raise ValueError(f"{op}: expected 0 <= filled <= {orders.shape[0] - 1}, got {filled}")


def _check_coeffs(op: str, coeffs: Tensor, orders: Tensor, expected: int | None) -> None:
    if not isinstance(coeffs, Tensor) or coeffs.ndim != 1 or not coeffs.dtype.is_floating_point:
        raise TypeError(
            f"{op}: expected coeffs to be a floating-point tensor of one dimension, got {coeffs!r}"
        )
    if expected is not None and len(coeffs) != expected:
        raise ValueError(f"{op}: expected {expected} coeffs (filled + 1), got {len(coeffs)}")
    if not 1 <= len(coeffs) <= orders.shape[0]:
        raise ValueError(f"{op}: expected 1 to {orders.shape[0]} coeffs, one an order, got {len(coeffs)}")
    _check_device(op, "coeffs", coeffs, orders)


def _output(op: str, out: Tensor | None, like: Tensor) -> Tensor:
    if out is None:
        return torch.empty_like(like)
    alike = out.shape == like.shape and out.dtype == like.dtype and out.device == like.device
    if not alike or not out.is_contiguous():
        raise ValueError(
            f"{op}: expected a contiguous out of shape {tuple(like.shape)}, {like.dtype} on {like.device}, "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device} with strides {out.stride()}"
        )
    return out
