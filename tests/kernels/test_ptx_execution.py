"""The compiled kernels, executed without a card: what they touch, in what order, and every bit they write.

Triton's for three architectures and nvcc's, each through its own launcher, on memory of which they may touch
only what the op is specified to read and write. The result is the reference's, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_tools import nvcc, output
from op_cases import Case
from ptx.on_native import Module

from hicache_kernels.tiles import Tile

ROOT = Path(__file__).parents[2]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ARCHITECTURES = (80, 90, 100)
CASCADES = ("update_", "forecast", "update_forecast_")
TRITON_PAIRS = [(kept, base) for kept in (F32, BF16, F16) for base in (F32, BF16, F16)]
NATIVE_PAIRS = [
    (F32, F32),
    (BF16, BF16),
    (F16, F16),
    (F64, F64),
    (F32, BF16),
    (F32, F16),
    (BF16, F32),
    (F16, F32),
]

# More than one block, a last one that is not full, and rows and channels that end inside of a tile.
FLAT, WIDE = (2504,), (2, 6, 320)


def triton_cases() -> list[tuple[int, Case]]:
    """Every op, pair of dtypes and architecture; an update is pending at every other."""
    cases = []
    for arch in ARCHITECTURES:
        cases += [(arch, Case(op, dtype, FLAT)) for op in CASCADES for dtype in (F32, BF16, F16)]
        for index, (kept, base) in enumerate(TRITON_PAIRS):
            pending = (index + ARCHITECTURES.index(arch)) % 2 == 1
            cases.append((arch, Case("gated_sum", kept, WIDE, base, pending=pending)))
    return cases


# Addresses, rows and orders at which kernels are compiled otherwise, or take another way.
ODD = [
    Case("update_forecast_", BF16, (1001,), offset=3),
    Case("update_", F32, (1,), num_orders=5, used=2, padding=1),
    Case("forecast", BF16, (3000,), num_orders=5, used=5, scalars=F64),
    Case("update_forecast_", F32, (5000,), num_orders=1, used=1),
    Case("gated_sum", BF16, (2, 3, 7), offset=1, pending=True),
    Case("gated_sum", BF16, (1, 9, 264), gated=False, special=True),
    Case("gated_sum", F32, (2, 37, 48), num_orders=5, used=4, in_place=True, pending=True),
    Case("gated_sum", BF16, (1, 18, 264), num_orders=1, used=1, num_features=1, in_place=True),
    Case("forecast", BF16, (3 * 1032,), by_feature=True),
    Case("forecast", F32, (3 * 7,), offset=1, by_feature=True, scalars=F64),
    Case("update_forecast_", BF16, (3 * 1032,), by_feature=True),
    Case("update_forecast_", F32, (3 * 1001,), used=2, by_feature=True),
    Case("gated_sum", BF16, WIDE, BF16, by_feature=True),
    Case("gated_sum", BF16, (1, 9, 264), gated=False, pending=True, by_feature=True),
    Case("gated_sum", F32, (2, 3, 7), offset=1, pending=True, by_feature=True),
]


@pytest.mark.parametrize(("arch", "case"), triton_cases(), ids=str)
def test_triton(on_card, case, arch):
    assert len(on_card(case, arch)) == 1


@pytest.mark.parametrize("case", ODD, ids=str)
def test_triton_at_odd_places(on_card, case):
    on_card(case, 90)


PIPELINED = Case("gated_sum", BF16, (2, 6, 320), num_features=5)


@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@pytest.mark.parametrize(("arch", "stages", "by_feature"), [(80, 3, False), (90, 2, True), (100, 2, False)])
def test_triton_with_features_on_their_way(on_card, arch, stages, by_feature, pending):
    """Tiles of several stages copy coming features through shared memory while one is added up."""
    seen = []
    on_card(
        replace(PIPELINED, pending=pending, by_feature=by_feature),
        arch,
        Tile(num_stages=stages),
        lambda ptx: seen.append(ptx) or ptx,
    )
    assert all("cp.async.wait_group" in ptx for ptx in seen)


def more_triton_cases() -> list[tuple[int, Case]]:
    """Every number of orders; gated sums as they are not above, and without gates."""
    cases = []
    for num_orders, used in ((1, 1), (2, 2), (3, 1), (5, 5), (5, 2)):
        orders = {"num_orders": num_orders, "used": used}
        for dtype in (F32, BF16):
            cases += [(90, Case(op, dtype, (3 * 1024 + 8,), **orders)) for op in CASCADES]
            pendings = (False, True)
            cases += [(90, Case("gated_sum", dtype, WIDE, pending=p, offset=8, **orders)) for p in pendings]
    for arch, case in triton_cases():
        if case.op == "gated_sum":
            cases.append((arch, replace(case, pending=not case.pending, in_place=True)))
            if case.kept == case.base:
                cases.append((arch, replace(case, gated=False, shape=(2, 7, 312), special=True)))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), more_triton_cases(), ids=str)
def test_triton_more(on_card, case, arch):
    on_card(case, arch)


TILES = [
    *(Tile(num_stages=stages) for stages in (2, 3, 4)),
    Tile(rows=2, columns=128, num_warps=8, num_stages=2),
    Tile(rows=16, columns=64, num_warps=2),
    Tile(rows=1, columns=1024, num_warps=8),
]


@pytest.mark.slow
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending"])
@pytest.mark.parametrize(("kept", "base"), [(BF16, BF16), (F32, F32), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.rows}x{t.columns}w{t.num_warps}s{t.num_stages}")
def test_triton_with_other_tiles(on_card, tile, kept, base, pending):
    arch = ARCHITECTURES[(TILES.index(tile) + pending) % 3]
    on_card(replace(PIPELINED, kept=kept, base=base, pending=pending, shape=(1, 18, 328)), arch, tile)


# What nvcc makes.


def native_cases() -> list[Case]:
    """Every op and pair of dtypes, 16 bytes at a time and one number; more to do than there are threads."""
    cases = []
    for op in CASCADES:
        for dtype in (F32, BF16, F16, F64):
            cases += [Case(op, dtype, (8008,)), Case(op, dtype, (1001,), offset=3, scalars=F64)]
    for index, (kept, base) in enumerate(NATIVE_PAIRS):
        wide = Case("gated_sum", kept, (2, 19, 320), base, pending=index % 2 == 1)
        cases += [wide, Case("gated_sum", kept, (2, 5, 97), base, pending=index % 2 == 0, scalars=F64)]
    for kept in (F32, BF16, F64):
        cases += [Case("forecast", kept, (3 * 1032,), by_feature=True)]
        cases += [Case("update_forecast_", kept, (3 * 1032,), by_feature=True, scalars=F64)]
        cases += [Case("gated_sum", kept, (2, 19, 320), kept, by_feature=True, pending=kept == F32)]
    cases += [Case("update_forecast_", BF16, (3 * 333,), by_feature=True)]
    cases += [Case("gated_sum", BF16, (2, 5, 97), BF16, pending=True, by_feature=True)]
    return [*cases, Case("gated_sum", BF16, (1, 9, 264), gated=False, special=True)]


@pytest.mark.parametrize("case", native_cases(), ids=str)
def test_native(on_native_card, extension, case):
    kernel, _ = on_native_card(case, extension)
    assert ("_any_kernel" in kernel) == (case.shape[-1] % 8 != 0)


def more_native_cases() -> list[Case]:
    """Every number of orders."""
    cases = []
    for used in (1, 2, 4, 5):
        orders = {"used": used, "num_orders": min(used + 1, 5)}
        for kept, base in NATIVE_PAIRS:
            cases.append(Case("gated_sum", kept, (1, 9, 320), base, pending=used % 2 == 0, **orders))
            cases.append(Case("gated_sum", kept, (2, 3, 31), base, pending=used % 2 == 1, **orders))
        for dtype in (F32, BF16, F16, F64):
            cases += [Case(op, dtype, (2056,), **orders) for op in CASCADES]
            cases.append(Case("update_forecast_", dtype, (99,), offset=1, **orders))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("case", more_native_cases(), ids=str)
def test_native_more(on_native_card, extension, case):
    on_native_card(case, extension)


@pytest.fixture(scope="session", params=[80, 90], ids=lambda arch: f"sm_{arch}")
def compiled_bf16(request, tmp_path_factory) -> Module:
    """The kernels of a bf16 history for an architecture whose PTX is not in the extension."""
    path = tmp_path_factory.mktemp("ptx") / "bf16.ptx"
    output(
        nvcc(), "-std=c++17", "--fmad=false", f"-arch=compute_{request.param}", "-ptx", "-DHICACHE_TYPE=bf16",
        f"-I{ROOT / 'csrc' / 'include'}", ROOT / "csrc" / "cuda_kernels.cu", "-o", path,
    )  # fmt: skip
    return Module(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in native_cases() if c.kept == BF16], ids=str)
def test_native_compiled_for_others(on_native_card, compiled_bf16, case):
    on_native_card(case, compiled_bf16)
