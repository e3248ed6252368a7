"""The ops in C++ (``csrc/``): SIMD and threads on the CPU, CUDA kernels where nvcc was found at build time.

CPU threads follow :func:`torch.set_num_threads`. On CUDA an op is one launch on the current stream of the
tensors' device, with coefficients and gaps read there (fp32 and float64 as they are), so it can be captured.
What the ops compute is said in :mod:`hicache_kernels.backends.reference`, whose bits they give.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # mypy compares this module with what a backend is
    from hicache_kernels.backend import Backend
    from hicache_kernels.backends import native as this_module

    _: Backend = this_module

name: Final = "native"

try:
    _native: Any = importlib.import_module("hicache_kernels._native")
    _MISSING: str | None = None
except ImportError as error:
    _native = None
    _MISSING = (
        f"the native extension is not built ({error}); where a C++17 compiler is found: "
        "HICACHE_FORCE_NATIVE_BUILD=1 "
        "pip install --force-reinstall --no-deps --no-cache-dir --no-binary hicache hicache "
        "(in a checkout: . in place of the last word)"
    )

# hicache::dtype in csrc/include/hicache/kernels.h
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``; None when it can."""
    if _MISSING is not None:
        return _MISSING
    if device.type == "cuda":
        return _no_cuda(device)
    if device.type != "cpu":
        return f"it runs on CPU and CUDA tensors, and these are on {device.type}"
    return None


def _no_cuda(device: torch.device) -> str | None:
    archs = cuda_archs()
    if not archs:
        return (
            "the native extension was built without CUDA: no working nvcc was found at build time, or "
            "HICACHE_SKIP_CUDA_BUILD was 1"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < archs[0]:
        return f"it was built for compute capability {archs[0]} and above, and this device has {major}{minor}"
    return None


def unsupported(dtypes: tuple[torch.dtype, ...], num_orders: int) -> str | None:
    """Why this backend cannot take (history, base) dtypes and this many orders; None when it can."""
    for dtype in dtypes:
        if dtype not in _CODES:
            return f"it takes {', '.join(str(d) for d in _CODES)}, not {dtype}"
    if len(set(dtypes)) > 1 and not (torch.float32 in dtypes and torch.float64 not in dtypes):
        return f"it is not compiled to add a {dtypes[0]} history to a {dtypes[1]} base"
    if num_orders > _native.MAX_ORDERS:
        return f"it is compiled for at most {_native.MAX_ORDERS} orders, not {num_orders}"
    return None


def isa() -> str:
    """The instruction set this process uses: ``avx512``, ``avx2`` or ``baseline``."""
    return str(_native.cpu_isa())


class Tactics(NamedTuple):
    """How gated sums that no CPU cache holds are walked through (csrc/include/hicache/tactics.h)."""

    dtype: torch.dtype  # of the history
    num_coeffs: int
    num_features: int  # at least; less than twice as many
    numel: int  # of the base, likewise
    update: bool
    gated: bool
    threads: int
    chosen: int  # index of the tactic that is taken
    costs: tuple[float, ...]  # nanoseconds a KiB of history that each took at best; infinite if not tried


def tactics() -> list[Tactics]:
    """What was tried so far, and is taken, by kind of sum."""
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    return [
        Tactics(
            dtypes[code],
            num_coeffs,
            2**log_features,
            2**log_numel,
            update,
            gated,
            threads,
            chosen,
            tuple(cost * 2**10 * 1e9 for cost in costs),
        )
        for code, num_coeffs, log_features, log_numel, update, gated, threads, chosen, costs in (
            _native.cpu_tactics()
        )
    ]


def cuda_archs() -> tuple[int, ...]:
    """Compute capabilities the CUDA kernels are compiled for, such as 90, ascending; none without CUDA."""
    return () if _MISSING is not None else tuple(_native.cuda_archs())


def target(device: torch.device) -> str:
    """What the kernels for a device were compiled for: ``avx512``, or ``sm_80, sm_90, sm_100``."""
    return isa() if device.type == "cpu" else ", ".join(f"sm_{arch}" for arch in cuda_archs())


def launches() -> int:
    """Calls of a CPU kernel and launches of a CUDA one by this process so far; one an op that has work."""
    return int(_native.launches())


def _place(orders: Tensor) -> tuple[str, tuple[int, ...]]:
    """Prefix of the bindings that run where ``orders`` are, and their last arguments.

    On CUDA the device's number and the stream, else the number of threads.
    """
    if orders.is_cuda:
        return "cuda_", (orders.device.index, torch.cuda.current_stream(orders.device).cuda_stream)
    return "", (torch.get_num_threads(),)


def _run(op: str, orders: Tensor, *arguments: Tensor | int | None) -> None:
    """Call an op's binding: with the history's address, row stride, K and dtype, ``arguments``, the place.

    A tensor is given whole, so that a copy lives as long as the call, and passed as its address; None is 0.
    """
    prefix, where = _place(orders)
    history = orders, orders.stride(0), orders.shape[0], _CODES[orders.dtype]
    numbers = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in (*history, *arguments)]
    getattr(_native, prefix + op)(*numbers, *where)


def _scalars(scalars: Tensor | None) -> tuple[Tensor | None, int]:
    """Coefficients or a gap as kernels read them, and the dtype's code; (None, 0) for None.

    Contiguous, fp32 or float64, on the same device: another dtype or stride costs a copy. After coefficients
    kernels are told how many features have rows of their own (none: 0), and how many orders there are.
    """
    if scalars is None:
        return None, 0
    if scalars.dtype not in (torch.float32, torch.float64):
        scalars = scalars.float()
    return scalars.contiguous(), _CODES[scalars.dtype]


def update_(orders: Tensor, inv_gap: Tensor, num_differences: int) -> None:
    """Update ``orders[K, ...]`` in place; ``inv_gap`` is one number."""
    _run("update_", orders, orders[0].numel(), num_differences, *_scalars(inv_gap))


def forecast(orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
    """Write the forecast of ``orders[K, ...]`` with ``coeffs[num_coeffs]`` into ``out[...]``."""
    _run(
        "forecast",
        orders,
        out.numel(),
        *_scalars(coeffs),
        (coeffs.ndim - 1) * coeffs.shape[-1],
        len(coeffs),
        out,
    )


def update_forecast_(
    orders: Tensor, inv_gap: Tensor, coeffs: Tensor, num_differences: int, out: Tensor
) -> None:
    """Update ``orders[K, ...]`` in place and write the forecast with ``coeffs[num_differences + 1]``."""
    scalars = *_scalars(inv_gap), *_scalars(coeffs), (coeffs.ndim - 1) * coeffs.shape[-1], len(coeffs)
    _run("update_forecast_", orders, out.numel(), *scalars, out)


def gated_sum(
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
    pending.
    """
    batch, channels = base.shape[0], base.shape[-1]
    rows = base.numel() // (batch * channels) if base.numel() else 0
    sizes = orders.stride(1), orders.shape[1], batch, rows, channels
    scalars = *_scalars(inv_gap), *_scalars(coeffs), (coeffs.ndim - 1) * coeffs.shape[-1], len(coeffs)
    _run("gated_sum", orders, *sizes, _CODES[base.dtype], base, gates, *scalars, out)
