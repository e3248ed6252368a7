"""The one command for a machine with a GPU: its dry run, its report, its build, its search for tiles."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import checks
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import build, report
from benchmarks.gpu.stages import Stages
from benchmarks.kernels.problems import Size
from hicache_kernels import tiles
from hicache_kernels.backends import reference
from tests.support.scripts import run_script

ROOT = Path(__file__).parents[2]


def test_dry_run(tmp_path):
    """The command, end to end on the CPU, with nothing but torch at hand."""
    absent = "hicache,tqdm,matplotlib,pytest,diffusers,transformers,cmake,hypothesis"
    arguments = ["benchmarks.gpu", "--dry-run", "--minutes", "10", "--out", str(tmp_path)]
    done = run_script("run_without.py", absent, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"summary.md", "kernels.csv", "tiles.json", "checks.txt"}
    page = (tmp_path / "summary.md").read_text()
    passed, total = map(int, re.search(r"Correctness: (\d+) of (\d+) checks passed", page).groups())
    assert passed == total > 100
    assert "Not finished" not in page
    [short] = re.findall(r"^\d+ of \d+ checks passed; build", done.stdout, re.MULTILINE)
    assert short == f"{total} of {total} checks passed; build"
    assert "| demo | update_forecast_ | eager |" in page
    lines = (tmp_path / "checks.txt").read_text().splitlines()
    assert len(lines) == total
    kinds = {line.removeprefix("ok: ").split(",")[0] for line in lines}
    assert kinds >= {"float64", "unaligned", "NaN in rows to come", "rows 2³¹ apart"}


def test_a_failed_check_is_reported(tmp_path, monkeypatch, capsys):
    """A backend that is wrong is named, is not timed, and the command fails."""
    right = reference.forecast

    def wrong(orders, coeffs, out):
        right(orders, coeffs, out)
        out.add_(1)

    monkeypatch.setattr(reference, "forecast", wrong)
    monkeypatch.setattr(gpu, "ensure_native", lambda device, timeout: "not built")
    monkeypatch.setattr(checks, "CHECKED_SIZES", checks.CHECKED_SIZES[:1])
    arguments = ["gpu", "--dry-run", "--minutes", "10", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    named = "FAILED float64, reference, forecast torch.bfloat16 O=2"
    assert named in (tmp_path / "summary.md").read_text()
    assert named in (tmp_path / "checks.txt").read_text().replace("FAILED: ", "FAILED ")
    assert named in capsys.readouterr().out


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path, monkeypatch):
    """The files are written after every check and every timing, not only at the end."""
    monkeypatch.setattr(report, "_EVERY", 0.0)
    stages = Stages(report.Report("cpu", "native", tmp_path))
    planned = checks.numbers("cpu", [torch.float32], (2,), [Size(1, 2, 8)])

    run = checks.run

    def killed(plan, deadline):
        yield from itertools.islice(run(planned, deadline), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        stages.check(float("inf"))
    assert len((tmp_path / "checks.txt").read_text().splitlines()) == 3
    assert "**Not finished**" in (tmp_path / "summary.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"kernels.csv", "tiles.json"}


def test_checks_past_the_deadline_stay_in_the_plan():
    planned = iter([("kind", "backend", str(index), lambda: None) for index in range(3)])
    [first] = itertools.islice(checks.run(planned), 1)
    assert list(checks.run(planned, deadline=0.0)) == []
    assert [first.what, *(check.what for check in checks.run(planned))] == ["0", "1", "2"]


def test_a_build_ends_when_its_time_is_over():
    started = time.monotonic()
    with pytest.raises(build.BuildError, match="out of time: sleep"):
        build._run(["sleep", "60"], started + 0.2)
    assert time.monotonic() - started < 30


def test_tiles_are_chosen_in_the_interpreter():
    """The search for a tile, where Triton's kernels run on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = run_script("choose_tiles.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        f"{tiles.key('gated_sum_update_', 3, 4, 3)} 3 True",
        f"{tiles.key('forecast', 3, 4, 1)} 3 True",
    ]


def test_building_by_hand_leaves_no_source_out(monkeypatch, tmp_path):
    """The commands used where there is no CMake: every source, and CMake's flags."""
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    commands = build.compile_commands(tmp_path, "90")
    flat = list(itertools.chain(*commands.values()))
    sources = {Path(word).name for word in flat if word.endswith((".cpp", ".cu"))}
    assert sources == {path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")}
    configuration = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "csrc" / "cuda.cmake").read_text()
    for flag in re.findall(r"(?<![\w-])-m[\w=-]+|-ffp-contract=\w+|--fmad=\w+", configuration):
        assert flag in flat, flag
    assert not any("cuda" in path for path in build.compile_commands(tmp_path, None))
