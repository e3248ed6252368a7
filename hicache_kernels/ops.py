"""The public ops: each makes its output and calls the op, which checks and picks a backend.

Everywhere, ``orders`` is ``[K, ...]``: K = O + 1 rows of one history, row ``k`` the k-th finite difference,
each row contiguous. The last row is also the inbox, where a full step writes its new features (see
:class:`hicache_kernels.History`). ``filled`` is num_differences: how many differences exist from earlier
full steps and enter the recursion, 0 … O; rows beyond them are never read, so their memory may hold
anything. ``inv_gap`` is 1 / (steps since the last full step) and ``coeffs`` the forecast's coefficients α,
lowest order first, for all features or ``[num_coeffs, features]``, a row for each feature of ``orders
[K, features, ...]``; both are tensors on the device of ``orders``. Differences and forecasts are computed in
fp32 (float64 for float64) and rounded once, on store.

The ops have no derivative: with gradients enabled, a tensor that requires one is an error. What an op writes
it writes as any in-place op of torch does: the version that autograd compares goes up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicache_kernels import library
from hicache_kernels.library import BACKENDS, auto_backend, backend_status

__all__ = [
    "BACKENDS",
    "auto_backend",
    "backend_status",
    "forecast",
    "gated_sum",
    "update_",
    "update_forecast_",
]


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
        RuntimeError: the named backend cannot run here, or a tensor requires a gradient.
    """
    _check_types("update_", filled, orders=orders, inv_gap=inv_gap)
    library.update_(orders, inv_gap, filled, backend)


def forecast(orders: Tensor, coeffs: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Forecast every slot: ``out = Σ_k coeffs[k] · orders[k]`` over the rows ``coeffs`` names
    (docs/algorithm.md).

    Args:
        orders: ``[K, ...]``, any floating dtype.
        coeffs: ``[number of rows that exist]``, 1 … K of them, or as many ``[…, features]``.
        out: row-shaped result of the history's dtype; allocated when None.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        ``[...]``, one row of forecasts.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``out`` overlaps what is read.
        RuntimeError: the named backend cannot run here, or a tensor requires a gradient.
    """
    _check_types("forecast", orders=orders, coeffs=coeffs)
    if out is None:
        out = orders.new_empty(orders.shape[1:])
    library.forecast(orders, coeffs, out, backend)
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
        coeffs: ``[filled + 1]`` or ``[filled + 1, features]``.
        filled: differences of the previous full step that take part, 0 … K − 1.
        out: row-shaped result of the history's dtype; allocated when None.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        ``[...]``, one row of forecasts, from the differences before they are rounded.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``out`` overlaps what is read.
        RuntimeError: the named backend cannot run here, or a tensor requires a gradient.
    """
    _check_types("update_forecast_", filled, orders=orders, inv_gap=inv_gap, coeffs=coeffs)
    if out is None:
        out = orders.new_empty(orders.shape[1:])
    library.update_forecast_(orders, inv_gap, coeffs, filled, out, backend)
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
        coeffs: ``[number of rows that exist]`` or ``[…, num_features]``; ``filled + 1`` rows with an update
            pending.
        inv_gap: one number, 1 / steps, when an update is pending.
        filled: with an update pending, the differences of the previous full step that take part.
        out: result of base's shape and dtype; allocated when None.
        backend: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        ``[batch, ..., channels]`` of base's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``out`` overlaps what is read.
        RuntimeError: the named backend cannot run here, or a tensor requires a gradient.
    """
    _check_types("gated_sum", filled, base=base, orders=orders, gates=gates, coeffs=coeffs, inv_gap=inv_gap)
    if inv_gap is None and filled:
        raise ValueError(f"gated_sum: expected filled=0 when inv_gap is None, got {filled}")
    if out is None:
        out = torch.empty_like(base)
    if inv_gap is None:
        library.gated_sum(base, orders, gates, coeffs, out, backend)
    else:
        library.gated_sum_update_(base, orders, gates, coeffs, inv_gap, filled, out, backend)
    return out


_OPTIONAL = ("gates", "inv_gap")  # of gated_sum; another op's schema refuses None


def _check_types(op: str, filled: int = 0, **tensors: Tensor | None) -> None:
    """Raise TypeError for what torch would refuse in words of its own, or take for something else."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in _OPTIONAL):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if isinstance(filled, bool) or not isinstance(filled, int):
        raise TypeError(f"{op}: expected filled to be an int, got {filled!r}")
