"""What instructions compute that touch registers only: one entry for every name, modifiers and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx.values import BITS, COMPARISONS, Array, bits_of, divided, fused


@dataclass(frozen=True)
class Operation:
    """``compute`` takes numbers of the types ``sources`` and gives numbers that are rounded to ``to``.

    ``undefined`` says for which numbers PTX leaves the result open.
    """

    to: str
    sources: tuple[str, ...]
    compute: Callable[..., Array]
    undefined: Callable[..., Array] | None = None


def _same(a: Array) -> Array:
    return a


def _product(a: Array, b: Array) -> Array:
    return a * b


def _shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _extract(a: Array, position: Array, length: Array) -> Array:
    """A field of bits."""
    wide, one = a.astype(np.uint64), np.uint64(1)
    shifted = wide >> np.minimum(position & 255, 63).astype(np.uint64)
    return shifted & ((one << np.minimum(length & 255, 32).astype(np.uint64)) - one)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b:a, each named by four bits: three its place, the last to spread its sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for place in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * place)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        result |= np.where(choice >> np.uint64(3) != 0, sign, byte) << np.uint64(8 * place)
    return result


def _widened(kind: str) -> tuple[str, np.dtype[np.generic]]:
    wide = f"{kind[0]}{2 * BITS[kind]}"
    return wide, np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{2 * BITS[kind]}")


def _pair(kind: str) -> Callable[[Array, Array], Array]:
    """Two numbers rounded to low precision in one register, the first in its high half."""

    def pack(high: Array, low: Array) -> Array:
        return bits_of(high, kind).astype(np.uint32) << np.uint32(16) | bits_of(low, kind)

    return pack


def _integers() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        for name, compute in (("add", np.add), ("sub", np.subtract), ("mul.lo", _product)):
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), compute)
        for name, compute in (("min", np.minimum), ("max", np.maximum)):
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), compute)
        table[f"mad.lo.{kind}"] = Operation(kind, (kind,) * 3, lambda a, b, c: a * b + c)
        table[f"shr.{kind}"] = Operation(kind, (kind, "u32"), _shift_right)
        table[f"div.{kind}"] = Operation(kind, (kind, kind), divided, lambda a, b: b == 0)
        table[f"rem.{kind}"] = Operation(
            kind, (kind, kind), lambda a, b: a - divided(a, b) * b, lambda a, b: b == 0
        )
        if kind[0] == "s":
            table[f"neg.{kind}"] = Operation(kind, (kind,), np.negative)
        if BITS[kind] < 64:
            wide, dtype = _widened(kind)
            table[f"mul.wide.{kind}"] = Operation(
                wide, (kind, kind), lambda a, b, dtype=dtype: a.astype(dtype) * b.astype(dtype)
            )
            table[f"mad.wide.{kind}"] = Operation(
                wide, (kind, kind, wide), lambda a, b, c, dtype=dtype: a.astype(dtype) * b.astype(dtype) + c
            )
        for other in ("u8", "s8", "s16", "u16", "s32", "u32", "s64", "u64"):
            table[f"cvt.{kind}.{other}"] = Operation(kind, (other,), _same)
    table["bfe.u32"] = Operation("u32", ("u32", "u32", "u32"), _extract)
    table["prmt.b32"] = Operation("b32", ("b32", "b32", "b32"), _permute)
    table["cvta.to.global.u64"] = Operation("u64", ("u64",), _same)  # global memory is at its generic address
    return table


def _bits() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    for kind in ("b16", "b32", "b64", "pred"):
        logical = (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))
        for name, compute in logical:
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), compute)
        table[f"not.{kind}"] = Operation(kind, (kind,), np.invert)
        if kind != "pred":
            table[f"shl.{kind}"] = Operation(kind, (kind, "u32"), _shift_left)
    for bits in (16, 32, 64):
        for kind in (f"{letter}{bits}" for letter in "busf"):
            carried = f"b{bits}"  # of a float as well: a nan is moved as it is
            table[f"mov.{kind}"] = Operation(carried, (carried,), _same)
            table[f"selp.{kind}"] = Operation(
                carried, (carried, carried, "pred"), lambda a, b, p: np.where(p, a, b)
            )
            for name, compare in COMPARISONS.items():
                if kind[0] in "us" or (kind[0] == "b" and name in ("eq", "ne")):
                    table[f"setp.{name}.{kind}"] = Operation("pred", (kind, kind), compare)
    table["mov.pred"] = Operation("pred", ("pred",), _same)
    return table


def _floats() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    for kind in ("f32", "f64", "f32x2"):
        for name, compute in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            table[f"{name}.rn.{kind}"] = Operation(kind, (kind, kind), compute)
    for kind in ("f32", "f32x2"):
        table[f"fma.rn.{kind}"] = Operation(kind, (kind,) * 3, fused)
    for low in ("bf16", "f16"):
        table[f"cvt.f32.{low}"] = Operation("f32", (low,), _same)
        table[f"cvt.rn.{low}.f32"] = Operation(low, ("f32",), _same)
        table[f"cvt.rn.{low}x2.f32"] = Operation("b32", ("f32", "f32"), _pair(low))
        table[f"add.rn.f32.{low}"] = Operation("f32", (low, "f32"), np.add)
        table[f"sub.rn.f32.{low}"] = Operation("f32", (low, "f32"), np.subtract)
        table[f"fma.rn.f32.{low}"] = Operation("f32", (low, low, "f32"), fused)
    table["cvt.rn.f32.f64"] = Operation("f32", ("f64",), _same)
    table["cvt.f64.f32"] = Operation("f64", ("f32",), _same)
    return table


OPERATIONS = {**_integers(), **_bits(), **_floats()}
# Without a rounding they may be fused by ptxas: the bits are then its choice.
FUSABLE = {f"{name}.{kind}" for name in ("add", "sub", "mul") for kind in ("f32", "f64", "f32x2")}
