"""PTX text as kernels: what nvcc and Triton write, no more. What is not understood is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ptx.faults import Unsupported
from ptx.values import BITS


@dataclass(frozen=True)
class Register:
    """``%r5``, or a special one such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Number:
    """A constant: an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable of shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Number
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, …}``."""

    parts: tuple[Operand, ...]


Operand = Register | Number | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.v4.b32 {…}, […]`` has the opcode ``ld`` and the modifiers ``global v4 b32``."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    line: int
    text: str

    @cached_property
    def name(self) -> str:
        """With its modifiers: ``ld.global.v4.b32``."""
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Parameter:
    """A kernel's argument: its place in parameter space."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Kernel:
    """One ``.entry``."""

    name: str
    parameters: tuple[Parameter, ...]
    threads: int  # of a block
    widths: dict[str, int]  # register → bits; 1 for a predicate
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # → index of the instruction behind it
    shared: dict[str, int]  # variables of shared memory → offset
    shared_bytes: int  # of those whose size is known; others begin behind them

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels in PTX text, by name.

    Raises:
        Unsupported: there is none, or a line that is not understood.
    """
    lines = [" ".join(line.partition("//")[0].split()) for line in text.splitlines()]
    shared: dict[str, int] = {}
    kernels, at, shared_bytes = {}, 0, 0
    while at < len(lines):
        line = lines[at]
        if variable := re.fullmatch(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];", line):
            shared_bytes = _round_up(shared_bytes, int(variable[1]))
            shared[variable[2]] = shared_bytes
            shared_bytes += int(variable[3] or 0)
        elif entry := re.search(r"\.entry ([\w$]+)\s*\(", line):
            kernel, at = _kernel(entry[1], lines, at, shared, shared_bytes)
            kernels[kernel.name] = kernel
        elif line.startswith(".section"):
            while lines[at] != "}" and not lines[at].endswith("}"):
                at += 1
        elif line and not re.match(r"\.(version|target|address_size|file) ", line):
            raise Unsupported(f"line {at + 1}: {line}")
        at += 1
    if not kernels:
        raise Unsupported(f"expected PTX with an .entry, got {text[:200]!r}")
    return kernels


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_PARAMETER = re.compile(
    r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr (?:\.\w+ )*?(?:\.align \d+ )?)?(\w+)(?:\[(\d+)\])?"
)
_DECLARED = re.compile(r"\.reg \.(\w+) (%\w+)<(\d+)>;")
_LABEL = re.compile(r"(\$\w+):")


def _kernel(
    name: str, lines: list[str], at: int, shared: dict[str, int], shared_bytes: int
) -> tuple[Kernel, int]:
    """The kernel that begins in line ``at``, and the line of its last brace."""
    parameters: list[Parameter] = []
    threads, end = 0, 0
    while lines[at] != "{":
        if found := _PARAMETER.match(lines[at]):
            size = BITS[found[2]] // 8
            end = _round_up(end, int(found[1] or size))
            parameters.append(Parameter(found[3], end, size * int(found[4] or 1)))
            end += parameters[-1].size
        elif found := re.match(r"\.(?:reqntid|maxntid) (\d+)((?:, \d+)*)", lines[at]):
            if found[2].strip(", 1"):
                raise Unsupported(f"line {at + 1}: {lines[at]}: blocks of one dimension only")
            threads = int(found[1])
        elif not re.match(r"(?:\.\w+ )?\.entry |\.maxnreg |\.minnctapersm |\)|$", lines[at]):
            raise Unsupported(f"line {at + 1}: {lines[at]}")
        at += 1
    if not threads:
        raise Unsupported(f"{name}: no .reqntid or .maxntid says how many threads a block has")
    widths: dict[str, int] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    while lines[at := at + 1] != "}":
        line = lines[at]
        if declared := _DECLARED.fullmatch(line):
            widths |= {f"{declared[2]}{i}": BITS[declared[1]] for i in range(int(declared[3]))}
        elif label := _LABEL.fullmatch(line):
            labels[label[1]] = len(instructions)
        elif line and not line.startswith((".loc ", '.pragma "nounroll";')):
            instructions += _instructions(line, at + 1)
    return (
        Kernel(
            name, tuple(parameters), threads, widths, tuple(instructions), labels, dict(shared), shared_bytes
        ),
        at,
    )


_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+) )?([a-z][\w.:]*)(?: (.*))?")


def _instructions(line: str, number: int) -> Iterator[Instruction]:
    if not line.endswith(";"):
        raise Unsupported(f"line {number}: {line}")
    for text in filter(None, map(str.strip, line.split(";"))):
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise Unsupported(f"line {number}: {text}")
        negation, predicate, name, operands = found.groups()
        opcode, *modifiers = name.replace("::", ".").split(".")
        try:
            parsed = _operands(operands or "")
        except Unsupported as fault:
            raise Unsupported(f"{fault}; line {number}: {text}") from None
        guard = Register(predicate) if predicate else None
        yield Instruction(opcode, tuple(modifiers), parsed, guard, negation == "!", number, text)


@lru_cache(1 << 16)
def _operands(text: str) -> tuple[Operand, ...]:
    """Split at commas, but those between brackets."""
    return tuple(_operand(part.strip()) for part in re.split(r",(?![^{\[]*[}\]])", text)) if text else ()


_REGISTER = re.compile(r"%[\w.]+")
_ADDRESS = re.compile(r"\[ *([%$\w]+) *(?:\+ *(-?\d+))? *\]")
_FLOAT = re.compile(r"0[fFdD]([0-9A-Fa-f]+)")
_INTEGER = re.compile(r"(-?(?:0x[0-9A-Fa-f]+|\d+))U?")
_SYMBOL = re.compile(r"[A-Za-z_$][\w$]*")


def _operand(text: str) -> Operand:
    if _REGISTER.fullmatch(text):
        return Register(text)
    if text[:1] == "{" and text[-1:] == "}":
        return Vector(_operands(text[1:-1].strip()))
    if found := _ADDRESS.fullmatch(text):
        base = _operand(found[1])
        assert isinstance(base, Register | Symbol | Number)
        return Address(base, int(found[2] or 0))
    if found := _FLOAT.fullmatch(text):
        return Number(int(found[1], 16))
    if found := _INTEGER.fullmatch(text):
        return Number(int(found[1], 0))
    if _SYMBOL.fullmatch(text):
        return Symbol(text)
    raise Unsupported(f"an operand such as {text}")
