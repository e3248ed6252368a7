"""A driver under Triton's launcher, whose launches are executed here, on CPU tensors.

Kernels go the way they go on a card: the op's own launcher, Triton's JIT, which picks a specialisation by the
arguments, its compiler as far as PTX, and the driver, which is given what a card's would be given.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ptx.machine import Only, launch
from ptx.memory import Global
from ptx.parser import Kernel, parse

# Of an A100, H100 and B200: bytes of shared memory that a block may have.
MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
_INTEGERS = {
    "i1": "b",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
}


@functools.lru_cache(256)
def _kernel(ptx: str, name: str) -> Kernel:
    return parse(ptx)[name]


class Driver(DriverBase):
    """A card of one architecture. It loads PTX, as the driver of a card can; there are no binaries."""

    def __init__(self, arch: int, memory: Global, edit: Callable[[str], str], only: Only) -> None:
        super().__init__()
        self.arch, self.memory, self.edit, self.only = arch, memory, edit, only
        self.launches: list[tuple[int, int, int]] = []  # their grids
        self.launcher_cls = Launcher
        properties = {"max_shared_mem": MAX_SHARED[arch]}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # module, function, registers, spills, threads of a block at most
            load_binary=lambda name, image, shared, device: (None, (name, image.decode()), 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        """Triton keeps kernels by device: one for every architecture."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class Launcher:
    """What Triton calls to launch a kernel of one signature. It belongs to the kernel, not to a driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds = tuple(source.signature.values())
        self._shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, function: tuple[str, str], *rest: Any) -> None:
        driver = triton.runtime.driver.active
        name, ptx = function
        kernel = _kernel(driver.edit(ptx), name)
        driver.launches.append((x, y, z))
        arguments = rest[4:]  # behind metadata and hooks
        packed = parameters(kernel, self._kinds, arguments)
        launch(kernel, (x, y, z), packed, driver.memory, self._shared, driver.only)


def parameters(kernel: Kernel, kinds: tuple[str, ...], arguments: tuple[Any, ...]) -> bytes:
    """Parameter space: tensors or addresses, integers, and null for the scratch that Triton puts last."""
    data = bytearray(kernel.parameter_bytes)
    given = [
        struct.pack("<Q", getattr(value, "data_ptr", lambda value=value: value)())
        if kind[0] == "*"
        else struct.pack(f"<{_INTEGERS[kind]}", value)
        for kind, value in zip(kinds, arguments, strict=True)
        if kind != "constexpr"
    ]
    scratch = kernel.parameters[len(given) :]
    assert [p.size for p in kernel.parameters] == [len(g) for g in given] + [8] * len(scratch)
    for parameter, value in zip(kernel.parameters, given, strict=False):
        data[parameter.offset : parameter.offset + parameter.size] = value
    return bytes(data)


def _ptx_only(*stages: Any) -> tuple[str, str] | None:
    """Triton's hook on its stages: the binary is the PTX. Without arguments, the key of such a pipeline."""
    if not stages:
        return "PTX in place of a binary", "'PTX in place of a binary'"
    stages[1]["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextmanager
def card(arch: int, memory: Global, edit: Callable[[str], str] = str, only: Only = range) -> Iterator[Driver]:
    """Launches inside of the ``with`` block run here, as on a card of that architecture.

    Args:
        memory: what there is on it.
        edit: changes the PTX before it is loaded.
        only: the blocks that run, of so many.
    """
    driver = Driver(arch, memory, edit, only)
    config = triton.runtime.driver
    before, hook = config._active, knobs.runtime.add_stages_inspection_hook
    config.set_active(driver)
    knobs.runtime.add_stages_inspection_hook = _ptx_only
    try:
        yield driver
    finally:
        config._active = before
        knobs.runtime.add_stages_inspection_hook = hook
