"""Reads the machine code of a kernel (SASS): its loops, and the order in which they load, use and wait.

A load takes a register when it is issued and fills it hundreds of cycles later; the first instruction that
reads the register waits. So a load issued after another load's first use waits a second time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, its predicate left out; registers are the general ones, by number."""

    opcode: str  # with its modifiers: LDG.E.128
    reads: frozenset[int]
    writes: frozenset[int]

    @property
    def is_load(self) -> bool:
        """Whether it loads from global memory into registers."""
        return self.opcode.startswith("LDG.")

    @property
    def is_wide_load(self) -> bool:
        """Whether it loads 16 bytes from global memory."""
        return self.is_load and ".128" in self.opcode

    @property
    def is_barrier(self) -> bool:
        """Whether it waits for other threads of the block."""
        return self.opcode.startswith(("BAR.", "SYNCS", "WARPSYNC"))

    @property
    def is_shared(self) -> bool:
        """Whether it reads or writes shared memory."""
        return self.opcode.startswith(("LDS", "STS", "LDGSTS", "STSM", "ATOMS"))


@dataclass(frozen=True)
class Kernel:
    """The instructions of a kernel in order, and the ranges of them that loop."""

    instructions: tuple[Instruction, ...]
    loop_ranges: tuple[tuple[int, int], ...]  # first, past the last

    def loading_loops(self) -> list[tuple[Instruction, ...]]:
        """The innermost loops that load from global memory."""
        loading = [
            (first, past)
            for first, past in self.loop_ranges
            if any(i.is_load for i in self.instructions[first:past])
        ]
        return [
            self.instructions[first:past]
            for first, past in loading
            if not any(first <= a and b <= past and (a, b) != (first, past) for a, b in loading)
        ]


def disassemble(cubin: bytes, nvdisasm: Path) -> Kernel:
    """The only kernel in a cubin, read with NVIDIA's disassembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> Kernel:
    """A kernel from what ``nvdisasm -c`` prints.

    Raises:
        ValueError: there is no instruction in the text, or a branch to a label that it does not have.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            if found[1].split(".")[0] == "BRA" and (target := re.search(r"\.L_\w+", found[2])):
                branches.append((len(instructions), target[0]))
            instructions.append(_instruction(found[1], found[2]))
    unknown = {label for _, label in branches} - labels.keys()
    if not instructions or unknown:
        raise ValueError(f"expected what nvdisasm -c prints, got labels {unknown} and {text[:200]!r}")
    back = [(labels[label], at + 1) for at, label in branches if labels[label] <= at]
    return Kernel(tuple(instructions), tuple(back))


def _instruction(opcode: str, operands: str) -> Instruction:
    """Every register operand but the first is read; the first is written, unless it is a store's address."""
    first, *others = operands.split(",")
    if opcode.startswith(("ST", "RED", "BRA", "BAR")):
        others, first = [first, *others], ""
    reads = _registers(",".join(others), 1)
    if opcode.startswith("ST"):
        reads |= _registers(others[-1], _width(opcode))
    writes = _registers(first, _width(opcode) if opcode.startswith("LD") else 1)
    return Instruction(opcode, frozenset(reads), frozenset(writes))


def _width(opcode: str) -> int:
    """Registers of the data of a load or store."""
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


def _registers(operands: str, width: int) -> set[int]:
    """Registers named in operands; ``R4.64`` is a pair, and others are the first of ``width``."""
    found: set[int] = set()
    for number, pair in re.findall(r"\bR(\d+)(\.64)?", operands):
        found.update(range(int(number), int(number) + (2 if pair else width)))
    return found


def late_loads(instructions: Sequence[Instruction], narrow: bool = False) -> list[Instruction]:
    """Loads issued after what an earlier one brings has been used: wide ones, or all with ``narrow``."""
    coming: set[int] = set()
    late, used = [], False
    for instruction in instructions:
        used = used or bool(instruction.reads & coming)
        if instruction.is_wide_load or (narrow and instruction.is_load):
            coming |= instruction.writes
            if used:
                late.append(instruction)
    return late
