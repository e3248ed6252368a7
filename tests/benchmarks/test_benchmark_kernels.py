"""The kernels' benchmark: what it counts, that its parity checks catch errors, how it times, its command."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import launches
from benchmarks.common import timing
from benchmarks.common.timing import time_together
from benchmarks.kernels.parity import WrongResult, check_op, check_parity
from benchmarks.kernels.problems import OPS, Problem, Size, flop, minimum_bytes, ops_at, usable_backends
from hicache_kernels.backends import native, reference

ROOT = Path(__file__).parents[2]
SMALL = Size(3, 64, 128, batch=2)
CONTESTANTS = (*(name for name in usable_backends("cpu", torch.float32, 3) if name != "triton"), "eager")


def small_call(name, contestant):
    op = OPS[name]
    problem = Problem(SMALL, 2, torch.bfloat16, "cpu")
    call = problem.eager_calls(op)["eager"] if contestant == "eager" else problem.call(op, contestant)
    check_op(problem, op, contestant, call)
    return problem, call


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", OPS)
def test_small_ops_are_right(name, contestant):
    small_call(name, contestant)


@pytest.mark.perf
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", OPS)
def test_small_ops_are_timed(benchmark, name, contestant):
    benchmark.group = name
    problem, call = small_call(name, contestant)
    benchmark.pedantic(call, setup=problem.record if OPS[name].updates else None, rounds=10, warmup_rounds=1)


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
        # coefficients are not counted: a few numbers, of every feature too
        "forecast, by feature": (rows, [problem.row]),
        "gated_sum, by feature": ([*rows, problem.base, problem.gates], [problem.out]),
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
    alone = {"forecast", "forecast, by feature", "gated_sum", "gated_sum, by feature", "gated_sum, no gates"}
    assert {op.name for op in ops_at(0)} == alone


def test_parity_checks_cover_every_op_and_backend():
    backends = len(usable_backends("cpu", torch.float32, 3))
    size = Size(2, 5, 31)
    assert check_parity("cpu", [torch.bfloat16], orders=[2], sizes=[size]) == len(OPS) * (backends + 2)


@pytest.mark.parametrize("op", ["update_", "forecast", "update_forecast_", "gated_sum"])
@pytest.mark.parametrize("wrong", ["first number", "last number", "NaN", "history"])
def test_parity_checks_catch(monkeypatch, op, wrong):
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
        check_parity("cpu", [torch.float32], orders=[2], sizes=[size])


class Clock:
    """A clock that only the functions under test move."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.calls = 0.0, seconds, dict.fromkeys(seconds, 0)

    def perf_counter(self):
        return self.now

    def functions(self):
        return {name: lambda name=name: self.call(name) for name in self.seconds}

    def call(self, name):
        self.calls[name] += 1
        self.now += self.seconds[name]


@pytest.fixture
def clock(monkeypatch):
    made = Clock(slow=2**-4, fast=2**-10)  # whose sums are exact
    monkeypatch.setattr(timing, "time", made)
    return made


def test_timing_calls_every_function_as_often(clock):
    timings = time_together(clock.functions(), rounds=4)
    assert clock.calls == {"slow": 5, "fast": 5}
    assert timings["slow"].p20 == timings["slow"].p80 == 2**-4
    assert timings["fast"].p50 == 2**-10
    time_together(clock.functions(), rounds=1000, seconds=0)
    assert clock.calls == {"slow": 9, "fast": 9}


def test_timing_calls_a_slow_function_twice(clock):
    timings = time_together(clock.functions(), rounds=4, seconds=0.04)
    assert clock.calls == {"slow": 2, "fast": 4}
    assert timings["slow"].calls == 1
    assert timings["slow"].p20 == timings["slow"].p80 == 2**-4
    assert timings["fast"].calls == 3


def test_a_first_call_that_compiles_does_not_use_up_the_time(clock):
    def compiles():
        clock.now += 0.001 if clock.calls["fast"] else 10.0
        clock.calls["fast"] += 1

    [taken] = time_together({"compiles": compiles}, rounds=9, seconds=1.0).values()
    assert taken.calls == 9
    assert taken.p80 == pytest.approx(0.001)


def test_command(tmp_path):
    """Without the packages that it does not need."""
    path = tmp_path / "kernels.csv"
    done = subprocess.run(
        [
            sys.executable, ROOT / "tests" / "scripts" / "run_without.py",
            "tqdm,matplotlib,diffusers,hicache",
            "benchmarks.kernels", "--sizes", "1Ki", "demo", "--orders", "2", "0", "--rounds", "3",
            "--csv", str(path),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(r"parity: \d+ checks passed on ", done.stdout)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    contestants = {row["backend"] for row in rows}
    everywhere = {"eager", "foreach"} | (
        {"native"} if native.unavailable(torch.device("cpu")) is None else set()
    )
    assert contestants == everywhere | {"mm"}
    # in fp32, a forecast and a sum without gates are one matrix product, at both orders
    assert Counter(row["backend"] for row in rows)["mm"] == 2 * 2 * 2
    assert len(rows) == 2 * 2 * (len(OPS) + len(ops_at(0))) * len(everywhere) + 2 * 2 * 2
    for row in rows:
        assert row["device"]
        assert row["driver"]
        assert "torch" in row["versions"]
        speed = int(row["bytes"]) / float(row["p50_ms"]) / 1e6
        assert float(row["GBps"]) == pytest.approx(speed, rel=1e-3)
        assert float(row["share_of_copy"]) == pytest.approx(speed / float(row["copy_GBps"]), rel=1e-3)
        assert row["backend"] != "eager" or float(row["over_eager"]) == 1


def run_here(monkeypatch, command, *arguments):
    monkeypatch.setattr("sys.argv", [command.__name__, *map(str, arguments)])
    command.main()


def test_plots(tmp_path, monkeypatch):
    """Of the committed results of the kernels, and of launches counted anew."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import plots

    results = ROOT / "benchmarks" / "results"
    counted = tmp_path / "launches.csv"
    run_here(monkeypatch, launches, "--csv", counted)
    ours = [row for row in csv.DictReader(counted.open()) if row["contestant"] == "ours"]
    assert ours == [r for r in csv.DictReader((results / "launches.csv").open()) if r["contestant"] == "ours"]
    run_here(monkeypatch, plots, results / "kernels-cpu.csv", counted, "--out", tmp_path / "plots")
    drawn = {plot.name for plot in (tmp_path / "plots").iterdir()}
    bandwidth = {f"kernels-cpu-bandwidth-{dtype}.png" for dtype in ("bf16", "fp32")}
    assert drawn == bandwidth | {"kernels-cpu-roofline.png", "launches.png"}
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"expected rows of benchmarks\.kernels, benchmarks\.launches or"):
        run_here(monkeypatch, plots, tmp_path / "other.csv")
