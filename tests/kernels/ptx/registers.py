"""The registers of many threads, each an array over the threads, and which threads have written them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.faults import Uninitialised, Unsupported
from ptx.parser import Kernel, Number, Operand, Register, Symbol, Vector
from ptx.values import BITS, CARRIERS, Array


@dataclass(frozen=True)
class Active:
    """The threads that an instruction is for."""

    mask: Array
    everyone: bool

    @staticmethod
    def of(mask: Array) -> Active:
        return Active(mask, bool(mask.all()))


class Registers:
    """Of ``threads`` threads. ``special``: ``%tid.x`` and others, which nobody writes."""

    def __init__(self, kernel: Kernel, threads: int, special: dict[str, Array]) -> None:
        self._widths = kernel.widths | dict.fromkeys(special, 32)
        self._symbols = kernel.shared | {p.name: p.offset for p in kernel.parameters}
        self._threads = threads
        self._values: dict[str, Array] = dict(special)
        self._written: dict[str, Array | None] = dict.fromkeys(special)  # by whom; None: by everyone

    def width(self, register: Register) -> int:
        """Bits."""
        if register.name not in self._widths:
            raise Unsupported(f"the register {register.name} is not declared")
        return self._widths[register.name]

    def read(self, operand: Operand, kind: str, active: Active, wider: bool = False) -> Array:
        """The bits of an operand of a type: one a thread, or one for all.

        Args:
            wider: whether a register may have more bits; its low ones are meant.

        Raises:
            Uninitialised: a thread that is active has not written the register.
        """
        bits = BITS[kind]
        if isinstance(operand, Number):
            return np.asarray(operand.value & ((1 << bits) - 1), CARRIERS[bits])
        if isinstance(operand, Symbol):
            if operand.name not in self._symbols:
                raise Unsupported(f"the symbol {operand.name} is no parameter and no variable")
            return np.asarray(self._symbols[operand.name], CARRIERS[bits])
        if not isinstance(operand, Register):
            raise Unsupported(f"an operand such as {operand}")
        width = self.width(operand)
        if width != bits and not (wider and width > bits):
            raise Unsupported(f"{operand.name} has {width} bits where {kind} has {bits}")
        written = self._written.get(operand.name, False)
        if written is False or (written is not None and (active.mask & ~written).any()):
            raise Uninitialised(f"reads {operand.name}, which nothing was written to")
        value = self._values[operand.name]
        return value if width == bits else value.astype(CARRIERS[bits])

    def write(self, register: Operand, value: Array, active: Active) -> None:
        """Bits of the register's width, one a thread or one for all."""
        if not isinstance(register, Register) or register.name.startswith(("%tid", "%ctaid", "%n")):
            raise Unsupported(f"a result in {register}")
        if np.shape(value) != (self._threads,):
            value = np.ascontiguousarray(np.broadcast_to(value, self._threads))
        if value.dtype != CARRIERS[self.width(register)]:
            raise Unsupported(f"a result of {value.dtype} in {register.name}")
        name = register.name
        if active.everyone:
            self._values[name], self._written[name] = value, None
            return
        old, written = self._values.get(name), self._written.get(name, False)
        self._values[name] = value if old is None else np.where(active.mask, value, old)
        if written is not None:
            self._written[name] = active.mask if written is False else active.mask | written

    def pack(self, vector: Vector, kind: str, active: Active) -> Array:
        """The registers of a vector side by side, the first in the low bits."""
        bits = BITS[kind] // len(vector.parts)
        value = np.zeros((), CARRIERS[BITS[kind]])
        for place, part in enumerate(vector.parts):
            value = value | self.read(part, f"b{bits}", active).astype(value.dtype) << value.dtype.type(
                place * bits
            )
        return value

    def unpack(self, vector: Vector, value: Array, active: Active) -> None:
        """The reverse of :meth:`pack`; ``_`` takes what nobody wants."""
        bits = 8 * value.dtype.itemsize // len(vector.parts)
        for place, part in enumerate(vector.parts):
            if part == Symbol("_"):
                continue
            shifted = value >> value.dtype.type(place * bits)
            self.write(part, shifted.astype(CARRIERS[bits]), active)
