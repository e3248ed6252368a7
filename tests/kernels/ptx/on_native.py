"""The C++ launcher of the native kernels, whose launches are executed here, on CPU tensors.

csrc/ is built for the host (tests/kernels/host_launcher.py): the launcher picks a kernel of its table, a grid
and the arguments, as for a card; what runs is nvcc's PTX of the kernel of that name.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from ptx.faults import Fault
from ptx.machine import Only, launch
from ptx.memory import Global
from ptx.parser import Kernel, parse


class Module:
    """PTX as nvcc writes it, by the names of kernels behind their namespaces."""

    def __init__(self, text: str) -> None:
        header, *entries = re.split(r"^(?=(?:\.\w+ )?\.entry )", text, flags=re.M)
        if not entries:
            raise Fault(f"expected PTX with an .entry, got {header[:200]!r}")
        self._texts = {}
        for entry in entries:
            found = re.search(r"\.entry (\w+)", entry)
            assert found is not None
            # what follows the last kernel of a unit belongs to the next unit
            self._texts[_plain(found[1])] = entry[: entry.index("\n}") + 2]
        self.names = frozenset(self._texts)

    def text(self, name: str) -> str:
        """The PTX of one kernel."""
        if name not in self._texts:
            raise Fault(f"the launcher wants {name}, which nvcc did not compile: is the extension stale?")
        return self._texts[name]


@lru_cache(64)
def _kernel(text: str) -> Kernel:
    [kernel] = parse(text).values()
    return kernel


def _plain(name: str) -> str:
    """``_ZN7hicache<length>_GLOBAL__N_<more>20gated_sum_any_kernel…`` without the name of the namespace."""
    found = re.match(r"_ZN7hicache(\d+)(?=_GLOBAL__N_)", name)
    if found is None:
        raise Fault(f"expected a kernel of hicache's unnamed namespace, got {name}")
    return name[found.end() + int(found[1]) :]


@lru_cache(4)
def host_kernels(library: Path) -> dict[int, str]:
    """Names of the kernels in the launcher's library, by their distance from the function ``machine``."""
    listed = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    symbols = {name: int(at, 16) for at, name in re.findall(r"^(\w+) \w (\S+)$", listed, flags=re.M)}
    return {
        at - symbols["machine"]: _plain(name)
        for name, at in symbols.items()
        if re.match(r"_ZN7hicache\d+_GLOBAL__N_\w*_kernelI", name)
    }


class Card:
    """A card whose launches run here.

    Args:
        library: the launcher's.
        module: what is compiled for it.
        edit: changes that before it is loaded.
        only: the blocks that run, of so many.
    """

    def __init__(
        self, library: Path, module: Module, edit: Callable[[str], str] = str, only: Only = range
    ) -> None:
        self._names = host_kernels(library)
        self._origin = ctypes.cast(ctypes.CDLL(str(library)).machine, ctypes.c_void_p).value or 0
        self._module, self._edit, self._only = module, edit, only
        self.launches: list[tuple[str, int]] = []  # kernels and their blocks
        self._fault: BaseException | None = None

    @contextmanager
    def holding(self, machine: ctypes.Structure, memory: Global) -> Iterator[None]:
        """Launches of the ``with`` block run here, on what ``memory`` holds; a fault is raised by it."""
        callback = type(machine.launched)

        def launched(kernel: int, blocks: int, threads: int, arguments: ctypes.Array[ctypes.c_void_p]) -> int:
            try:
                self._launch(kernel, blocks, threads, arguments, memory)
            except BaseException as fault:
                self._fault = fault
                return 1
            return 0

        machine.launched = callback(launched)
        try:
            yield
        except RuntimeError:
            if self._fault is None:
                raise
        finally:
            machine.launched = callback()
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _launch(
        self,
        address: int,
        blocks: int,
        threads: int,
        arguments: ctypes.Array[ctypes.c_void_p],
        memory: Global,
    ) -> None:
        name = self._names[address - self._origin]
        self.launches.append((name, blocks))
        kernel = _kernel(self._edit(self._module.text(name)))
        if threads != kernel.threads:
            raise Fault(f"{name}: {threads} threads a block, where nvcc was told {kernel.threads}")
        packed = ctypes.string_at(arguments[0], kernel.parameter_bytes)
        launch(kernel, (blocks, 1, 1), packed, memory, only=self._only)
