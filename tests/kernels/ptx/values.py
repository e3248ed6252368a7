"""The types of PTX as numpy arrays of bits, and arithmetic that is rounded once.

A value of n bits is an unsigned integer of n bits, one a thread; a predicate is a bool. What an instruction
computes it computes on a view in its own type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64,
}  # fmt: skip
CARRIERS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_VIEWS = {
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}


def viewed(bits: Array, kind: str) -> Array:
    """Bits as numbers of a type: integers, fp32 or float64, ``[n, 2]`` for a pair; low precision as fp32."""
    if kind == "bf16":
        return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return np.asarray(bits).view(np.float16).astype(np.float32)
    if kind == "f32x2":
        return np.atleast_1d(bits).view(np.float32).reshape(-1, 2)
    return np.asarray(bits).view(_VIEWS[kind]) if kind in _VIEWS else np.asarray(bits)


def bits_of(numbers: Array, kind: str) -> Array:
    """Numbers as the bits of a type: rounded to nearest, ties to even; integers keep their low bits."""
    if kind == "bf16":
        return _bf16(numbers)
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    if kind == "f32x2":
        return np.ascontiguousarray(numbers).view(np.uint64).reshape(-1)
    carrier = CARRIERS[BITS[kind]]
    if kind in ("f32", "f64"):
        return numbers.astype(_VIEWS[kind]).view(carrier)
    return numbers.astype(carrier)


def _bf16(numbers: Array) -> Array:
    if numbers.dtype != np.float32:
        raise TypeError(f"expected fp32 to round to bf16 once, got {numbers.dtype}")
    bits = numbers.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded.astype(np.uint16))


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a · b + c`` of fp32, rounded once.

    The product is exact in float64. The sum is rounded to odd there: its last bit is 1 where something was
    cut off, so the second rounding, to 24 of 53 bits, sees no tie that is none.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    # what the addition lost, exactly (Knuth's two-sum)
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = np.asarray(total).view(np.int64)
    inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    away = (lost > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(away, 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


def divided(a: Array, b: Array) -> Array:
    """Integers divided towards zero, as C does; of a division by zero something."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    rest = a - quotient * safe
    return np.asarray(quotient + ((rest != 0) & ((a < 0) != (safe < 0)))).astype(a.dtype)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
