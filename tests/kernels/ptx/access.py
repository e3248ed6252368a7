"""Instructions that touch memory: parameters, global and shared memory, copies between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ptx.copies import Copies
from ptx.faults import Divergence, OutOfBounds, Unsupported
from ptx.memory import Global, Shared
from ptx.parser import Address, Instruction, Number, Operand, Register, Symbol, Vector
from ptx.registers import Active, Registers
from ptx.values import BITS, CARRIERS, Array, viewed

Operands = tuple[Operand, ...]

WARP = 32
_LANES = {"v2": 2, "v4": 4, "v8": 8}
_COPIED = {"ca": (4, 8, 16), "cg": (16,)}  # bytes that a copy past or through the first cache may have


class Access:
    """Memory as the threads of a batch of blocks see it. ``who``: all of them, in their present epochs."""

    who: Array

    def __init__(
        self, registers: Registers, arguments: bytes, memory: Global, shared: Shared, block: Array
    ) -> None:
        """``block[threads]``: which of the batch each thread is in."""
        self._registers, self._global, self._shared = registers, memory, shared
        self._arguments = np.frombuffer(arguments, np.uint8)
        self._block = block
        self._copies = Copies(block.size, memory, shared)

    def knows(self, instruction: Instruction) -> bool:
        """Whether it is one of these."""
        return self._handler(instruction) is not None

    def execute(self, instruction: Instruction, active: Active) -> None:
        """Run one that :meth:`knows` knows."""
        handler = self._handler(instruction)
        assert handler is not None
        handler(active)

    def _handler(self, instruction: Instruction) -> Callable[[Active], None] | None:
        operands = instruction.operands
        match instruction.opcode, *instruction.modifiers:
            case ("ld", ("param" | "global" | "shared") as space, *form) if (
                found := _form(form)
            ) is not None:
                return partial(self._load, operands, space, *found)
            case ("st", ("global" | "shared") as space, *form) if (found := _form(form)) is not None:
                return partial(self._store, operands, space, *found)
            case ("cp", "async", "commit_group"):
                return lambda active: self._copies.commit(np.flatnonzero(active.mask))
            case ("cp", "async", "wait_group"):
                return lambda active: self._copies.wait(active.mask, self.who, _number(operands[0]))
            case ("cp", "async", "wait_all"):
                return lambda active: self._copies.wait(active.mask, self.who, None)
            case ("cp", "async", ("ca" | "cg") as cache, "shared", "global"):
                return partial(self._copy, operands, cache)
            case ("ldmatrix" | "stmatrix", "sync", "aligned", "m8n8", ("x1" | "x2" | "x4") as x, *form):
                loading, count, transposed = instruction.opcode == "ldmatrix", int(x[1]), "trans" in form
                if form in (["shared", "b16"], ["trans", "shared", "b16"]):
                    return partial(self._matrices, operands, loading, count, transposed)
        return None

    def _load(self, operands: Operands, space: str, lanes: int, kind: str, active: Active) -> None:
        to, address = operands
        registers = _registers(to, lanes)
        begin = self._addresses(address, space, active)
        size = lanes * BITS[kind] // 8
        if space == "param":
            found = self._parameter(begin, size)
        elif space == "global":
            found = self._global.load(begin, size, self.who[active.mask])
        else:
            places = self._places(begin, size, active)
            found = self._shared.load(places, self.who[active.mask])
        data = np.zeros((len(active.mask), size), np.uint8)
        data[active.mask] = found
        values = data.view(CARRIERS[BITS[kind]])
        for lane, register in enumerate(registers):
            value = np.ascontiguousarray(values[:, lane])
            carrier = CARRIERS[self._registers.width(register)]
            if carrier != value.dtype:  # wider: filled up by the sign, or by zeros
                if carrier().itemsize < value.dtype.itemsize:
                    raise Unsupported(f"{kind} in {register.name}")
                value = viewed(value, kind).astype(carrier)
            self._registers.write(register, value, active)

    def _store(self, operands: Operands, space: str, lanes: int, kind: str, active: Active) -> None:
        address, source = operands
        begin = self._addresses(address, space, active)
        parts = source.parts if isinstance(source, Vector) else (source,)
        if len(parts) != lanes:
            raise Unsupported(f"{len(parts)} registers for {lanes}")
        values = np.empty((len(active.mask), lanes), CARRIERS[BITS[kind]])
        for lane, part in enumerate(parts):
            values[:, lane] = self._registers.read(part, kind, active, wider=True)
        data = values[active.mask].view(np.uint8)
        if space == "global":
            self._global.store(begin, data, self.who[active.mask])
        else:
            self._shared.store(self._places(begin, data.shape[1], active), data, self.who[active.mask])

    def _copy(self, operands: Operands, cache: str, active: Active) -> None:
        to, source, size, *read = operands
        size = _number(size)
        if size not in _COPIED[cache] or len(read) > 1:
            raise Unsupported(f"cp.async.{cache} of {size} bytes")
        count = self._registers.read(read[0], "u32", active) if read else np.asarray(size)
        count = np.broadcast_to(count, active.mask.shape)[active.mask]
        if ((count != 0) & (count != size)).any():
            raise Unsupported(f"cp.async.{cache} of a part of its bytes")
        places = self._places(self._addresses(to, "shared", active), size, active, landing=True)
        begin = self._addresses(source, "global", active)
        self._copies.begin(np.flatnonzero(active.mask), self.who[active.mask], begin, count != 0, places)

    def _matrices(
        self, operands: Operands, loading: bool, count: int, transposed: bool, active: Active
    ) -> None:
        """A warp moves matrices of 8 rows of 16 bytes; every eight threads have the addresses of one."""
        warps = active.mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise Divergence("an exchange of matrices by a part of a warp")
        vector, address = operands if loading else operands[::-1]
        registers = _registers(vector, count)
        begin = self._addresses(address, "shared", active).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        block = self._block[active.mask].reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        rows = self._shared.places(block, begin, 16)
        self._copies.refuse(rows, "touches bytes that are being copied")
        who = self.who[active.mask]
        for register, places in zip(registers, parts_of_rows(rows, count, transposed), strict=True):
            if loading:
                value = np.zeros(len(active.mask), np.uint32)
                value[active.mask] = self._shared.load(places, who).view(np.uint32)[:, 0]
                self._registers.write(register, value, active)
            else:
                value = self._registers.read(register, "b32", active)[active.mask]
                self._shared.store(places, value[:, None].view(np.uint8), who)

    def _addresses(self, operand: Operand, space: str, active: Active) -> Array:
        """One for each active thread, 64 bits wide."""
        if not isinstance(operand, Address):
            raise Unsupported(f"an address such as {operand}")
        base = operand.base
        narrow = space == "shared" and isinstance(base, Register) and self._registers.width(base) == 32
        value = self._registers.read(base, "u32" if narrow else "u64", active).astype(np.uint64)
        value = np.broadcast_to(value, active.mask.shape)[active.mask]
        if isinstance(base, Symbol) and space == "global":
            raise Unsupported(f"the variable {base.name} of global memory")
        return value + np.uint64(operand.offset & (1 << 64) - 1)

    def _places(self, begin: Array, size: int, active: Active, landing: bool = False) -> Array:
        """Bytes in the blocks' shared memory, where no copy is on its way to."""
        places = self._shared.places(self._block[active.mask], begin, size)
        if not landing:  # Copies looks for itself
            self._copies.refuse(places, "touches bytes that are being copied")
        return places

    def _parameter(self, begin: Array, size: int) -> Array:
        at = begin.astype(np.int64)
        if ((at < 0) | (at + size > self._arguments.size) | (at % size != 0)).any():
            raise OutOfBounds(f"{size} bytes at {at[0]} of {self._arguments.size} bytes of parameters")
        return self._arguments[at[:, None] + np.arange(size)]


def parts_of_rows(rows: Array, count: int, transposed: bool) -> list[Array]:
    """Of every matrix, the bytes ``[threads, 4]`` that a register of each thread holds.

    Two neighbours of a row, or of a column; four threads share one. ``rows``: ``[warps · count · 8, 16]``.
    """
    numbers = rows.reshape(-1, count, 8, 8, 2)  # warp, matrix, row, column, byte
    if transposed:
        numbers = numbers.swapaxes(2, 3)
    return [numbers[:, matrix].reshape(-1, 4) for matrix in range(count)]


def _form(modifiers: list[str]) -> tuple[int, str] | None:
    """Lanes and type of a load or store."""
    lanes = _LANES.get(modifiers[0], 1) if modifiers else 1
    rest = modifiers[1:] if lanes > 1 else modifiers
    known = len(rest) == 1 and rest[0] in BITS and rest[0] != "pred"
    return (lanes, rest[0]) if known else None


def _registers(operand: Operand, lanes: int) -> tuple[Register, ...]:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    found = tuple(part for part in parts if isinstance(part, Register))
    if len(found) != lanes or len(parts) != lanes:
        raise Unsupported(f"{len(parts)} registers for {lanes}")
    return found


def _number(operand: Operand) -> int:
    if not isinstance(operand, Number):
        raise Unsupported(f"{operand} in place of a constant")
    return operand.value
