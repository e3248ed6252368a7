"""Scripts are run by tests, each in a process of its own: they are not collected."""

import os
import subprocess
from collections.abc import Callable

import host_launcher
import pytest
from cuda_tools import output, tool
from op_cases import Call, Case, assert_reference_bits
from ptx.on_native import Card, Module

from hicache_kernels import tiles
from hicache_kernels.backends import native
from hicache_kernels.tiles import Tile

collect_ignore = ["scripts"]
# the extension's file, whatever a test puts in its place
WITH_CUDA = native._native.__file__ if native.cuda_archs() else None


@pytest.fixture(scope="session")
def host_native(tmp_path_factory):
    """The native extension built for a host in place of CUDA: the module, its machine and its file."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed: nothing to bind with")
    if host_launcher.COMPILER is None:
        pytest.skip("no C++ compiler")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: one builds it
    try:
        return host_launcher.build(base / "host_native")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)


@pytest.fixture
def triton_card():
    """``ptx.on_triton.card``, where there is a Triton that compiles."""
    pytest.importorskip("triton", reason="triton is not installed")
    from hicache_kernels.backends import triton as backend

    if backend.interpreted():
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from ptx.on_triton import card

    return card


@pytest.fixture
def on_card(triton_card):
    """Run a case on a card of an architecture, by Triton: the grids launched."""
    from hicache_kernels.backends import triton as backend

    def run(
        case: Case, arch: int, tile: Tile | None = None, edit: Callable[[str], str] = str
    ) -> list[tuple[int, int, int]]:
        call = Call(case)
        op = "gated_sum_update_" if case.op == "gated_sum" and case.pending else case.op
        features = case.num_features if case.op == "gated_sum" else 1
        table = {tiles.key(op, case.used, case.kept.itemsize, features): tile} if tile else {}
        with tiles.override(table), triton_card(arch, call.memory, edit) as driver:
            call.run(backend)
        assert_reference_bits(call)
        return driver.launches

    return run


@pytest.fixture(scope="session")
def extension() -> Module:
    """The PTX in the extension: of its newest architecture, every dtype."""
    if WITH_CUDA is None:
        pytest.skip("the extension was built without CUDA")
    return Module(output(tool("cuobjdump"), "--dump-ptx", WITH_CUDA))


@pytest.fixture
def native_place(host_native, monkeypatch):
    """Let the native backend launch on a card of three multiprocessors, or as many as one says."""
    module, machine, _ = host_native
    machine.reset()
    monkeypatch.setattr(native, "_native", module)
    monkeypatch.setattr(native, "_MISSING", None)

    def choose(processors: int) -> None:
        monkeypatch.setattr(native, "_place", lambda orders: ("cuda_", (processors, 0)))

    choose(3)
    return choose


@pytest.fixture
def on_native_card(host_native, native_place):
    """Run a case on a card of three multiprocessors, by the C++ launcher: the kernel and its blocks."""
    _, machine, library = host_native

    def run(case: Case, compiled: Module, edit: Callable[[str], str] = str) -> tuple[str, int]:
        call, card = Call(case), Card(library, compiled, edit)
        with card.holding(machine, call.memory):
            call.run(native)
        assert_reference_bits(call)
        [launched] = card.launches
        return launched

    return run
