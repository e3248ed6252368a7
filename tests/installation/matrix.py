"""Installs hicache beside every Python and diffusers it promises, and runs tests and the demo there.

    make matrix
    python -m tests.installation.matrix --python python3.14 --python ~/python3.13t/bin/python --csv FILE

An environment for every pair of an interpreter and a version of diffusers: what is installed is the wheel of
the source distribution, with the versions that are pinned for the pair; its ``hicache info`` and
``hicache demo --basis hermite`` are run, and some tests, from the unpacked source distribution. uv
installs where it is found, and pip elsewhere; a torch of several GB is among what is fetched, so this is not
part of any other command. Interpreters are those on PATH, and those that ``--python`` names.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHONS: Final = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
# What differs from constraints.txt with an older diffusers: the oldest promised, one in between.
# (Triton 3.6's interpreter knows no numpy after 2.2.)
OLDER: Final[Mapping[str, Mapping[str, str]]] = {
    "0.37.0": {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "numpy": "2.2.6",
        "transformers": "5.20.2",
        "huggingface_hub": "1.33.0",
    },
    "0.40.0": {"transformers": "5.20.2", "huggingface_hub": "1.33.0"},
}
TESTS: Final = (
    "tests/test_compat.py",
    "tests/test_compile.py",
    "tests/test_bare_models.py",
    "tests/test_adding_a_model.py",
    "tests/kernels/test_ops.py",
    "tests/kernels/test_library.py",
    "tests/test_packaging.py",
)
FIELDS: Final = ("python", "diffusers", "torch", "native", "tests", "demo", "seconds")


@dataclass(frozen=True)
class Python:
    """An interpreter: its path, and its version with a ``t`` behind it where it has no GIL."""

    path: str
    version: str

    @staticmethod
    def at(name: str) -> Python | None:
        """The interpreter of a name or path; None where it does not run."""
        asked = "import sys; print('%d.%d.%d' % sys.version_info[:3] + sys.abiflags)"
        path = shutil.which(name)
        if path is None:
            return None
        done = subprocess.run([path, "-c", asked], capture_output=True, text=True, check=False)
        return None if done.returncode else Python(path, done.stdout.strip())

    @property
    def minor(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


def constraints(diffusers: str | None) -> str:
    """constraints.txt, with what an older diffusers goes with in its place."""
    text = (ROOT / "constraints.txt").read_text()
    if diffusers is None:
        return text
    pins = {**OLDER[diffusers], "diffusers": diffusers}
    kept = [line for line in text.splitlines() if re.split(r"[=;]", line)[0] not in pins]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in pins.items())]) + "\n"


def run(command: Iterable[str | Path], log: Path, cwd: Path, **environment: str) -> str:
    """Output of a command, which goes to the log as well.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [str(part) for part in command]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    return done.stdout


def source_distribution(folder: Path) -> Path:
    """Make the source distribution and unpack it."""
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, folder], folder / "sdist.log", ROOT)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def try_pair(python: Python, diffusers: str | None, source: Path, folder: Path) -> dict[str, str]:
    """A row of the table: what was installed with a pair, and what ran."""
    begin = time.monotonic()
    row = dict.fromkeys(FIELDS, "")
    row |= {"python": python.version, "diffusers": diffusers or "newest"}
    name = f"{python.version}-{diffusers or 'newest'}"
    environment, log = folder / name, folder / f"{name}.log"
    pins = folder / f"{name}.txt"
    pins.write_text(constraints(diffusers))
    bin, picture = environment / "bin", folder / f"{name}.png"
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    install: list[str | Path] = [bin / "pip", "install", "--quiet", "--disable-pip-version-check"]
    if uv is not None:
        install = [uv, "pip", "install", "--python", bin / "python"]
    stage = "native"
    try:
        run([python.path, "-m", "venv", environment], log, folder)
        # an error of the compiler is one here, and the kernels for CUDA have nothing to do with Python
        options = {"HICACHE_FORCE_NATIVE_BUILD": "1", "HICACHE_SKIP_CUDA_BUILD": "1", "HF_HUB_OFFLINE": "1"}
        run([*install, "-c", pins, f"{source}[test]"], log, folder, **options)
        info = run([bin / "hicache", "info"], log, folder)
        found = dict(line.split(None, 1) for line in info.splitlines() if line.startswith(("torch", "diff")))
        row |= {name: found[name].strip() for name in ("torch", "diffusers")}
        usable = re.search(r"^native on cpu\s+usable \((.*)\)", info, re.MULTILINE)
        row["native"] = usable[1] if usable else "not usable"
        stage = "demo"
        drawn = run(
            [bin / "hicache", "demo", "--basis", "hermite", "--repeats", "1", "--out", picture],
            log,
            folder,
        )
        row["demo"] = " ".join(re.findall(r"\d+\.\d+ dB", drawn)[:1])
        stage = "tests"
        # tests import the packages that stand beside them, the installed extension among them
        [extension] = environment.glob("lib/*/site-packages/hicache_kernels/_native*.so")
        shutil.copy2(extension, source / "hicache_kernels")
        tested = run([bin / "python", "-m", "pytest", "-q", "-n", "2", *TESTS], log, source, **options)
        row["tests"] = re.findall(r"\d+ passed[\w, ]*?(?=, \d+ warn| in )", tested)[-1]
    except subprocess.CalledProcessError as error:
        row[stage] = "FAILED"
        print("\n".join(str(error.output).splitlines()[-30:]), file=sys.stderr)
    row["seconds"] = f"{time.monotonic() - begin:.0f}"
    return row


def merge(path: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put rows into a CSV file, in place of those of the same pairs; returns all it has then."""
    found = list(csv.DictReader(path.open())) if path.exists() else []
    merged = {(row["python"], row["diffusers"]): row for row in [*found, *rows]}

    def place(key: tuple[str, str]) -> list[int]:
        return [int(number) for part in key for number in re.findall(r"\d+", part)]

    ordered = [merged[key] for key in sorted(merged, key=place)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    return ordered


def main() -> int:
    """Try every pair; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", help="an interpreter, by name or path (all on PATH)")
    parser.add_argument("--diffusers", action="append", choices=("newest", *OLDER), help="(all of them)")
    parser.add_argument("--csv", type=Path, help="put the rows into this file")
    parser.add_argument("--keep", type=Path, help="leave environments and logs in this folder")
    options = parser.parse_args()
    pythons = {name: Python.at(name) for name in options.python or PYTHONS}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        source = source_distribution(Path(tempfile.mkdtemp(dir=folder)))
        for name, python in pythons.items():
            if python is None:
                print(f"{name}: not found here", flush=True)
                continue
            for diffusers in options.diffusers or ("newest", *OLDER):
                rows.append(try_pair(python, None if diffusers == "newest" else diffusers, source, folder))
                print(" | ".join(rows[-1].values()), flush=True)
                if options.csv:
                    merge(options.csv, rows[-1:])
                if options.keep is None:
                    shutil.rmtree(folder / f"{python.version}-{diffusers}", ignore_errors=True)
    return int(not rows or any("FAILED" in row.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
