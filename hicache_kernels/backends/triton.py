"""The ops in Triton, one launch each: CUDA tensors, or CPU ones under ``TRITON_INTERPRET=1``.

What the ops compute is said in :mod:`hicache_kernels.backends.reference`. Every program loads all it needs
of its elements before it stores any, so updates are safe in place. Coefficients and gaps are read from
device memory, so a captured launch replays with new ones. Addresses are 64-bit. Loads and stores are 16
bytes wide when addresses, strides and row length are multiples of 16, as those of
:class:`hicache_kernels.History` are.

In the kernels strides are counted in elements, and shape tags say how many a program works on: ``[BLOCK]``,
or ``[ROWS, COLUMNS]`` of rows by channels. TOP is the row of the inbox, K − 1.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from hicache_kernels import tiles
from hicache_kernels.tiles import Tile
from hicache_kernels.triton_runtime import MISSING, Launcher, cannot_launch

if TYPE_CHECKING:  # mypy compares this module with what a backend is
    from hicache_kernels.backend import Backend
    from hicache_kernels.backends import triton as this_module

    _: Backend = this_module

name: Final = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ORDERS = 5  # registers, spills and the order of loads are checked up to here
_REGISTERS = 65536  # of one multiprocessor, on every GPU since Kepler

if MISSING is None:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")

    @triton.jit
    def _load(rows, stride, at, mask, NUM: tl.constexpr):
        """Load NUM rows at ``at``, ``stride`` apart: a tuple of fp32, each in the shape of ``at``."""
        stride = tl.cast(stride, tl.int64)  # three orders of FLUX are more elements than 32 bits count
        loaded = ()
        for k in tl.static_range(NUM):
            value = tl.load(rows + k * stride + at, mask=mask).to(tl.float32)
            loaded += (value,)  # type: ignore[assignment]  # for mypy it stays empty
        return loaded

    @triton.jit
    def _cascade(orders, stride, at, mask, inv_gap, TOP: tl.constexpr, NUM_DIFFERENCES: tl.constexpr):
        """Load F and the old differences at ``at``, store the new ones and return them before rounding.

        A tuple of D_0 … D_NUM_DIFFERENCES, in fp32, each of the shape of ``at``.
        """
        stride = tl.cast(stride, tl.int64)
        new = _load(orders + TOP * stride, stride, at, mask, 1)
        old = _load(orders, stride, at, mask, NUM_DIFFERENCES)
        for k in tl.static_range(NUM_DIFFERENCES):
            new += ((new[k] - old[k]) * inv_gap,)
        for k in tl.static_range(NUM_DIFFERENCES + 1):
            tl.store(orders + k * stride + at, new[k].to(orders.dtype.element_ty), mask=mask)
        return new

    @triton.jit
    def _evaluate(differences, coeffs):
        """``Σ_k coeffs[k] · differences[k]``, lowest order first, in the shape of a difference."""
        total = differences[0] * coeffs[0]
        for k in tl.static_range(1, len(coeffs)):
            total += differences[k] * coeffs[k]
        return total

    @triton.jit
    def _update_kernel(
        orders, inv_gap, stride, numel, TOP: tl.constexpr, NUM_DIFFERENCES: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Update ``orders[K, numel]`` in place, rows ``stride`` apart."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _cascade(orders, stride, at, at < numel, tl.load(inv_gap).to(tl.float32), TOP, NUM_DIFFERENCES)

    @triton.jit
    def _of_feature(slot, BY_FEATURE: tl.constexpr, BLOCK: tl.constexpr):
        """The feature a program works for, where its elements begin, and their places [BLOCK] in the feature.

        A feature has ``slot`` elements, and without BY_FEATURE all are one.
        """
        program = tl.program_id(0).to(tl.int64)
        feature = tl.zeros([], tl.int64)
        if BY_FEATURE:
            programs = tl.cdiv(tl.cast(slot, tl.int64), BLOCK)  # of a feature
            feature = program // programs
            program = program % programs
        return feature, feature * slot, program * BLOCK + tl.arange(0, BLOCK)

    @triton.jit
    def _forecast_kernel(
        orders,
        coeffs,
        out,
        stride,
        slot,
        features,
        NUM_COEFFS: tl.constexpr,
        BY_FEATURE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Forecast ``orders[K, features, slot]`` with ``coeffs[NUM_COEFFS, features]`` into ``out``."""
        feature, begin, place = _of_feature(slot, BY_FEATURE, BLOCK)
        at, mask = begin + place, place < slot
        alphas = _load(coeffs, features, feature, None, NUM_COEFFS)
        differences = _load(orders, stride, at, mask, NUM_COEFFS)
        total = _evaluate(differences, alphas)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _update_forecast_kernel(
        orders,
        inv_gap,
        coeffs,
        out,
        stride,
        slot,
        features,
        TOP: tl.constexpr,
        NUM_DIFFERENCES: tl.constexpr,
        BY_FEATURE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Update ``orders[K, features, slot]``; forecast with ``coeffs[NUM_DIFFERENCES + 1, features]``."""
        feature, begin, place = _of_feature(slot, BY_FEATURE, BLOCK)
        at, mask = begin + place, place < slot
        gap = tl.load(inv_gap).to(tl.float32)
        alphas = _load(coeffs, features, feature, None, NUM_DIFFERENCES + 1)
        new = _cascade(orders, stride, at, mask, gap, TOP, NUM_DIFFERENCES)
        tl.store(out + at, _evaluate(new, alphas).to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _gated_sum_kernel(
        base,
        orders,
        gates,
        inv_gap,
        coeffs,
        out,
        stride,
        feature_stride,
        num_features,
        batch,
        rows,
        channels,
        TOP: tl.constexpr,
        NUM_COEFFS: tl.constexpr,
        UPDATE: tl.constexpr,
        GATED: tl.constexpr,
        BY_FEATURE: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """``out = base + Σ_i gates[i] ⊙ Σ_k coeffs[k] · D_{k,i}``, one tile [ROWS, COLUMNS] a program.

        base and out are ``[batch, rows, channels]``; feature i of order k begins at k · stride + i ·
        feature_stride; gates are ``[num_features, batch, channels]``, if GATED. With UPDATE the differences
        are updated first; with BY_FEATURE coefficients are ``[NUM_COEFFS, num_features]``.
        """
        # one axis for all tiles: the others end at 65,535 programs, which a video has more of
        tile = tl.program_id(0).to(tl.int64)
        column_tiles = tl.cdiv(tl.cast(channels, tl.int64), COLUMNS)
        row_tiles = tl.cdiv(tl.cast(rows, tl.int64), ROWS)
        sample = tile // column_tiles // row_tiles
        row = tile // column_tiles % row_tiles * ROWS + tl.arange(0, ROWS)[:, None]  # [R, 1]
        column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, C]
        at = (sample * rows + row) * channels + column  # [R, C]
        mask = (row < rows) & (column < channels)
        # A gate for each element of the tile: a row of them would have to change threads, through shared
        # memory and past four barriers, once a feature. The rows' equal addresses come out of the L1 cache.
        gate_at = sample * channels + column + tl.zeros([ROWS, 1], tl.int64)  # [R, C]
        total = tl.load(base + at, mask=mask).to(tl.float32)
        # Before the loop: loads are not moved across its stores.
        alphas = _load(coeffs, 1, 0, None, NUM_COEFFS)
        gap = alphas[0]
        if UPDATE:
            gap = tl.load(inv_gap).to(tl.float32)
        slot = orders
        for _ in tl.range(num_features, num_stages=STAGES):
            if BY_FEATURE:
                alphas = _load(coeffs, num_features, 0, None, NUM_COEFFS)
                coeffs += 1
            if GATED:  # before any store, which loads do not overtake
                gate = tl.load(gates + gate_at, mask=mask)
                gates += batch * channels
            if UPDATE:
                differences = _cascade(slot, stride, at, mask, gap, TOP, NUM_COEFFS - 1)
            else:
                differences = _load(slot, stride, at, mask, NUM_COEFFS)
            value = _evaluate(differences, alphas)
            if GATED:
                value = value * gate.to(tl.float32)
            total = total + value
            slot += feature_stride
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)

    _UPDATE: Final = Launcher(_update_kernel)
    _FORECAST: Final = Launcher(_forecast_kernel)
    _UPDATE_FORECAST: Final = Launcher(_update_forecast_kernel)
    _GATED_SUM: Final = Launcher(_gated_sum_kernel)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` before import)."""
    return MISSING is None and not isinstance(_update_kernel, triton.runtime.JITFunction)


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
