"""The ops in Triton, one launch each: CUDA tensors, or CPU ones under ``TRITON_INTERPRET=1``.

What the ops compute is said in :mod:`hicache_kernels.backends.reference`; the kernels are in
:mod:`hicache_kernels.triton_kernels`. Here is what each is launched with.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from hicache_kernels import tiles
from hicache_kernels.tiles import Tile
from hicache_kernels.triton_runtime import MISSING, Launcher, cannot_launch, triton

if TYPE_CHECKING:  # mypy compares this module with what a backend is
    from hicache_kernels.backend import Backend
    from hicache_kernels.backends import triton as this_module

    _: Backend = this_module

name: Final = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ORDERS = 5  # registers, spills and the order of loads are checked up to here
_REGISTERS = 65536  # of one multiprocessor, on every GPU since Kepler

if MISSING is None:
    from hicache_kernels import triton_kernels

    _UPDATE: Final = Launcher(triton_kernels._update_kernel)
    _FORECAST: Final = Launcher(triton_kernels._forecast_kernel)
    _UPDATE_FORECAST: Final = Launcher(triton_kernels._update_forecast_kernel)
    _GATED_SUM: Final = Launcher(triton_kernels._gated_sum_kernel)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` before import)."""
    return MISSING is None and not isinstance(triton_kernels._update_kernel, triton.runtime.JITFunction)


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``; None when it can."""
    if MISSING is not None:
        return MISSING
    if interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs CPU tensors only"
    if device.type != "cuda":
        return (
            f"it runs on CUDA tensors, and these are on {device.type} (TRITON_INTERPRET=1 takes CPU tensors)"
        )
    return cannot_launch()


def unsupported(dtypes: tuple[torch.dtype, ...], num_orders: int) -> str | None:
    """Why this backend cannot take these dtypes and this many orders; None when it can."""
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"it takes {', '.join(str(d) for d in _DTYPES)}, not {dtype}"
    if num_orders > MAX_ORDERS:
        return f"it is written for at most {MAX_ORDERS} orders, not {num_orders}"
    return None


_HERE: Final = nullcontext()


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current: Triton launches there, whatever device its arguments are on."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def options(tile: Tile, updating: bool = False) -> dict[str, int | bool]:
    """Options a kernel is compiled with. ``updating``: a ``gated_sum`` with an update pending."""
    # Products and sums stay apart, as in the reference; Triton's own default changes between versions.
    chosen: dict[str, int | bool] = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    # Left to itself ptxas saves registers for more threads: it waits for some loads of a tile before it
    # issues the others, and spills. Told how many it may use, it issues all of them first.
    registers = 128 if updating else 96
    if 32 * tile.num_warps * registers <= _REGISTERS:
        chosen["maxnreg"] = registers
    return chosen


@functools.lru_cache
def _frozen_options(tile: Tile, updating: bool) -> tuple[tuple[str, int | bool], ...]:
    return tuple(options(tile, updating).items())


def _launch(
    launcher: Launcher,
    op: str,
    orders: Tensor,
    num_coeffs: int,
    numbers: tuple[int, ...],
    others: tuple[Tensor, ...],
    constants: tuple[int, ...],
) -> None:
    """Launch a kernel on every element of a row of ``orders[K, ...]``.

    Args:
        numbers: elements of a feature, and features.
    """
    slot, features = numbers[0], numbers[1] if len(numbers) > 1 else 1
    if not slot * features:
        return
    tile = tiles.tile(op, num_coeffs, orders.itemsize, 1)
    with _on(orders):
        launcher(
            -(-slot // tile.block) * features,
            (orders, *others),
            (orders.stride(0), *numbers),
            (*constants, tile.block),
            _frozen_options(tile, False),
        )


def _features(coeffs: Tensor, numel: int) -> tuple[int, int]:
    """Elements of a feature with coefficients of its own, and how many; all are one where none has."""
    features = coeffs.shape[1] if coeffs.ndim == 2 else 1
    return (numel // features if features else 0), features


def update_(orders: Tensor, inv_gap: Tensor, num_differences: int) -> None:
    """Update ``orders[K, ...]`` in place; ``inv_gap`` is one number."""
    constants = orders.shape[0] - 1, num_differences
    numel = orders.numel() // orders.shape[0]
    _launch(_UPDATE, "update_", orders, num_differences + 1, (numel,), (inv_gap,), constants)


def forecast(orders: Tensor, coeffs: Tensor, out: Tensor) -> None:
    """Write the forecast of ``orders[K, ...]`` with ``coeffs[num_coeffs]`` into ``out[...]``.

    Coefficients of a feature each are ``[num_coeffs, features]``, of ``orders[K, features, ...]``.
    """
    tensors = coeffs.contiguous(), out  # the kernels step through coefficients by one
    num_coeffs, numbers = coeffs.shape[0], _features(coeffs, out.numel())
    _launch(_FORECAST, "forecast", orders, num_coeffs, numbers, tensors, (num_coeffs, coeffs.ndim == 2))


def update_forecast_(
    orders: Tensor, inv_gap: Tensor, coeffs: Tensor, num_differences: int, out: Tensor
) -> None:
    """Update ``orders[K, ...]`` in place and write the forecast with ``coeffs[num_differences + 1]``.

    Coefficients of a feature each are ``[num_differences + 1, features]``, of ``orders[K, features, ...]``.
    """
    constants = orders.shape[0] - 1, num_differences, coeffs.ndim == 2
    tensors, numbers = (inv_gap, coeffs.contiguous(), out), _features(coeffs, out.numel())
    launcher = _UPDATE_FORECAST
    _launch(launcher, "update_forecast_", orders, num_differences + 1, numbers, tensors, constants)


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
    pending. ``coeffs`` are ``[num_coeffs]`` or ``[num_coeffs, num_features]``.
    """
    numel = base.numel()
    if not numel:
        return
    kind = updating, gated, _ = inv_gap is not None, gates is not None, coeffs.ndim == 2
    num_coeffs, (num_orders, num_features, _) = coeffs.shape[0], orders.shape
    op = "gated_sum_update_" if updating else "gated_sum"
    tile = tiles.tile(op, num_coeffs, orders.itemsize, num_features)
    # without gates a row has no meaning: one long row keeps the tiles whole
    batch, channels = (base.shape[0], base.shape[-1]) if gated else (1, numel)
    tile_rows, columns = (tile.rows, tile.columns) if gated else (1, tile.block)
    rows = numel // (batch * channels)
    stride, feature_stride, _ = orders.stride()
    with _on(orders):
        _GATED_SUM(
            -(-channels // columns) * -(-rows // tile_rows) * batch,
            (base, orders, gates, inv_gap, coeffs.contiguous(), out),
            (stride, feature_stride, num_features, batch, rows, channels),
            (num_orders - 1, num_coeffs, *kind, tile_rows, columns, tile.num_stages),
            _frozen_options(tile, updating),
        )
