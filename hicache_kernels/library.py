"""The ops as ``torch.ops.hicache.*``: which backend runs them, and what torch.compile must know of them.

Schemas state mutation exactly; every result is written into an ``out`` the caller allocates. Arguments are
validated by :mod:`hicache_kernels.ops`, which is what to call; only what needs addresses is checked here,
where tensors have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from hicache_kernels.backend import Backend
from hicache_kernels.backends import load

BACKENDS: Final[dict[str, Backend]] = load()
# "auto" takes the first that can run; never Triton's interpreter, which is for tests. On an H100 Triton is
# the faster where an op takes longer than its launch (benchmarks/results).
_PREFERENCE: Final = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}


def _namespace() -> torch.library.Library:
    """``torch.ops.hicache``, to define ops in.

    Raises:
        ImportError: this process has it already.
    """
    try:
        return torch.library.Library("hicache", "DEF")
    except RuntimeError as error:
        raise ImportError(
            "hicache_kernels: expected to be imported once in a process, and torch.ops.hicache is there "
            "already: from before a reload, or from another copy of the package; start a new process"
        ) from error


# define/impl rather than custom_op: cheaper to call, and these are called once a step
_LIBRARY: Final = _namespace()


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
            if _reason(BACKENDS[name], orders, dtypes) is None:
                return BACKENDS[name]
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
    reason = _reason(BACKENDS[backend], orders, dtypes)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    return BACKENDS[backend]


def _reason(backend: Backend, orders: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a backend cannot run these tensors; None when it can."""
    return backend.unavailable(orders.device) or backend.unsupported(dtypes, orders.shape[0])


def _register(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        name = schema.split("(")[0]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        # nothing is returned, so there is no shape to derive
        torch.library.register_fake(f"hicache::{name}", lambda *_, **__: None, lib=_LIBRARY)
        return function

    return register


@_register("update_(Tensor(a!) orders, Tensor inv_gap, int filled, str backend) -> ()")
def _update(orders: Tensor, inv_gap: Tensor, filled: int, backend: str) -> None:
    _checked("update_", backend, orders, inv_gap=inv_gap).update_(orders, inv_gap, filled)


@_register("forecast(Tensor orders, Tensor coeffs, Tensor(a!) out, str backend) -> ()")
def _forecast(orders: Tensor, coeffs: Tensor, out: Tensor, backend: str) -> None:
    _checked("forecast", backend, orders, coeffs=coeffs, out=out).forecast(orders, coeffs, out)


@_register(
    "update_forecast_(Tensor(a!) orders, Tensor inv_gap, Tensor coeffs, int filled, Tensor(b!) out, "
    "str backend) -> ()"
)
def _update_forecast(
    orders: Tensor, inv_gap: Tensor, coeffs: Tensor, filled: int, out: Tensor, backend: str
) -> None:
    chosen = _checked("update_forecast_", backend, orders, inv_gap=inv_gap, coeffs=coeffs, out=out)
    chosen.update_forecast_(orders, inv_gap, coeffs, filled, out)


@_register(
    "gated_sum(Tensor base, Tensor orders, Tensor? gates, Tensor coeffs, Tensor(a!) out, str backend) -> ()"
)
def _gated_sum(
    base: Tensor, orders: Tensor, gates: Tensor | None, coeffs: Tensor, out: Tensor, backend: str
) -> None:
    _gated_sum_update(base, orders, gates, coeffs, None, 0, out, backend)


@_register(
    "gated_sum_update_(Tensor base, Tensor(a!) orders, Tensor? gates, Tensor coeffs, Tensor inv_gap, "
    "int filled, Tensor(b!) out, str backend) -> ()"
)
def _gated_sum_update(
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor | None,
    filled: int,
    out: Tensor,
    backend: str,
) -> None:
    others = {"gates": gates, "coeffs": coeffs, "inv_gap": inv_gap, "out": out}
    chosen = _checked("gated_sum", backend, orders, base, **others)
    chosen.gated_sum(base, orders, gates, coeffs, inv_gap, filled, out)


def _checked(
    op: str, backend: str, orders: Tensor, base: Tensor | None = None, **others: Tensor | None
) -> Backend:
    """The backend to run ``op``, once its tensors, by name, are where a kernel can load and store them.

    Raises:
        ValueError: a tensor starts in the middle of an element, which a GPU cannot load; ``out``, or a base
            while the history is updated, overlaps what is read; or as :func:`pick`.
        RuntimeError: as :func:`pick`.
    """
    for name, tensor in {"base": base, "orders": orders, **others}.items():
        if tensor is not None and tensor.numel() and tensor.data_ptr() % tensor.itemsize:
            raise ValueError(
                f"{op}: expected {name} at an address divisible by its {tensor.itemsize} bytes a number, got "
                f"{tensor.data_ptr():#x}"
            )
    if (out := others.get("out")) is not None:
        _check_apart(op, out, orders)
        if base is not None and out.data_ptr() != base.data_ptr():
            # in place is fine, every element is read before it is written
            _check_apart(op, out, base[None], other="base")
        if (gates := others.get("gates")) is not None:
            _check_apart(op, out, gates, other="gates")
    if base is None:
        return pick(op, backend, orders, orders.dtype)
    if others.get("inv_gap") is not None:
        _check_apart(op, base, orders, "base")
    return pick(op, backend, orders, orders.dtype, base.dtype)


def _check_apart(op: str, tensor: Tensor, rows: Tensor, name: str = "out", other: str = "orders") -> None:
    """Raise ValueError when a contiguous tensor shares memory with the span of some rows."""
    if not tensor.numel() or not rows.numel():
        return
    begin, past = tensor.data_ptr(), rows.data_ptr()
    past_end = past + (rows.stride(0) * (rows.shape[0] - 1) + rows[0].numel()) * rows.itemsize
    if begin < past_end and past < begin + tensor.nbytes:
        raise ValueError(f"{op}: expected {name} not to overlap {other} in memory")
