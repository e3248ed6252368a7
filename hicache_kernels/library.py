"""The ops as ``torch.ops.hicache.*``: which backend runs them, and what torch.compile must know of them.

Schemas state mutation exactly; every result is written into an ``out`` the caller allocates. An op checks
all its arguments (:mod:`hicache_kernels.checks`) before a kernel is given an address, and so does its fake.
A tensor that requires a gradient is refused: an op without a derivative would give zeros.
:mod:`hicache_kernels.ops` is what to call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from hicache_kernels.backend import Backend
from hicache_kernels.backends import load
from hicache_kernels.checks import check_forecast, check_gated_sum, check_update, check_update_forecast

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


@functools.cache
def pick(op: str, backend: str, device: torch.device, num_orders: int, *dtypes: torch.dtype) -> Backend:
    """The backend to run ``op``: the one asked for, or the first of the device's that can.

    Args:
        op: its name, for errors.
        backend: ``"auto"``, or a name in ``BACKENDS``.
        device: of the tensors.
        num_orders: ``K``.
        dtypes: of the history, and of the base where there is one.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend asked for cannot run these tensors.
    """

    def reason(name: str) -> str | None:
        return BACKENDS[name].unavailable(device) or BACKENDS[name].unsupported(dtypes, num_orders)

    if backend == "auto":
        names = _PREFERENCE.get(device.type, ("reference",))
        return BACKENDS[next(name for name in names if reason(name) is None)]
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
    if why := reason(backend):
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {why}")
    return BACKENDS[backend]


def _register(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Define an op; decorates what takes its arguments and whether they are ``in_memory``.

    That checks them, and runs if they are; a fake only checks.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        name = schema.split("(")[0]
        op = getattr(torch.ops.hicache, name).default
        names = tuple(inspect.signature(function).parameters)[1:]
        _LIBRARY.impl(name, functools.partial(function, True), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, functools.partial(_refuse_gradients, op, names), "Autograd", with_keyset=True)
        # nothing is returned, so there is no shape to derive
        torch.library.register_fake(f"hicache::{name}", functools.partial(function, False), lib=_LIBRARY)
        return function

    return register


def _refuse_gradients(op: Any, names: tuple[str, ...], keys: Any, *arguments: Any) -> None:
    """Raise RuntimeError where autograd would want a derivative, else go on below autograd."""
    if torch.is_grad_enabled():
        for name, value in zip(names, arguments, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{op.overloadpacket.__name__}: expected tensors that require no gradient, got "
                    f"{name} that does; an op has no derivative: call it under torch.no_grad(), or "
                    "detach() the tensor"
                )
    op.redispatch(keys.remove(keys.highestPriorityTypeId()), *arguments)


def _written(*tensors: Tensor) -> None:
    """Tell autograd that tensors were written to; in inference mode nobody asks."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


@_register("update_(Tensor(a!) orders, Tensor inv_gap, int filled, str backend) -> ()")
def _update(in_memory: bool, orders: Tensor, inv_gap: Tensor, filled: int, backend: str) -> None:
    check_update("update_", orders, inv_gap, filled, in_memory)
    if in_memory:
        pick("update_", backend, orders.device, orders.shape[0], orders.dtype).update_(
            orders, inv_gap, filled
        )
        _written(orders)


@_register("forecast(Tensor orders, Tensor coeffs, Tensor(a!) out, str backend) -> ()")
def _forecast(in_memory: bool, orders: Tensor, coeffs: Tensor, out: Tensor, backend: str) -> None:
    check_forecast("forecast", orders, coeffs, out, in_memory)
    if in_memory:
        pick("forecast", backend, orders.device, orders.shape[0], orders.dtype).forecast(orders, coeffs, out)
        _written(out)


@_register(
    "update_forecast_(Tensor(a!) orders, Tensor inv_gap, Tensor coeffs, int filled, Tensor(b!) out, "
    "str backend) -> ()"
)
def _update_forecast(
    in_memory: bool,
    orders: Tensor,
    inv_gap: Tensor,
    coeffs: Tensor,
    filled: int,
    out: Tensor,
    backend: str,
) -> None:
    check_update_forecast("update_forecast_", orders, inv_gap, coeffs, filled, out, in_memory)
    if in_memory:
        chosen = pick("update_forecast_", backend, orders.device, orders.shape[0], orders.dtype)
        chosen.update_forecast_(orders, inv_gap, coeffs, filled, out)
        _written(orders, out)


@_register(
    "gated_sum(Tensor base, Tensor orders, Tensor? gates, Tensor coeffs, Tensor(a!) out, str backend) -> ()"
)
def _gated_sum(
    in_memory: bool,
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    out: Tensor,
    backend: str,
) -> None:
    check_gated_sum("gated_sum", base, orders, gates, coeffs, None, 0, out, in_memory)
    if in_memory:
        chosen = pick("gated_sum", backend, orders.device, orders.shape[0], orders.dtype, base.dtype)
        chosen.gated_sum(base, orders, gates, coeffs, None, 0, out)
        _written(out)


@_register(
    "gated_sum_update_(Tensor base, Tensor(a!) orders, Tensor? gates, Tensor coeffs, Tensor inv_gap, "
    "int filled, Tensor(b!) out, str backend) -> ()"
)
def _gated_sum_update(
    in_memory: bool,
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor,
    filled: int,
    out: Tensor,
    backend: str,
) -> None:
    check_gated_sum("gated_sum", base, orders, gates, coeffs, inv_gap, filled, out, in_memory)
    if in_memory:
        chosen = pick("gated_sum", backend, orders.device, orders.shape[0], orders.dtype, base.dtype)
        chosen.gated_sum(base, orders, gates, coeffs, inv_gap, filled, out)
        _written(orders, out)
