"""Fuzzes the CPU kernels under sanitizers: addresses and undefined behaviour, then threads.

    make sanitize
    python -m tests.installation.sanitizers --cases 21000 --csv FILE

The program of ``tests.installation.compilers`` is built with g++ and its sanitizers, wakes threads for little
work, and computes cases drawn from seeds, every array in memory of its own size. Batches go in turn through
the instruction sets that this processor has, and through sizes within and past its caches. An error of a
sanitizer ends the program; results are compared with the reference's bits.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.installation.compilers import EVERY_ISA, Compiler, build, differences, make_case

BATCH: Final = 1000
SANITIZERS: Final = ("address,undefined", "thread")
FIELDS: Final = ("sanitizer", "compiler", "instructions", "cases", "different", "errors")


def main() -> int:
    """Run every sanitizer; the exit status is 1 where one finds something or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=21_000, help="how many calls for each (%(default)s)")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for sanitizer in SANITIZERS:
            flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -g -DHICACHE_LEAST=64"
            compiler = Compiler("g++", platform.machine(), (f"-DCMAKE_CXX_FLAGS={flags}",))
            try:
                programs[sanitizer] = build(compiler, Path(folder) / sanitizer.split(",")[0])
            except subprocess.CalledProcessError as error:
                print(f"{sanitizer}: does not build\n{error.stdout[-3000:]}")
                return 1
        totals = {sanitizer: [0, 0, 0] for sanitizer in SANITIZERS}
        seen: set[str] = set()
        isas = EVERY_ISA[platform.machine()]
        for first in range(0, options.cases, BATCH):
            cases = [make_case(seed) for seed in range(first, min(first + BATCH, options.cases))]
            given = b"".join(case.given for case in cases)
            batch = first // BATCH
            environment = {**os.environ, "HICACHE_CPU_ISA": isas[batch % len(isas)]}
            if batch // len(isas) % 2:
                environment["HICACHE_CPU_LAST_LEVEL"] = "0"
            for sanitizer, (program, _) in programs.items():
                done = subprocess.run([program], input=given, env=environment, capture_output=True)
                wrong = [] if done.returncode else differences(cases, done.stdout)
                for index, count in enumerate((len(cases), len(wrong), int(done.returncode != 0))):
                    totals[sanitizer][index] += count
                if done.returncode:
                    print(f"{sanitizer}: {done.stderr.decode()[-3000:]}")
                else:
                    seen.add(done.stderr.decode())
                print(*wrong[:5], sep="\n", end="\n" if wrong else "")
            print(f"{first + len(cases)} cases", file=sys.stderr, flush=True)
        for sanitizer, (_, name) in programs.items():
            row = sanitizer, name, " ".join(sorted(seen)), *map(str, totals[sanitizer])
            rows.append(dict(zip(FIELDS, row, strict=True)))
            print(" | ".join(row))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return int(any(found for _, *bad in totals.values() for found in bad))


if __name__ == "__main__":
    sys.exit(main())
