"""benchmarks.host_time: what it makes of times, and that its probe times what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.host_time import __main__ as host_time
from benchmarks.host_time.__main__ import ROOT, Time, rows, show, worktree

# the least model, and no more pictures than it takes to capture and to replay
SMALL = "import probe; probe.DEPTH, probe.STEPS, probe.RUNS = (1, 1), 14, 1; probe.main()"


def times(step: float, model: float) -> host_time.Times:
    own = Time(step - model, step / model - 1)
    return {"stack, eager": {"step": Time(step, step / model), "own": own}}


def test_ratios_are_of_turns_and_of_calls_of_the_bare_model():
    ours = [times(200, 100), times(400, 200), times(300, 100)]  # the second turn was a slow one
    theirs = [times(400, 100), times(800, 200), times(500, 100)]
    step, own = rows(ours, theirs, "abc")
    assert (step.case, step.part, step.microseconds, step.models) == ("stack, eager", "step", 300, 2)
    assert (step.against_microseconds, step.against_models) == (500, 4)
    assert (step.ratio, step.least, step.most) == pytest.approx((0.5, 0.5, 0.6))
    assert own.ratio == pytest.approx(1 / 3)
    assert "0.50 – 0.60" in show([step, own])


def test_without_a_commit_there_is_nothing_to_compare_with():
    step, _ = rows([times(200, 100)], [], "")
    assert step.ratio is step.against_models is None
    assert "| stack, eager | step | 200 | 2.00 |  |" in show([step])


def test_the_probe_times_skipped_steps_of_the_tree():
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(ROOT)],
        cwd=ROOT / "benchmarks" / "host_time",
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["module, eager", "module, graphs", "stack, eager", "stack, graphs"]
    # of 14 steps with an interval of 7 and a warm-up of 3, steps 0, 1, 2 and 9 are full
    assert all(len(pairs) == 10 for pairs in found.values())
    assert all(step > 0 and model > 0 for pairs in found.values() for step, model in pairs)


def test_another_tree_than_the_one_asked_for_is_refused(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(tmp_path)],
        cwd=ROOT / "benchmarks" / "host_time",
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert f"expected hicache of {tmp_path}" in done.stderr


def test_a_commit_that_is_not_there_is_told():
    with pytest.raises(SystemExit, match="--against no-such-commit: "), worktree("no-such-commit"):
        pass
