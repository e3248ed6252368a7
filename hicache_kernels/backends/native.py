"""The ops in C++ (``csrc/``): SIMD and threads on the CPU. Threads follow :func:`torch.set_num_threads`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_native: Any
_MISSING: str | None
try:
    _native = importlib.import_module("hicache_kernels._native")
    _MISSING = None
except ImportError as error:
    _native = None
    _MISSING = f"the native extension is not built ({error}); reinstall where a C++17 compiler is found"

# hicache::dtype in csrc/include/hicache/cpu.h
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``; None when it can."""
    if _MISSING is not None:
        return _MISSING
    if device.type != "cpu":
        return f"it runs on CPU tensors, and these are on {device.type}"
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


def _history(orders: Tensor) -> tuple[int, int, int, int]:
    return orders.data_ptr(), orders.stride(0), orders.shape[0], _CODES[orders.dtype]


def update_(orders: Tensor, inv_gap: Tensor, filled: int) -> None:
    _native.update_(*_history(orders), orders[0].numel(), filled, inv_gap.item(), torch.get_num_threads())


def forecast(orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
    threads = torch.get_num_threads()
    _native.forecast(*_history(orders), out.numel(), coeffs.tolist(), out.data_ptr(), threads)


def update_forecast_(orders: Tensor, inv_gap: Tensor, coeffs: Tensor, filled: int, out: Tensor) -> None:
    _native.update_forecast_(
        *_history(orders),
        out.numel(),
        filled,
        inv_gap.item(),
        coeffs.tolist(),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def gated_sum(
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor | None,
    filled: int,
    out: Tensor,
) -> None:
    batch, channels = base.shape[0], base.shape[-1]
    _native.gated_sum(
        *_history(orders),
        orders.stride(1),
        orders.shape[1],
        batch,
        base.numel() // (batch * channels) if base.numel() else 0,
        channels,
        _CODES[base.dtype],
        base.data_ptr(),
        0 if gates is None else gates.data_ptr(),
        coeffs.tolist(),
        out.data_ptr(),
        inv_gap is not None,
        0.0 if inv_gap is None else inv_gap.item(),
        torch.get_num_threads(),
    )
