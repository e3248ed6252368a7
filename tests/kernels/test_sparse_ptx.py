"""What Triton makes of column-sparse attention for Ampere, Hopper and Blackwell, read without a GPU.

Tensor cores multiply, rows and columns come 16 bytes at a time, nothing is spilled. What the PTX computes is
not executed here: tests/kernels/ptx has neither matrix instructions nor asynchronous copies. Numbers are
checked in Triton's interpreter (test_sparse_attention.py).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from hicache_kernels.backends import triton as ops_in_triton  # noqa: E402
from hicache_kernels.sparse_attention import triton as backend  # noqa: E402

if ops_in_triton.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
# what multiplies matrices: mma of a warp, of four warps, and the fifth generation's
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}
DTYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {"columns": "*i32", "constants": "*fp32"}
TENSORS = ("query", "key", "value", "base", "out")
KERNELS = {
    "_sparse_attention_kernel": {"BASED": True, "SIGN": 1, "GROUP": 192},
    "_row_constants_kernel": {},
    "_column_sums_kernel": {"GROUP": 192},
}
architectures = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda a: f"sm_{a}")
kernels = pytest.mark.parametrize("name", KERNELS)


def compiled(name: str, dtype: str, arch: int, tokens: str = "i32", **changes: object):
    """A kernel as it is launched for heads of 128 channels, as FLUX and Wan have them."""
    kernel = getattr(backend, name)
    constants = {"WIDTH": 128, "BLOCK_WIDTH": 128, "ROWS": backend.ROWS, "COLUMNS": backend.COLUMNS}
    constants |= {**KERNELS[name], **changes}
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in TENSORS and not (argument == "out" and name != "_sparse_attention_kernel"):
            signature[argument] = DTYPES[dtype]
        else:
            signature[argument] = {"scale": "fp32", "out": "*fp32", "tokens": tokens, **POINTERS}.get(
                argument, "i32"
            )
        if argument not in ("queries", "tokens", "heads", "scale"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = backend.options(TORCH_DTYPES[dtype], arch // 10)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))


def resources(kernel, tmp_path: Path) -> dict[str, int]:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    done = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
    )
    return {name: int(found) for name, found in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}


@architectures
@kernels
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_9_tensor_cores_multiply_and_nothing_is_spilled(name, dtype, arch, tmp_path):
    kernel = compiled(name, dtype, arch)
    assert re.search(TENSOR_CORES[arch], kernel.asm["ptx"])
    used = resources(kernel, tmp_path)
    assert 0 < used["REG"] <= 255
    assert used["STACK"] == used["LOCAL"] == 0, used


@architectures
@kernels
def test_rows_and_gathered_columns_come_in_16_bytes(name, arch):
    """A column's head is 256 bytes in a row, wherever the column is."""
    ptx = compiled(name, "bf16", arch).asm["ptx"]
    asynchronous = re.findall(r"cp\.async\.c[ag]\.shared\.global .*\], (0x[0-9a-f]+|\d+)", ptx)
    copies = [int(width, 0) for width in asynchronous if int(width, 0) > 4]
    loads = [
        int(words or 1) * int(bits) // 8
        for words, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    ]
    wide = [width for width in loads if width > 4]  # the others: numbers of columns, constants
    assert copies or name == "_column_sums_kernel"  # whose group is a few tiles: they are loaded as they come
    assert wide
    assert {*copies, *wide} == {16}


@architectures
@kernels
def test_fp32_compiles(name, arch):
    assert compiled(name, "fp32", arch).asm["cubin"]


@kernels
def test_addresses_of_tokens_are_64_bit(name):
    """A video's tokens times their stride are more elements than 32 bits count."""
    ttir = compiled(name, "bf16", 90).asm["ttir"]
    products = re.findall(r"arith\.muli .* : (?:tensor<[\dx]+x)?(i\d+)", ttir)
    assert len(products) > 5
    assert set(products) == {"i64"}
