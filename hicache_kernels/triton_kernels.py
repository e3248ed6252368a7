"""What the Triton backend launches: one kernel an op (:mod:`hicache_kernels.backends.triton`).

Every program loads all it needs of its elements before it stores any, so updates are safe in place.
Coefficients and gaps are read from device memory, so a captured launch replays with new ones. Addresses are
64-bit. Loads and stores are 16 bytes wide when addresses, strides and row length are multiples of 16, as
those of :class:`hicache_kernels.History` are.

Strides are counted in elements, and shape tags say how many a program works on: ``[BLOCK]``, or ``[ROWS,
COLUMNS]`` of rows by channels. TOP is the row of the inbox, K − 1. With BY_FEATURE there is a row of
coefficients for each feature; without it, kernels are what they would be if there never were.
"""

from __future__ import annotations

import importlib
from typing import Any

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
