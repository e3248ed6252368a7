"""What Triton makes of the kernels for Ampere, Hopper and Blackwell, read without a GPU.

16-byte loads and stores, no local memory (spills), at most 128 registers, products and sums kept apart; every
load of a tile issued before the first is waited for, and no thread waiting for another.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import sass

triton = pytest.importorskip("triton", reason="triton is not installed")

from hicache_kernels import triton_kernels  # noqa: E402
from hicache_kernels.backends import triton as backend  # noqa: E402
from hicache_kernels.tiles import Tile, default  # noqa: E402

if backend.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ARCHITECTURES = (80, 90, 100)
POINTERS = {"orders", "base", "gates", "out", "inv_gap", "coeffs"}
WIDE = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}

CASES = [
    *(
        ("_update_kernel", dtype, {"TOP": 4 if differences == 4 else 2, "NUM_DIFFERENCES": differences})
        for dtype in WIDE
        for differences in (0, 2, 4)
    ),
    *(("_forecast_kernel", dtype, {"NUM_COEFFS": num_coeffs}) for dtype in WIDE for num_coeffs in (1, 3, 5)),
    *(
        ("_update_forecast_kernel", dtype, {"TOP": max(differences, 2), "NUM_DIFFERENCES": differences})
        for dtype in WIDE
        for differences in (0, 2, 4)
    ),
    *(
        (
            "_gated_sum_kernel",
            dtype,
            {"TOP": num_coeffs - 1, "NUM_COEFFS": num_coeffs, "UPDATE": update, "GATED": gated},
        )
        for dtype in WIDE
        for num_coeffs in (1, 3, 5)
        for update in (False, True)
        for gated in (False, True)
    ),
    # a row of coefficients for each feature
    *(("_forecast_kernel", dtype, {"NUM_COEFFS": 3, "BY_FEATURE": True}) for dtype in WIDE),
    *(
        ("_update_forecast_kernel", dtype, {"TOP": 2, "NUM_DIFFERENCES": 2, "BY_FEATURE": True})
        for dtype in WIDE
    ),
    *(
        (
            "_gated_sum_kernel",
            dtype,
            {"TOP": 2, "NUM_COEFFS": 3, "UPDATE": update, "GATED": True, "BY_FEATURE": True},
        )
        for dtype in WIDE
        for update in (False, True)
    ),
]


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
architectures = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda a: f"sm_{a}")


def case_id(value) -> str:
    return "-".join(f"{k}{int(x)}" for k, x in value.items()) if isinstance(value, dict) else str(value)


def rows_read(constants: dict) -> int:
    return constants.get("NUM_COEFFS", constants.get("NUM_DIFFERENCES", 0) + 1)


def default_tile(dtype: str, constants: dict) -> Tile:
    return default(rows_read(constants), 4 if dtype == "fp32" else 2)


def compiled(
    name: str, dtype: str, constants: dict, arch: int, integers: str = "i32", tile: Tile | None = None
):
    """A kernel as its launcher compiles it for tensors of a History: everything a multiple of 16."""
    kernel = getattr(triton_kernels, name)
    constants = dict(constants)
    tile = tile or default_tile(dtype, constants)
    if name == "_gated_sum_kernel":
        gated = constants["GATED"]
        constants["ROWS"], constants["COLUMNS"] = (tile.rows, tile.columns) if gated else (1, tile.block)
        constants["STAGES"] = tile.num_stages
        if not gated:
            constants["gates"] = None
        if not constants["UPDATE"]:
            constants["inv_gap"] = None
    else:
        constants["BLOCK"] = tile.block
    if "BY_FEATURE" in kernel.arg_names:
        constants.setdefault("BY_FEATURE", False)
        if "features" in kernel.arg_names and not constants["BY_FEATURE"]:
            constants["features"] = 1
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in POINTERS:
            signature[argument] = "*fp32" if argument in ("inv_gap", "coeffs") else WIDE[dtype]
        else:
            signature[argument] = integers
        if argument not in ("num_features", "features", "rows"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = backend.options(tile, updating=constants.get("UPDATE", False))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def accesses(ptx: str, operation: str) -> list[int]:
    """Bytes of every global load or store of tensors in PTX; scalars (coefficients, gaps) are left out."""
    widths = []
    for line in ptx.splitlines():
        found = re.search(rf"\b{operation}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", line)
        if found:
            widths.append(int(found.group(1) or 1) * int(found.group(2)) // 8)
    return widths


def resources(cubin: bytes, tmp_path: Path) -> str:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    done = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
    )
    return done.stdout


def assert_fits(kernel, tmp_path: Path) -> None:
    """At most 128 registers, and none of them spilled."""
    usage = resources(kernel.asm["cubin"], tmp_path)
    [registers] = map(int, re.findall(r"REG:(\d+)", usage))
    [stack] = map(int, re.findall(r"STACK:(\d+)", usage))
    [local] = map(int, re.findall(r"LOCAL:(\d+)", usage))
    assert 0 < registers <= 128
    assert stack == local == 0, usage


@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES}))
@pytest.mark.parametrize("integers", ["i32", "i64"])
def test_row_addresses_are_64_bit(name, integers):
    """A stride that fits 32 bits, times an order, may not: no 32-bit product but the small ones of tiles."""
    constants = next(c for n, _, c in reversed(CASES) if n == name)
    ttir = compiled(name, "bf16", constants, 90, integers).asm["ttir"]
    stride = re.search(r"%stride: (i32|i64)", ttir)
    assert stride.group(1) == integers
    products = re.findall(r"arith\.muli .*%stride(?:_\d+)?\b.* : (i\d+)", ttir)
    assert products, "no order is found by multiplying"
    assert set(products) == {"i64"}


@pytest.mark.few(75)
@architectures
@pytest.mark.parametrize(("name", "dtype", "constants"), CASES, ids=case_id)
def test_wide_accesses_and_no_spills(name, dtype, constants, arch, tmp_path):
    kernel = compiled(name, dtype, constants, arch)
    ptx = kernel.asm["ptx"]
    loads = [width for width in accesses(ptx, "ld") if width > 4]
    stores = accesses(ptx, "st")
    assert loads, "no tensor is loaded"
    assert stores, "nothing is stored"
    assert set(loads) == {16}, loads
    assert set(stores) == {16}, stores
    narrow = sum(width <= 4 for width in accesses(ptx, "ld"))
    assert narrow <= rows_read(constants) + 1, "a tensor is loaded in narrow pieces"
    assert not re.search(r"\bfma\.rn\.f32\b", ptx), "products and sums are fused"
    assert_fits(kernel, tmp_path)


# Half a second each, so not all: three orders, and one and five where a tile is fullest and emptiest.
DISASSEMBLED = [
    (name, dtype, constants)
    for name, dtype, constants in CASES
    if dtype != "fp16" and (rows_read(constants) == 3 or constants.get("GATED", False))
]


@pytest.mark.few(30)
@architectures
@pytest.mark.parametrize(("name", "dtype", "constants"), DISASSEMBLED, ids=case_id)
def test_every_load_of_a_tile_is_issued_before_the_first_is_used(name, dtype, constants, arch):
    """In machine code: one wait for memory a feature, no thread waiting for another, no shared memory."""
    cubin = compiled(name, dtype, constants, arch).asm["cubin"]
    kernel = sass.disassemble(cubin, TOOLS / "nvdisasm")
    loops = kernel.loading_loops()
    gated_sum = name == "_gated_sum_kernel"
    assert len(loops) == gated_sum
    body = loops[0] if gated_sum else kernel.instructions
    tile = default_tile(dtype, constants)
    bytes_a_thread = tile.block * (4 if dtype == "fp32" else 2) // (32 * tile.num_warps)
    tensors = rows_read(constants) + constants.get("GATED", False)
    assert sum(i.is_wide_load for i in body) == tensors * bytes_a_thread // 16
    assert not sass.late_loads(body, narrow=gated_sum)
    assert not [i.opcode for i in body if i.is_barrier or i.is_shared]
    if gated_sum:  # coefficients and the gap are read before it, unless every feature has its own
        narrow = [i.opcode for i in body if i.is_load and not i.is_wide_load]
        assert len(narrow) == rows_read(constants) * constants.get("BY_FEATURE", False)


# Bytes that must be in flight on one multiprocessor for full bandwidth: the vendor's bandwidth ÷ its
# multiprocessors × 0.7 µs, a generous latency of memory under load. An A100 (80 GB), an H200, a B200.
NEEDED = {80: 2.0e12 / 108 * 0.7e-6, 90: 4.8e12 / 132 * 0.7e-6, 100: 8.0e12 / 148 * 0.7e-6}
# what runs in the steady state: an update of one order happens twice a run at most
STEADY = [c for c in CASES if c[1] != "fp16" and not (c[2].get("UPDATE") and c[2]["NUM_COEFFS"] == 1)]
THREADS = 2048  # of one multiprocessor, on all three
REGISTERS = 65536


@pytest.mark.few(46)
@architectures
@pytest.mark.parametrize(("name", "dtype", "constants"), STEADY, ids=case_id)
def test_enough_bytes_in_flight(name, dtype, constants, arch, tmp_path):
    """Little's law for the default tile, all of whose loads are in flight at once (the test above)."""
    kernel = compiled(name, dtype, constants, arch)
    usage = resources(kernel.asm["cubin"], tmp_path)
    registers = -(-int(re.search(r"REG:(\d+)", usage).group(1)) // 8) * 8
    tile = default_tile(dtype, constants)
    threads = 32 * tile.num_warps
    blocks = min(THREADS // threads, REGISTERS // (registers * threads), 32)
    in_flight = blocks * tile.block * rows_read(constants) * (4 if dtype == "fp32" else 2)
    assert in_flight >= NEEDED[arch], (in_flight, registers)


@architectures
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("update", [False, True], ids=["settled", "pending"])
def test_pipelined_features(update, dtype, stages, arch, tmp_path):
    """With several stages the loads of coming features are asynchronous copies, and nothing spills."""
    constants = {"TOP": 2, "NUM_COEFFS": 3, "UPDATE": update, "GATED": True}
    tile = Tile(num_stages=stages)
    kernel = compiled("_gated_sum_kernel", dtype, constants, arch, tile=tile)
    assert "cp.async" in kernel.asm["ptx"]
    assert_fits(kernel, tmp_path)
