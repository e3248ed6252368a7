"""The ops as ``torch.ops.hicache.*``: which backend runs them, and what torch.compile must know of them.

Schemas state mutation exactly; every result is written into an ``out`` the caller allocates. Arguments are
validated by :mod:`hicache_kernels.ops`, which is what to call; only what needs addresses is checked here,
where tensors have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from hicache_kernels.backend import Backend
from hicache_kernels.backends import load

BACKENDS: Final[dict[str, Backend]] = load()
# "auto" takes the first that can run; never Triton's interpreter, which is for tests
_PREFERENCE: Final = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}

# define/impl rather than custom_op: cheaper to call, and these are called once a step
_LIBRARY: Final = torch.library.Library("hicache", "DEF")


def backend_status(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Name of every backend → why it cannot run on ``device``, or None when it can."""
    return {name: backend.unavailable(torch.device(device)) for name, backend in BACKENDS.items()}


def pick(op: str, backend: str, orders: Tensor, *dtypes: torch.dtype) -> Backend:
    """The backend to run ``op``: the one asked for, or the first of the device's that can.

    Args:
        op: its name, for errors.
        backend: ``"auto"``, or a name in ``BACKENDS``.
        orders: ``[K, ...]``; its device and K count.
        dtypes: of the history, and of the base where there is one.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend asked for cannot run these tensors.
    """
    if backend == "auto":
        for name in _PREFERENCE.get(orders.device.type, ("reference",)):
            candidate = BACKENDS[name]
            if (
                candidate.unavailable(orders.device) or candidate.unsupported(dtypes, orders.shape[0])
            ) is None:
                return candidate
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
    chosen = BACKENDS[backend]
    reason = chosen.unavailable(orders.device) or chosen.unsupported(dtypes, orders.shape[0])
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    return chosen


def _register(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        name = schema.split("(")[0]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        # nothing is returned, so there is no shape to derive
        torch.library.register_fake(f"hicache::{name}", _nothing, lib=_LIBRARY)
        return function

    return register


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@_register("update_(Tensor(a!) orders, Tensor inv_gap, int filled, str backend) -> ()")
def _update(orders: Tensor, inv_gap: Tensor, filled: int, backend: str) -> None:
    _check_aligned("update_", orders=orders, inv_gap=inv_gap)
    pick("update_", backend, orders, orders.dtype).update_(orders, inv_gap, filled)


@_register("forecast(Tensor orders, Tensor coeffs, Tensor(a!) out, str backend) -> ()")
def _forecast(orders: Tensor, coeffs: Tensor, out: Tensor, backend: str) -> None:
    _check_aligned("forecast", orders=orders, coeffs=coeffs, out=out)
    _check_apart("forecast", out, orders)
    pick("forecast", backend, orders, orders.dtype).forecast(orders, coeffs, out)


@_register(
    "update_forecast_(Tensor(a!) orders, Tensor inv_gap, Tensor coeffs, int filled, Tensor(b!) out, "
    "str backend) -> ()"
)
def _update_forecast(
    orders: Tensor, inv_gap: Tensor, coeffs: Tensor, filled: int, out: Tensor, backend: str
) -> None:
    _check_aligned("update_forecast_", orders=orders, inv_gap=inv_gap, coeffs=coeffs, out=out)
    _check_apart("update_forecast_", out, orders)
    chosen = pick("update_forecast_", backend, orders, orders.dtype)
    chosen.update_forecast_(orders, inv_gap, coeffs, filled, out)


@_register(
    "gated_sum(Tensor base, Tensor orders, Tensor? gates, Tensor coeffs, Tensor(a!) out, str backend) -> ()"
)
def _gated_sum(
    base: Tensor, orders: Tensor, gates: Tensor | None, coeffs: Tensor, out: Tensor, backend: str
) -> None:
    _check_aligned("gated_sum", base=base, orders=orders, gates=gates, coeffs=coeffs, out=out)
    _check_sum(base, orders, gates, out)
    chosen = pick("gated_sum", backend, orders, orders.dtype, base.dtype)
    chosen.gated_sum(base, orders, gates, coeffs, None, 0, out)


@_register(
    "gated_sum_update_(Tensor base, Tensor(a!) orders, Tensor? gates, Tensor coeffs, Tensor inv_gap, "
    "int filled, Tensor(b!) out, str backend) -> ()"
)
def _gated_sum_update(
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor,
    filled: int,
    out: Tensor,
    backend: str,
) -> None:
    _check_aligned(
        "gated_sum", base=base, orders=orders, gates=gates, coeffs=coeffs, inv_gap=inv_gap, out=out
    )
    _check_sum(base, orders, gates, out)
    _check_apart("gated_sum", base, orders, "base")
    chosen = pick("gated_sum", backend, orders, orders.dtype, base.dtype)
    chosen.gated_sum(base, orders, gates, coeffs, inv_gap, filled, out)


def _check_aligned(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that starts in the middle of an element: a GPU cannot load it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and tensor.data_ptr() % tensor.itemsize:
            raise ValueError(
                f"{op}: expected {name} at an address divisible by its {tensor.itemsize} bytes a number, got "
                f"{tensor.data_ptr():#x}"
            )


def _check_sum(base: Tensor, orders: Tensor, gates: Tensor | None, out: Tensor) -> None:
    """Raise ValueError when the output of a gated sum overlaps an input it would spoil."""
    _check_apart("gated_sum", out, orders)
    if out.data_ptr() != base.data_ptr():  # in place is fine, every element is read before it is written
        _check_apart("gated_sum", out, base[None], other="base")
    if gates is not None:
        _check_apart("gated_sum", out, gates, other="gates")


def _check_apart(op: str, tensor: Tensor, rows: Tensor, name: str = "out", other: str = "orders") -> None:
    """Raise ValueError when a contiguous tensor shares memory with the span of some rows."""
    if not tensor.numel() or not rows.numel():
        return
    begin, past = tensor.data_ptr(), rows.data_ptr()
    past_end = past + (rows.stride(0) * (rows.shape[0] - 1) + rows[0].numel()) * rows.itemsize
    if begin < past_end and past < begin + tensor.nbytes:
        raise ValueError(f"{op}: expected {name} not to overlap {other} in memory")
