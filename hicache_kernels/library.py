"""The ops as ``torch.ops.hicache.*``: which backend runs them, and what torch.compile must know of them.

Schemas state mutation exactly; every result is written into an ``out`` the caller allocates. An op checks
all its arguments (:mod:`hicache_kernels.checks`) before a kernel is given an address, and so does its fake.
A tensor that requires a gradient is refused: an op without a derivative would give zeros.
:mod:`hicache_kernels.ops` is what to call.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hicache_kernels.backend import Backend
from hicache_kernels.backends import load
from hicache_kernels.calls import KnownForms
from hicache_kernels.checks import (
    check_forecast,
    check_gated_sum,
    check_gated_sum_update,
    check_update,
    check_update_forecast,
)
from hicache_kernels.compat import nobody_listens

BACKENDS: Final[dict[str, Backend]] = load()
# "auto" takes the first that can run, or the reference; never Triton's interpreter, which is for tests. On an
# H100 Triton is the faster where an op takes longer than its launch (benchmarks/results).
_PREFERENCE: Final = {"cpu": ("native",), "cuda": ("triton", "native")}


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


class AutoBackend(NamedTuple):
    """What ``"auto"`` takes; printed, with why it takes none of those it prefers."""

    name: str
    passed_over: dict[str, str]  # those it prefers: why each cannot run

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {why}" for name, why in self.passed_over.items())
        return f"{self.name} ({reasons})" if reasons else self.name


def auto_backend(device: torch.device | str, num_orders: int = 1, *dtypes: torch.dtype) -> AutoBackend:
    """The first of the device's backends that can run.

    Args:
        device: of the tensors.
        num_orders: ``K``.
        dtypes: of the history, and of the base where there is one.
    """
    device = torch.device(device)
    passed_over: dict[str, str] = {}
    for name in _PREFERENCE.get(device.type, ()):
        if (why := _reason(name, device, num_orders, dtypes)) is None:
            return AutoBackend(name, passed_over)
        passed_over[name] = why
    return AutoBackend("reference", passed_over)


def _reason(name: str, device: torch.device, num_orders: int, dtypes: tuple[torch.dtype, ...]) -> str | None:
    return BACKENDS[name].unavailable(device) or BACKENDS[name].unsupported(dtypes, num_orders)


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
    if backend == "auto":
        return BACKENDS[auto_backend(device, num_orders, *dtypes).name]
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
    if why := _reason(backend, device, num_orders, dtypes):
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {why}")
    return BACKENDS[backend]


class Op:
    """An op: registered as ``torch.ops.hicache.<name>``; called as this object, it costs the host less.

    Args:
        schema: in torch's words. The history is called ``orders``; the last argument is the backend's name.
        check: raises unless the op can run; takes the op's name, its arguments but the last, and whether they
            are in memory.
        run: has a backend run the op; takes that, and the op's arguments but the last.
        public: the function that calls it, where that has another name; errors name it.
    """

    def __init__(
        self, schema: str, check: Callable[..., None], run: Callable[..., None], public: str | None = None
    ) -> None:
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        self.name = schema.split("(")[0]
        self._public = public or self.name
        self._check, self._run = check, run
        self._names = re.findall(r"(\w+)[,)]", schema.split(" -> ")[0].replace("!)", ""))
        self._written = [self._names.index(name) for name in re.findall(r"Tensor\(\w!\) (\w+)", schema)]
        self._known = KnownForms(self._written)
        self._overload = getattr(torch.ops.hicache, self.name).default
        _LIBRARY.impl(self.name, self._in_memory, "CompositeExplicitAutograd")
        _LIBRARY.impl(self.name, self._refuse_gradients, "Autograd", with_keyset=True)
        # nothing is returned, so there is no shape to derive
        torch.library.register_fake(f"hicache::{self.name}", self._fake, lib=_LIBRARY)

    def __call__(self, *arguments: Any) -> None:
        """Call it past torch's dispatcher, where that would do nothing and the form of the call is known."""
        backend = self._known.backend(arguments) if nobody_listens() else None
        if backend is None:
            self._overload(*arguments)
        else:
            self._run_on(backend, arguments)

    def _fake(self, *arguments: Any) -> None:
        self._check(self._public, *arguments[:-1], False)

    def _in_memory(self, *arguments: Any) -> None:
        """Check all, and run it."""
        self._check(self._public, *arguments[:-1], True)
        given = dict(zip(self._names, arguments, strict=True))
        orders = given["orders"]
        dtypes = [given[name].dtype for name in ("orders", "base") if name in given]
        backend = pick(self._public, given["backend"], orders.device, orders.shape[0], *dtypes)
        self._run_on(backend, arguments)
        self._known.add(arguments, backend)

    def _run_on(self, backend: Backend, arguments: tuple[Any, ...]) -> None:
        self._run(backend, *arguments[:-1])
        # tells autograd; in inference mode nobody asks
        written = [arguments[index] for index in self._written]
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])

    def _refuse_gradients(self, keys: Any, *arguments: Any) -> None:
        """Raise RuntimeError where autograd would want a derivative, else go on below autograd."""
        if torch.is_grad_enabled():
            for name, value in zip(self._names, arguments, strict=True):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{self.name}: expected tensors that require no gradient, got {name} that does; an "
                        "op has no derivative: call it under torch.no_grad(), or detach() the tensor"
                    )
        self._overload.redispatch(keys.remove(keys.highestPriorityTypeId()), *arguments)


update_: Final = Op(
    "update_(Tensor(a!) orders, Tensor inv_gap, int filled, str backend) -> ()",
    check_update,
    lambda backend, *given: backend.update_(*given),
)
forecast: Final = Op(
    "forecast(Tensor orders, Tensor coeffs, Tensor(a!) out, str backend) -> ()",
    check_forecast,
    lambda backend, *given: backend.forecast(*given),
)
update_forecast_: Final = Op(
    "update_forecast_(Tensor(a!) orders, Tensor inv_gap, Tensor coeffs, int filled, Tensor(b!) out, "
    "str backend) -> ()",
    check_update_forecast,
    lambda backend, *given: backend.update_forecast_(*given),
)
gated_sum: Final = Op(
    "gated_sum(Tensor base, Tensor orders, Tensor? gates, Tensor coeffs, Tensor(a!) out, str backend) -> ()",
    check_gated_sum,
    lambda backend, base, orders, gates, coeffs, out: backend.gated_sum(
        base, orders, gates, coeffs, None, 0, out
    ),
)
gated_sum_update_: Final = Op(
    "gated_sum_update_(Tensor base, Tensor(a!) orders, Tensor? gates, Tensor coeffs, Tensor inv_gap, "
    "int filled, Tensor(b!) out, str backend) -> ()",
    check_gated_sum_update,
    lambda backend, *given: backend.gated_sum(*given),
    public="gated_sum",
)
