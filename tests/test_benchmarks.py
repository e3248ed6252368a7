"""The benchmarks themselves: what they count, that their gate catches errors, small timings of every op."""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import build
from benchmarks.gate import WrongResult, check_op, gate
from benchmarks.problems import OPS, Problem, Size, flop, minimum_bytes, ops_at, usable_backends
from benchmarks.timing import time_together
from hicache_kernels.backends import native, reference

ROOT = Path(__file__).parent.parent
SMALL = Size(3, 64, 128, batch=2)
CONTESTANTS = (*(name for name in usable_backends("cpu", torch.float32, 3) if name != "triton"), "eager")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark, name, contestant):
    op = OPS[name]
    benchmark.group = name
    problem = Problem(SMALL, 2, torch.bfloat16, "cpu")
    call = problem.peers(op)["eager"] if contestant == "eager" else problem.call(op, contestant)
    check_op(problem, op, contestant, call)
    benchmark.pedantic(call, setup=problem.record if op.updates else None, rounds=10, warmup_rounds=1)


def test_recording_keeps_differences_normal():
    """As many updates as a benchmark makes: none of the differences dies away or blows up."""
    problem = Problem(Size(1, 8, 64), 4, torch.float32, "cpu")
    call = problem.call(OPS["update_"], "auto")
    for _ in range(100):
        problem.record()
        call()
    assert all(1e-6 < row.abs().max() < 1e3 for row in problem.orders)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("order", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_are_those_of_the_tensors(name, order, dtype):
    """Each tensor an op reads and each it writes, once (hicache_kernels/README.md)."""
    op = OPS[name]
    problem = Problem(SMALL, order, dtype, "cpu")  # its slots have no padding
    rows = [problem.orders[k] for k in range(order + 1)]
    reads, writes = {
        "update_": (rows, rows),
        "forecast": (rows, [problem.row]),
        "update_forecast_": (rows, [*rows, problem.row]),
        "gated_sum": ([*rows, problem.base, problem.gates], [problem.out]),
        "gated_sum, no gates": ([*rows, problem.base], [problem.out]),
        "gated_sum, update": ([*rows, problem.base, problem.gates], [*rows, problem.out]),
        "gated_sum, no gates, update": ([*rows, problem.base], [*rows, problem.out]),
    }[name]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in (*reads, *writes))
    assert minimum_bytes(op, SMALL, order, dtype.itemsize) == expected


class Counted(float):
    """A number that counts the arithmetic done on it."""

    done = 0


def _counting(name):
    def method(self, other):
        Counted.done += 1
        return Counted(getattr(float, name)(self, other))

    return method


for _name in ("__add__", "__radd__", "__sub__", "__mul__"):
    setattr(Counted, _name, _counting(_name))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_operations_are_those_of_the_formulas(order):
    """docs/algorithm.md on one number, done in arithmetic that counts itself."""
    old = [Counted(k + 1) for k in range(order)]
    weights = [Counted(1 + k) for k in range(order + 1)]
    one = Size(1, 1, 1)
    for op in OPS.values():
        Counted.done = 0
        fresh = [Counted(3)]
        for previous in old if op.updates else []:
            fresh.append((fresh[-1] - previous) * Counted(0.5))
        if op.forecasts:
            differences = fresh if op.updates else [*old, Counted(2)]
            products = [w * d for w, d in zip(weights, differences, strict=True)]
            value = products[0]
            for product in products[1:]:
                value = value + product
        if op.gated:
            value = value * Counted(2)
        if op.sums:
            value = value + Counted(1)
        assert Counted.done == flop(op, one, order), op.name


def test_order_zero_updates_nothing():
    assert {op.name for op in ops_at(0)} == {"forecast", "gated_sum", "gated_sum, no gates"}


def test_the_gate_covers_every_op_and_backend():
    backends = len(usable_backends("cpu", torch.float32, 3))
    size = Size(2, 5, 31)
    assert gate("cpu", [torch.bfloat16], orders=[2], sizes=[size]) == len(OPS) * (backends + 2)


@pytest.mark.parametrize("op", ["update_", "forecast", "update_forecast_", "gated_sum"])
@pytest.mark.parametrize("wrong", ["first number", "last number", "NaN", "history"])
def test_the_gate_catches(monkeypatch, op, wrong):
    """A backend whose result is off by two roundings, or not a number, or that touches what it only reads."""
    right = getattr(reference, op)

    def off(orders_or_base, *arguments):
        right(orders_or_base, *arguments)
        out = orders_or_base[0] if op == "update_" else arguments[-1]
        if wrong == "history":
            (arguments[0] if op == "gated_sum" else orders_or_base).view(-1)[1] += 1
        elif wrong == "NaN":
            out.view(-1)[7] = float("nan")
        else:
            at = 0 if wrong == "first number" else -1
            out.view(-1)[at] += 0.1 * out.abs().max()

    monkeypatch.setattr(reference, op, off)
    size = Size(1, 8, 64)
    with pytest.raises(WrongResult, match=rf"^{re.escape(op)}"):
        gate("cpu", [torch.float32], orders=[2], sizes=[size])


def test_timing_calls_every_function_as_often():
    calls = {"a": 0, "b": 0}

    def called(name):
        calls[name] += 1

    timings = time_together({name: lambda name=name: called(name) for name in calls}, rounds=4)
    assert calls == {"a": 5, "b": 5}
    assert all(0 <= t.p20 <= t.p50 <= t.p80 for t in timings.values())
    time_together({name: lambda name=name: called(name) for name in calls}, rounds=1000, seconds=0)
    assert calls == {"a": 9, "b": 9}


def test_timing_calls_a_slow_function_twice():
    calls = {"slow": 0, "fast": 0}

    def called(name):
        calls[name] += 1
        time.sleep(0.05 * (name == "slow"))

    functions = {name: lambda name=name: called(name) for name in calls}
    timings = time_together(functions, rounds=4, seconds=0.04)
    assert calls["slow"] == 2
    assert timings["slow"].calls == 1
    assert timings["slow"].p20 == timings["slow"].p80 >= 0.05
    assert timings["fast"].calls >= 3


def run_module(*arguments, blocked=(), **environment):
    """Run ``python -m`` with some packages impossible to import."""
    script = (
        "import runpy, sys; sys.modules.update(dict.fromkeys("
        f"{list(blocked)!r})); sys.argv = {list(arguments)!r}; "
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_kernel_benchmark_and_its_plots(tmp_path):
    path = tmp_path / "kernels.csv"
    done = run_module(
        "benchmarks.kernels", "--sizes", "1Ki", "demo", "--orders", "2", "0", "--rounds", "3",
        "--csv", str(path), blocked=["tqdm", "matplotlib", "diffusers"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    contestants = {row["backend"] for row in rows}
    assert contestants == {"eager", "foreach"} | (
        {"native"} if native.unavailable(torch.device("cpu")) is None else set()
    )
    assert len(rows) == 2 * 2 * (len(OPS) + 3) * len(contestants)
    for row in rows:
        assert row["device"]
        assert row["driver"]
        assert "torch" in row["versions"]
        speed = int(row["bytes"]) / float(row["p50_ms"]) / 1e6
        assert float(row["GBps"]) == pytest.approx(speed, rel=1e-3)
        assert float(row["share_of_copy"]) == pytest.approx(speed / float(row["copy_GBps"]), rel=1e-3)
        assert row["backend"] != "eager" or float(row["over_eager"]) == 1

    counted = tmp_path / "launches.csv"
    done = run_module("benchmarks.launches", "--csv", str(counted))
    assert done.returncode == 0, done.stderr
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run_module("benchmarks.plots", str(path), str(counted), "--out", str(tmp_path / "plots"))
    assert done.returncode == 0, done.stderr
    drawn = {plot.name for plot in (tmp_path / "plots").iterdir()}
    bandwidth = {f"kernels-bandwidth-{dtype}.png" for dtype in ("bf16", "fp32")}
    assert drawn == bandwidth | {"kernels-roofline.png", "launches.png"}
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    done = run_module("benchmarks.plots", str(tmp_path / "other.csv"))
    assert done.returncode == 1
    assert "expected rows of benchmarks.kernels or benchmarks.launches" in done.stderr


def test_gpu_command_dry_run(tmp_path):
    """The command for a GPU machine, end to end on the CPU, with nothing but torch at hand."""
    absent = ["hicache", "tqdm", "matplotlib", "pytest", "diffusers", "transformers", "cmake", "hypothesis"]
    done = run_module(
        "benchmarks.gpu", "--dry-run", "--minutes", "0.5", "--out", str(tmp_path), blocked=absent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"summary.md", "kernels.csv", "tiles.json", "checks.txt"}
    page = (tmp_path / "summary.md").read_text()
    passed, total = map(int, re.search(r"Correctness: (\d+) of (\d+) checks passed", page).groups())
    assert passed == total > 100
    assert "| demo | update_forecast_ | eager |" in page
    lines = (tmp_path / "checks.txt").read_text().splitlines()
    assert len(lines) == total
    kinds = {line.removeprefix("ok: ").split(",")[0] for line in lines}
    assert kinds >= {"float64", "unaligned", "NaN in rows to come", "rows 2³¹ apart"}


def test_gpu_command_reports_a_failed_check(tmp_path):
    """A backend that is wrong is named, is not timed, and the command fails."""
    script = (
        "import sys; from hicache_kernels.backends import reference as r\n"
        "right = r.forecast\n"
        "def wrong(orders, coeffs, out): right(orders, coeffs, out); out.add_(1)\n"
        "r.forecast = wrong\n"
        f"sys.argv = ['gpu', '--dry-run', '--minutes', '0.2', '--out', {str(tmp_path)!r}]\n"
        "from benchmarks import gpu; gpu.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    page = (tmp_path / "summary.md").read_text()
    assert "FAILED float64, reference, forecast torch.bfloat16 O=2" in page


def test_tiles_are_chosen_in_the_interpreter():
    """The search for a tile, where Triton's kernels run on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = (
        "import torch; from benchmarks import tune; from benchmarks.problems import OPS, Size\n"
        "from hicache_kernels.tiles import Tile\n"
        "sizes = {1: Size(1, 8, 64), 3: Size(3, 8, 64)}\n"
        "for name, terms in (('gated_sum, update', 3), ('forecast', 1)):\n"
        "    tiles = [Tile(block=512, rows=2), Tile(block=256, rows=1)]\n"
        "    c = tune.choose(OPS[name], terms, 2, torch.float32, 'cpu', sizes, tiles)\n"
        "    print(c.key, c.tried, c.GBps >= c.default_GBps)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "gated_sum_update_ K=3 bytes=4 features=many 3 True",
        "forecast K=3 bytes=4 features=1 3 True",
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
