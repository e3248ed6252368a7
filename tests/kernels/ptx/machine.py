"""The threads of a grid: they run a kernel's instructions, branch, meet again and wait for each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ptx.access import Access
from ptx.alu import FUSABLE, OPERATIONS
from ptx.faults import Divergence, Fault, Undefined, Unsupported
from ptx.memory import Global, Shared
from ptx.parser import Instruction, Kernel, Number, Symbol, Vector
from ptx.registers import Active, Registers
from ptx.shadow import person
from ptx.values import Array, bits_of, viewed

THREADS_AT_A_TIME = 1 << 14
MAX_STEPS = 1 << 19  # of one batch of blocks: more is an endless loop
MAX_GRID = (2**31 - 1, 65535, 65535)  # of every card since Kepler

Only = Callable[[int], Sequence[int]]


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    arguments: bytes,
    memory: Global,
    dynamic_shared: int = 0,
    only: Only = range,
) -> None:
    """Run a kernel on every block of a grid; what it wrote is then in the allocations' data.

    Args:
        arguments: parameter space, as the launcher packs it.
        dynamic_shared: bytes of shared memory that the launch asks for.
        only: the numbers of those blocks to run, of so many.

    Raises:
        Fault: the kernel did what it must not.
    """
    if len(arguments) != kernel.parameter_bytes:
        raise Fault(f"{kernel.name}: {len(arguments)} bytes of arguments for {kernel.parameter_bytes}")
    if any(not 1 <= size <= limit for size, limit in zip(grid, MAX_GRID, strict=True)):
        raise Fault(f"{kernel.name}: a grid of {grid} blocks, limits are {MAX_GRID}")
    numbers = np.asarray(only(math.prod(grid)))
    a_batch = max(1, THREADS_AT_A_TIME // kernel.threads)
    for first in range(0, len(numbers), a_batch):
        with np.errstate(all="ignore"):
            Batch(kernel, grid, numbers[first : first + a_batch], arguments, memory, dynamic_shared).run()
    memory.copy_back()


class Batch:
    """Some blocks of a grid, all of whose threads run in lockstep."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        numbers: Array,
        arguments: bytes,
        memory: Global,
        dynamic_shared: int,
    ) -> None:
        threads = len(numbers) * kernel.threads
        self._kernel, self._numbers = kernel, numbers
        self._epoch = np.zeros(len(numbers), np.int64)
        self._everyone = Active(np.ones(threads, np.bool_), True)
        thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), len(numbers))
        block = np.repeat(numbers, kernel.threads)
        x, y, _ = grid
        special = {
            "%tid.x": thread,
            "%ctaid.x": block % x,
            "%ctaid.y": block // x % y,
            "%ctaid.z": block // x // y,
            "%ntid.x": np.full(threads, kernel.threads),
            **{f"%nctaid.{axis}": np.full(threads, size) for axis, size in zip("xyz", grid, strict=True)},
        }
        self._registers = Registers(
            kernel, threads, {name: value.astype(np.uint32) for name, value in special.items()}
        )
        self._thread = thread
        shared = Shared(len(numbers), kernel.shared_bytes + dynamic_shared)
        place = np.repeat(np.arange(len(numbers)), kernel.threads)
        self._access = Access(self._registers, arguments, memory, shared, place)
        self._access.who = self._who()

    def _who(self) -> Array:
        threads = self._kernel.threads
        return person(np.repeat(self._numbers, threads), np.repeat(self._epoch, threads), self._thread)

    def run(self) -> None:
        """Until every thread has returned. Those furthest behind go first, so that diverged ones meet."""
        self._refuse_unknown()
        waiting = {0: self._everyone}
        for _ in range(MAX_STEPS):
            if not waiting:
                return
            at = min(waiting)
            here = waiting.pop(at)
            instruction = self._kernel.instructions[at]
            try:
                for target, active in self._step(instruction, at, here):
                    if target in waiting:
                        active = Active.of(active.mask | waiting[target].mask)
                    waiting[target] = active
            except Fault as fault:
                raise type(fault)(f"{fault}; {self._kernel.name}, {instruction}") from None
        raise Undefined(f"{self._kernel.name}: no end after {MAX_STEPS} instructions")

    def _step(self, instruction: Instruction, at: int, here: Active) -> list[tuple[int, Active]]:
        """Run one instruction: where threads go next."""
        active = here
        if instruction.predicate is not None:
            condition = self._registers.read(instruction.predicate, "pred", here)
            active = Active.of(here.mask & (condition ^ instruction.negated))
        if instruction.opcode in ("bra", "ret"):
            others = Active.of(here.mask & ~active.mask)
            going = [(at + 1, others), *self._targets(instruction, active)]
            return [(target, threads) for target, threads in going if threads.mask.any()]
        if at + 1 == len(self._kernel.instructions):
            raise Unsupported("the code ends without ret")
        if active.mask.any():
            self._execute(instruction, active)
        return [(at + 1, here)]

    def _targets(self, instruction: Instruction, active: Active) -> list[tuple[int, Active]]:
        """Where a branch or return sends the threads it is for."""
        match instruction.name, instruction.operands:
            case "ret", ():
                return []
            case _, (Symbol(label),) if label in self._kernel.labels:
                return [(self._kernel.labels[label], active)]
        raise Unsupported(f"the branch {instruction.text}")

    def _execute(self, instruction: Instruction, active: Active) -> None:
        if instruction.opcode == "bar":
            self._wait(instruction, active)
        elif instruction.opcode == "mov" and any(isinstance(o, Vector) for o in instruction.operands):
            self._move_vector(instruction, active)
        elif instruction.name in OPERATIONS:
            self._compute(instruction, active)
        else:
            self._access.execute(instruction, active)

    def _refuse_unknown(self) -> None:
        """Raise where the kernel has an instruction that is not known, though no thread may come there."""
        for instruction in {i.name: i for i in self._kernel.instructions}.values():
            if instruction.name in FUSABLE:
                raise Undefined(f"{instruction.name} has no rounding, so it may be fused; {instruction}")
            known = instruction.name in {"bra", "bra.uni", "ret", "bar.sync"} | OPERATIONS.keys()
            if not known and not self._access.knows(instruction):
                raise Unsupported(f"the instruction {instruction.name}; {instruction}")

    def _wait(self, instruction: Instruction, active: Active) -> None:
        """A barrier: an epoch ends for the blocks that are there, as a whole."""
        if instruction.operands != (Number(0),):
            raise Unsupported(f"the barrier {instruction.text}")
        there = active.mask.reshape(len(self._numbers), -1)
        some, whole = there.any(1), there.all(1)
        if (some != whole).any():
            block = int(np.argmax(some != whole))
            count = int(there[block].sum())
            raise Divergence(
                f"{count} of {there.shape[1]} threads of block {self._numbers[block]} at a barrier"
            )
        self._epoch[whole] += 1
        self._access.who = self._who()

    def _move_vector(self, instruction: Instruction, active: Active) -> None:
        [kind] = instruction.modifiers
        to, source = instruction.operands
        if isinstance(source, Vector):
            self._registers.write(to, self._registers.pack(source, kind, active), active)
        elif isinstance(to, Vector):
            self._registers.unpack(to, self._registers.read(source, kind, active), active)

    def _compute(self, instruction: Instruction, active: Active) -> None:
        operation = OPERATIONS[instruction.name]
        to, *sources = instruction.operands
        if len(sources) != len(operation.sources):
            raise Unsupported(f"{instruction.name} of {len(sources)} operands")
        wider = instruction.opcode == "cvt"
        numbers = [
            viewed(self._registers.read(source, kind, active, wider), kind)
            for source, kind in zip(sources, operation.sources, strict=True)
        ]
        if operation.undefined is not None and (operation.undefined(*numbers) & active.mask).any():
            raise Undefined(f"{instruction.name} of such operands")
        self._registers.write(to, bits_of(operation.compute(*numbers), operation.to), active)
