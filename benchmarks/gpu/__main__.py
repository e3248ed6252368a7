"""The one command for a machine with a GPU: ``python -m benchmarks.gpu``.

Builds the native extension where it is missing, checks every op, dtype, order and backend on the card, times
them beside a copy and beside eager torch, searches for the best Triton tiles, and writes a page about it:
``summary.md``, ``kernels.csv``, ``tiles.json`` and ``checks.txt``. What matters most comes first, the files
are written as it goes, and every stage watches the clock and says what it left out. It needs the repository,
torch, triton and pybind11, and nvcc for the CUDA C++ backend; it needs no network.
``--dry-run`` goes through the same stages on the CPU, at small sizes.

``--stage pipelines``, run after it, times whole denoising loops of true-size models instead:
``pipelines.csv`` and ``pipelines.md``. It needs diffusers too.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from benchmarks.common import command
from benchmarks.common.machine import device_name, place, slug
from benchmarks.gpu import build

_MINUTES = {"kernels": 4.0, "pipelines": 7.5}


def ensure_native(device: str, timeout: float) -> str:
    """Build the extension within so many seconds unless it can run on the device; say what came of it."""
    reason = build.status(device)
    if reason is None:
        return "the native extension was there"
    arch = None
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}{minor}"
        if build.nvcc() is None:
            return f"native CUDA left out: {reason}; no nvcc to build it with"
    try:
        how = build.build(arch, timeout)
    except build.BuildError as error:
        return f"native left out: {reason}; and it could not be built: {error}"
    left = build.status(device)
    return f"the native extension was built with {how}" if left is None else f"native left out: {left}"


def time_pipelines(device: str, out: Path, minutes: float) -> bool:
    """Run the second stage, on a CPU a short loop of small models; return whether nothing failed."""
    from benchmarks.pipelines.__main__ import run
    from benchmarks.pipelines.models import MODELS
    from hicache import HiCacheConfig

    notes = run(
        device,
        list(MODELS[device]),
        HiCacheConfig(),
        steps=50 if device == "cuda" else 12,
        minutes=minutes,
        rounds=2 if device == "cuda" else 1,
        csv=out / "pipelines.csv",
        markdown=out / "pipelines.md",
    )
    return not notes.failed


def main() -> None:
    parser = command.parser(__doc__, csv=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, at small sizes")
    parser.add_argument(
        "--stage", choices=("kernels", "pipelines"), default="kernels", help="pipelines needs diffusers"
    )
    parser.add_argument("--minutes", type=float, help=f"for everything; default: {_MINUTES}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else options.device
    command.require(device, hint="; --dry-run goes through the stages on the CPU")
    started = time.monotonic()
    minutes = options.minutes or _MINUTES[options.stage]

    def until(share: float) -> float:
        """Return the moment by which this share of the time is spent."""
        return started + 60.0 * minutes * share

    begun = time.monotonic()
    native = ensure_native(device, 60 * minutes * 0.3)
    built = time.monotonic() - begun
    print(native)
    # Only now: the kernels' package imports its extension once.
    from benchmarks.gpu.report import Report
    from benchmarks.gpu.stages import FIRST, Stages

    out = options.out or build.ROOT / "benchmarks" / "results" / slug(device_name(device))
    out.mkdir(parents=True, exist_ok=True)
    print(place(device), flush=True)
    if options.stage == "pipelines":
        if not time_pipelines(device, out, minutes - (time.monotonic() - started) / 60):
            raise SystemExit(1)
        return
    report = Report(device, native, out, FIRST[device])
    stages = Stages(report)
    report.spent.append(("build", built))
    for name, stage in stages.in_order(until).items():
        begun = time.monotonic()
        try:
            stage()
        except Exception:  # what was found so far is worth more than a clean end
            stages.broke_off(name, traceback.format_exc())
        report.spent.append((name, time.monotonic() - begun))
        report.write()
        print(f"== {name}: {report.spent[-1][1]:.1f} s", flush=True)
    report.write(finished=True)
    print(report.short())
    if report.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
