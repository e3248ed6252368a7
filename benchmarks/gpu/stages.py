"""The stages of ``python -m benchmarks.gpu``, what matters most first."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import checks
from benchmarks.checks import Check
from benchmarks.gpu.build import ROOT
from benchmarks.gpu.report import Report
from benchmarks.kernels import measure, tiles
from benchmarks.kernels.problems import OPS, SIZES, Size
from hicache_kernels import backend_status

# by device: what a model is, timed first; then everything else
FIRST = {"cuda": ("FLUX 1024² module", "FLUX 1024² stack", "Wan-14B 720p stack"), "cpu": ("demo",)}
OTHERS = {
    "cuda": (
        "Qwen-Image 1328² module", "1Ki", "demo", "1Mi", "Qwen-Image 1328² stack", "76 small", "16Mi",
    ),
    "cpu": ("1Ki",),
}  # fmt: skip
_ORDERS = {"cuda": (1, 3, 0, 4), "cpu": (0,)}  # but 2, which goes first
# for each op; a dry run shows that everything runs, not how fast
_SECONDS = {"cuda": 1.0, "cpu": 0.02}
_COMPILED = ("FLUX 1024² module", "FLUX 1024² stack")
_TUNE_SIZES = {"cuda": {1: Size(1, 16384, 3072), 76: SIZES["FLUX 1024² module"]}}
_TUNE_SIZES["cpu"] = {1: Size(1, 16, 64), 4: Size(4, 16, 64)}


class Stages:
    """Runs the stages and puts what they find into a report."""

    def __init__(self, report: Report) -> None:
        self.report, self.device = report, report.device
        self._plan = checks.core(report.device)

    def in_order(self, until: Callable[[float], float]) -> dict[str, Callable[[], None]]:
        """Name the stages in their order, what matters most first; each ends at its share of the time."""
        # the build took its part of the first share
        stages: dict[str, Callable[[], None]] = {
            "checks": lambda: self.check(until(0.5)),
            "times": lambda: self.measure(FIRST[self.device], (2,), until(0.72)),
            "tiles": lambda: self.tune(until(0.84)),
            "other checks": lambda: self.check(until(0.88), everything=True),
            "times, other sizes": lambda: self.measure(OTHERS[self.device], (2,), until(0.92)),
            "times, torch.compile": lambda: self.compiled(until(0.93)),
        }
        if self.device == "cuda":
            stages["compute-sanitizer"] = lambda: self.sanitize(until(0.96))
        everywhere = (*FIRST[self.device], *OTHERS[self.device])
        stages["times, other orders"] = lambda: self.measure(everywhere, _ORDERS[self.device], until(0.96))
        return stages

    def check(self, deadline: float, everything: bool = False) -> None:
        """Check what every timing rests on, or ``everything`` that was not checked before.

        A backend that fails a check is not timed.
        """
        if everything:
            self._plan = itertools.chain(self._plan, checks.others(self.device))
        for check in checks.run(self._plan, deadline):
            self.report.checks.append(check)
            if check.reason is not None:
                print(f"FAILED {check.kind}, {check.backend}, {check.what}: {check.reason}", flush=True)
            self.report.flush()
        if everything and next(self._plan, None) is not None:
            self.report.notes.append(f"checks stopped after {len(self.report.checks)}: out of time")

    def broke_off(self, stage: str, trace: str) -> None:
        """Count an error that ended a stage as a failed check; the other stages go on."""
        print(trace, flush=True)
        self.report.checks.append(
            Check("stage", "all", stage, f"broke off: {trace.strip().splitlines()[-1]}")
        )

    def sanitize(self, deadline: float) -> None:
        """Run some of the checks under compute-sanitizer."""
        outcome = sanitize(deadline - time.monotonic())
        self.report.notes.append(f"compute-sanitizer memcheck: {outcome}")
        if outcome.startswith("FAILED"):
            self.report.checks.append(Check("compute-sanitizer", "all", "memcheck", outcome))

    def measure(self, sizes: Sequence[str], orders: tuple[int, ...], deadline: float) -> None:
        """Time every op at these sizes and orders, bf16 first."""
        for dtype in ("bf16", "fp32"):
            for name in sizes:
                self._measure([name], [dtype], orders, list(OPS), deadline)

    def compiled(self, deadline: float) -> None:
        """Time ``torch.compile`` too, whose compilations take longer than everything else."""
        if self.device == "cuda":
            ops = list(measure.COMPILED)
            self._measure(_COMPILED, ["bf16"], (2,), ops, deadline, compiled=_COMPILED)

    def _measure(
        self,
        sizes: Sequence[str],
        dtypes: Sequence[str],
        orders: Sequence[int],
        ops: Sequence[str],
        deadline: float,
        compiled: Sequence[str] = (),
    ) -> None:
        wrong = {check.backend for check in self.report.failed}
        blocks = measure.measure(
            self.device,
            sizes,
            dtypes,
            orders,
            ops,
            compiled=compiled,
            seconds=_SECONDS[self.device],
            deadline=deadline,
            without={"native", "triton"} if compiled else wrong,
            left_out=self.report.notes,
        )
        try:
            for block in blocks:
                rows = [row for row in block if not compiled or row.backend == "compiled"]
                self.report.rows += rows
                for row in rows:
                    print(measure.line(row), flush=True)
                self.report.flush()
        except torch.OutOfMemoryError:
            self.report.notes.append(f"{', '.join((*sizes, *dtypes))}: broke off: out of memory")

    def tune(self, deadline: float) -> None:
        """Look for tiles faster than the default ones."""
        if (reason := backend_status(self.device)["triton"]) is not None:
            self.report.notes.append(f"tiles left out: {reason}")
            return
        if any(check.backend == "triton" for check in self.report.failed):
            self.report.notes.append("tiles left out: triton failed a check")
            return
        candidates = (*tiles.ROW_TILES[:1], *tiles.GATED_TILES[:2]) if self.device == "cpu" else None
        for choice in tiles.tune(self.device, _TUNE_SIZES[self.device], deadline, candidates=candidates):
            self.report.choices.append(choice)
            print(f"tile {choice.key}: {choice.tile}, {choice.GBps:.0f} GB/s", flush=True)
            self.report.flush()
        if time.monotonic() > deadline:
            found = len(self.report.choices)
            self.report.notes.append(f"tiles of all problems but {found} left out: out of time")


def sanitize(timeout: float) -> str:
    """Run some of the checks under compute-sanitizer, where there is one; return what it said."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return "left out: no compute-sanitizer here"
    if timeout < 20:
        return "left out: out of time"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m"]
    command += ["benchmarks.checks", "--device", "cuda", "--few"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"left out: not done after {timeout:.0f} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    if done.returncode == 0:
        return f"passed: {last}"
    if done.returncode == 99:
        return "FAILED: " + "; ".join(line for line in lines if "=========" in line)[:2000]
    return f"left out: it refused to run here: {last}"
