"""Builds the CPU kernels with every compiler there is, and compares their bits with the reference's.

    make compilers
    python -m tests.installation.compilers --cases 2000 --csv FILE

The kernels are linked into a program without Python (bits/), so those for another processor run under
qemu-user. Every instruction set that this processor has is run. On Debian: ``apt-get install clang
g++-aarch64-linux-gnu qemu-user``. A nan is a nan, whatever its payload; all else agrees bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hicache_kernels import forecast, gated_sum, update_, update_forecast_

HERE: Final = Path(__file__).resolve().parent
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# history dtype → base dtypes there are kernels for
BASES: Final = ((0, 1, 2), (1, 0), (2, 0), (3,))
EVERY_ISA: Final = {"x86_64": ("baseline", "avx2", "avx512"), "aarch64": ("baseline",)}
FIELDS: Final = ("compiler", "processor", "instructions", "cases", "different")
# what rounding, overflow and signs may get wrong; subnormal in fp32 and in fp16 among them
SPECIAL: Final = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 6e-8, 65519.0, 65520.0, 3.4e38)


@dataclass(frozen=True)
class Compiler:
    """How to build for a processor, and what runs the program where it is not this one."""

    command: str
    processor: str
    options: tuple[str, ...] = ()

    def runner(self) -> list[str] | None:
        """What to run the program with; None where nothing does."""
        if self.processor == platform.machine():
            return []
        emulator = shutil.which(f"qemu-{self.processor}") or shutil.which(f"qemu-{self.processor}-static")
        return None if emulator is None else [emulator]


ARM: Final = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)
COMPILERS: Final = (
    Compiler("g++", platform.machine()),
    Compiler("clang++", platform.machine()),
    Compiler("aarch64-linux-gnu-g++", "aarch64", ARM),
    Compiler("clang++", "aarch64", (*ARM, "-DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu")),
)


@dataclass(frozen=True)
class Case:
    """One call: its bytes for the program, and the orders and output of the reference."""

    given: bytes
    expected: tuple[Tensor, ...]
    what: str


def raw(*tensors: Tensor) -> bytes:
    return b"".join(t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors if t.numel())


def make_case(seed: int) -> Case:
    """A call drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
        found = torch.randn(*shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(-6, 0, 0, 0, 3)
        special = torch.tensor(SPECIAL, dtype=torch.float64)
        drawn = special[torch.randint(len(SPECIAL), shape, generator=generator)]
        rare = torch.rand(*shape, generator=generator) < (0.05 if seed % 2 else 0.0)
        return torch.where(rare, drawn, found).to(dtype)

    op, kind, num_orders = draw(0, 1, 2, 3, 3, 3), draw(0, 1, 2, 3), draw(1, 2, 3, 4, 5)
    base_kind = draw(*BASES[kind])
    features, batch, rows = (draw(1, 2, 5), draw(1, 2), draw(1, 3, 17)) if op == 3 else (1, 1, 1)
    channels = (
        draw(1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 129) if op == 3 else draw(1, 2, 5, 8, 19, 64, 1001, 5003)
    )
    num_coeffs = draw(*range(1, num_orders + 1))
    gated, pending = op == 3 and draw(0, 1), op == 3 and draw(0, 1)
    dtype, base_dtype = DTYPES[kind], DTYPES[base_kind]
    shape = (num_orders, features, batch, rows, channels)
    orders = numbers(*shape, dtype=dtype)
    coeffs = torch.randn(num_coeffs, generator=generator, dtype=torch.float64)
    inv_gap = torch.tensor(1 / draw(1, 2, 3, 5, 7), dtype=torch.float64)
    base = numbers(batch, rows, channels, dtype=base_dtype) if op == 3 else torch.empty(0)
    gates = numbers(features, batch, channels, dtype=base_dtype) if gated else None
    codes = (
        op,
        kind,
        base_kind,
        num_orders,
        features,
        batch,
        rows,
        channels,
        num_coeffs,
        gated,
        pending,
        draw(1, 2, 4),
    )
    arrays = [orders, coeffs, inv_gap, base, *([] if gates is None else [gates])]
    given = raw(torch.tensor(codes, dtype=torch.int64), *arrays)

    flat, filled = orders.view(num_orders, -1), num_coeffs - 1
    out: Tensor | None = None
    if op == 0:
        update_(flat, inv_gap, filled, backend="reference")
    elif op == 1:
        out = forecast(flat, coeffs, backend="reference")
    elif op == 2:
        out = update_forecast_(flat, inv_gap, coeffs, filled, backend="reference")
    else:
        by_feature = orders.view(num_orders, features, -1)
        update = {"inv_gap": inv_gap, "filled": filled} if pending else {}
        out = gated_sum(base, by_feature, gates, coeffs, backend="reference", **update)  # type: ignore[arg-type]
    return Case(given, (orders,) if out is None else (orders, out), f"seed {seed}: {codes}")


def differences(cases: list[Case], results: bytes) -> list[str]:
    """The cases whose results are not the reference's bits."""
    found, place = [], 0
    for case in cases:
        same = True
        for expected in case.expected:
            size = expected.nbytes
            data = bytearray(results[place : place + size])
            place += size
            if len(data) < size:
                raise RuntimeError("the program ended early")
            got = torch.frombuffer(data, dtype=expected.dtype).view(expected.shape)
            words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
            alike = (got.view(words) == expected.view(words)) | (got.isnan() & expected.isnan())
            same = same and bool(alike.all())
        if not same:
            found.append(case.what)
    if place != len(results):
        raise RuntimeError(f"expected {place} bytes of results, got {len(results)}")
    return found


def build(compiler: Compiler, folder: Path) -> tuple[Path, str]:
    """The program, and what the compiler calls itself.

    Raises:
        subprocess.CalledProcessError: it does not build.
    """
    configure = ["cmake", "-S", HERE / "bits", "-B", folder, f"-DCMAKE_CXX_COMPILER={compiler.command}"]
    for command in ([*configure, *compiler.options], ["cmake", "--build", folder, "--parallel", "2"]):
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    says = subprocess.run([compiler.command, "--version"], check=True, capture_output=True, text=True).stdout
    return folder / "bits", says.splitlines()[0]


def main() -> int:
    """Try every compiler; the exit status is 1 where one fails or gives other bits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="how many calls (%(default)s)")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    options = parser.parse_args()
    cases = [make_case(seed) for seed in range(options.cases)]
    given = b"".join(case.given for case in cases)
    rows: list[dict[str, str]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for index, compiler in enumerate(COMPILERS):
            runner = compiler.runner()
            if shutil.which(compiler.command) is None or runner is None:
                print(f"{compiler.command} for {compiler.processor}: not found here", flush=True)
                continue
            try:
                program, name = build(compiler, Path(folder) / str(index))
            except subprocess.CalledProcessError as error:
                print(f"{compiler.command} for {compiler.processor}: does not build\n{error.stdout[-3000:]}")
                failed = True
                continue
            for isa in EVERY_ISA[compiler.processor]:
                environment = {**os.environ, "HICACHE_CPU_ISA": isa}
                done = subprocess.run([*runner, program], input=given, env=environment, capture_output=True)
                if done.returncode == 0 and done.stderr.decode() != isa:
                    print(f"{isa}: not on this processor", flush=True)
                    continue
                wrong = [done.stderr.decode()] if done.returncode else differences(cases, done.stdout)
                failed = failed or bool(wrong)
                row = name, compiler.processor, isa, str(len(cases)), str(len(wrong))
                rows.append(dict(zip(FIELDS, row, strict=True)))
                print(" | ".join(rows[-1].values()), *wrong[:5], sep="\n    ", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return int(failed or not rows)


if __name__ == "__main__":
    sys.exit(main())
